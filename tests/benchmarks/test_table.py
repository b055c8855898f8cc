"""README's tables are generated from the results, and outdated tables are detected."""

import json

import table


def result(**changes):
    return {
        "op": "gelu", "step": "forward", "shape": {"N": 4, "C": 8}, "dtype": "float32",
        "contender": "cpu", "kind": "backend", "status": "ok", "median_ms": 2.0,
        "rate": 1.234, "unit": "GB/s", "percent_of_limit": 50.0, "max_error": 1e-6, **changes,
    }  # fmt: skip


def document(*results, date="2026-01-02T03:04:05Z"):
    about = {
        "device_name": "Abacus", "torch": "2", "triton": None, "cuda": None, "cudnn": None,
        "threads": 2, "commit": "abc", "dirty": False, "date": date,
    }  # fmt: skip
    limits = {"float32": {"GB/s": 2.468, "GFLOP/s": 100.0}}
    return {"schema": 1, "environment": about, "limits": limits, "results": list(results)}


def test_table_names_the_fastest_of_ours_and_of_all_peers():
    text = table.render([
        document(
            result(),
            result(contender="triton", median_ms=1.0),
            result(contender="reference", median_ms=0.1),  # plain PyTorch: neither ours nor a peer
            result(contender="slow", kind="peer", median_ms=9.0),
            result(contender="quick", kind="peer", median_ms=1.5),
            result(contender="cheat", kind="peer", median_ms=None, status="wrong"),
        )
    ])  # fmt: skip
    assert "*Abacus, torch 2, 2 threads, commit abc, 2026-01-02*" in text
    assert "(limit measured in the same run: 2.47 GB/s)" in text
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells[:3] == ["N=4 C=8", "forward", "triton"]
    assert cells[3:6] == ["1.00 ms", "1.23 GB/s", "50 %"]
    assert cells[6:] == ["quick 1.50 ms", "1.50×", "1.0e-06"]
    assert "No measurement" in table.render([])


def test_a_result_that_lacks_a_field_is_one_line(tmp_path, capsys):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    broken = result()
    del broken["median_ms"]
    (tmp_path / "benchmarks/results/a.json").write_text(json.dumps(document(broken)))
    assert table.main(["--root", str(tmp_path), "--check"]) == 2
    assert capsys.readouterr().err == "table.py: error: a result lacks 'median_ms'\n"


def test_summary_spans_the_shapes():
    peer = {"contender": "eager", "kind": "peer"}
    text = table.summary([
        document(result(), result(**peer, median_ms=3.0)),
        document(result(shape={"N": 8, "C": 8}), result(**peer, shape={"N": 8, "C": 8})),
        document(result(op="alone"), result(step="backward"), result(**peer, step="backward")),
    ])  # fmt: skip
    assert text.count("*Abacus, torch 2, 2 threads, commit abc*") == 1, "one machine, one table"
    assert text.splitlines()[2:] == [
        "| operation | dtype | times as fast |",
        "| --- | --- | --- |",
        "| gelu | float32 | forward 1.00 to 1.50×, backward 1.00× |",
    ]
    assert "No measurement" in table.summary([])


def test_readme_shows_gpus_and_float32_on_all_cores():
    def of(threads, *rows):
        found = document(*rows)
        return found | {"environment": found["environment"] | {"threads": threads}}

    gpu, two = of(None, result()), of(2, result(), result(dtype="bfloat16"))
    assert table.headline([gpu, of(1, result()), two]) == [gpu, of(2, result())]
    assert table.headline([]) == []


def test_summary_has_the_newest_and_never_ours_beside_a_peer_of_another_run():
    peer = {"contender": "eager", "kind": "peer"}
    newest = document(result(), result(**peer, median_ms=8.0), date="2026-03-01T00:00:00Z")
    text = table.summary([
        document(result(), result(**peer, median_ms=3.0), date="2026-01-01T00:00:00Z"),
        newest,
        document(result(median_ms=1.0), result(**peer, median_ms=7.0), date="2026-02-01T00:00:00Z"),
        document(result(median_ms=0.5), date="2026-04-01T00:00:00Z"),  # without a peer
    ])  # fmt: skip
    assert text.splitlines()[-1] == "| gelu | float32 | forward 4.00× |"


def test_tables_are_rewritten_and_checked(tmp_path, capsys):
    results = tmp_path / "benchmarks/results/gelu.json"
    files = [tmp_path / "README.md", tmp_path / "docs/benchmarks.md"]
    for folder in (results.parent, tmp_path / "docs"):
        folder.mkdir(parents=True)
    peer = result(contender="eager", kind="peer", median_ms=3.0)
    results.write_text(json.dumps(document(result(), peer)))
    for file in files:
        file.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")

    def main(*options):
        return table.main(["--root", str(tmp_path), *options])

    assert main("--check") == 1 and all("old" in file.read_text() for file in files)
    assert main("--write") == 0
    texts = [file.read_text() for file in files]
    for text in texts:
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| gelu | float32 | forward 1.50× |" in texts[0] and "| N=4 C=8 | forward |" in texts[1]
    assert main("--check") == 0 and [file.read_text() for file in files] == texts
    results.write_text(json.dumps(document(result(median_ms=3.0), peer)))
    assert main("--check") == 1 and [file.read_text() for file in files] == texts

    files[1].write_text("no markers")
    assert main("--write") == 2 and files[0].read_text() == texts[0], "both or none"
    results.write_text('{"schema": 0}')
    assert main("--write") == 2
    errors = capsys.readouterr().err
    assert "needs one line" in errors and "not a result of schema 1" in errors
