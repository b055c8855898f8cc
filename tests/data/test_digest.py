"""The hash of a run's data changes with every edit, and with nearly every edit of very large
shards."""

import numpy as np
import pytest

from gpt2.data import digest as module
from gpt2.data import shards
from gpt2.data.batches import Split
from gpt2.data.digest import digest

IDS = (np.arange(6000) * 7919 % 251).astype(np.uint16)


@pytest.fixture(params=["memory", "shards", "large-shards"])
def split_of(request, tmp_path, monkeypatch):
    """Makes a Split of some parts: in memory, mapped, or mapped and hashed by sampled pages."""
    if request.param == "large-shards":
        monkeypatch.setattr(module, "WHOLE", 100)
        monkeypatch.setattr(module, "PAGE", 512)

    def make(*parts):
        if request.param == "memory":
            return Split(list(parts))
        for n, part in enumerate(parts):
            shards.write(tmp_path / f"{n}.bin", part)
        return Split([shards.read(tmp_path / f"{n}.bin", 256) for n in range(len(parts))])

    return make


def changed(at, value=252):
    ids = IDS.copy()
    ids[at] = value
    return ids


def test_the_same_ids_have_the_same_digest(split_of):
    parts = IDS[:4000], IDS[4000:]
    assert digest(split_of(*parts)) == digest(split_of(*parts))
    assert digest(split_of(IDS)) == digest(Split([split_of(IDS).parts[0][:]])), "a view of it"


@pytest.mark.parametrize("at", [0, 1, 2999, 5998, 5999])
def test_one_other_id_is_seen(at, split_of):
    assert digest(split_of(IDS)) != digest(split_of(changed(at)))


def test_what_is_put_in_left_out_or_moved_is_seen(split_of):
    found = {
        digest(split_of(*parts))
        for parts in (
            (IDS,), (IDS[1:],), (IDS[:-1],), (np.insert(IDS, 700, 3),), (np.delete(IDS, 700),),
            (np.roll(IDS, 1),), (IDS[:3000], IDS[3000:]), (IDS[3000:], IDS[:3000]),
        )
    }  # fmt: skip
    assert len(found) == 8
    one, two = Split([IDS[:3000]]), Split([IDS[3000:]])
    assert digest(one, two) != digest(Split([IDS[:3000], IDS[3000:]])), "another split"


def test_large_shards_are_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 1000)
    monkeypatch.setattr(module, "PAGE", 512)
    monkeypatch.setattr(module, "PAGES", 4)
    shards.write(tmp_path / "a.bin", IDS)
    mapped = shards.read(tmp_path / "a.bin", 256)
    assert digest(Split([mapped])).startswith("pages ")
    assert digest(Split([IDS])).startswith("whole "), "in memory nothing is left out"
    shards.write(tmp_path / "b.bin", changed(1000))
    other = shards.read(tmp_path / "b.bin", 256)
    assert digest(Split([mapped])) == digest(Split([other])), "between two pages"
    tiny = Split([mapped[:3], mapped])
    assert digest(tiny) == digest(Split([mapped[:3], mapped]))
