"""lm-evaluation-harness with our models: the same results as its adapter for transformers, request
by request, with the same random weights."""

import json
import random

import pytest
import torch
from huggingface_models import their_model

pytest.importorskip("lm_eval", reason='needs lm-evaluation-harness: pip install ".[eval]"')
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from gpt2 import Config, kernels
from gpt2.checkpoints import convert
from gpt2.data.tokenizer import EOT, bpe, byte
from gpt2.errors import InputError
from gpt2.evaluate import multiple_choice
from gpt2.generate import decoding
from gpt2.interop.lm_eval import KernelsLM
from gpt2.model import Model

L = 24
SMALL = Config(block_size=L, vocab_size=258, n_layer=2, n_head=2, n_embd=16)
MERGED = bpe([*(bytes([b]) for b in range(256)), b" a"])  # 257 merges " a"; eot is the last


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder in transformers' format; large weights, so that the context matters."""
    torch.manual_seed(0)
    theirs = their_model(SMALL)
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(3)
    folder = tmp_path_factory.mktemp("weights")
    theirs.save_pretrained(folder)
    (folder / "ranks").write_text(to_tiktoken(MERGED))
    return folder


def to_tiktoken(tokenizer):
    from gpt2.data import tiktoken_file

    return tiktoken_file.to_text(tokenizer)


@pytest.fixture(scope="module")
def ours(weights):
    lm = KernelsLM(str(weights), str(weights / "ranks"), device="cpu", batch_size=3)
    lm.model.fast = False
    return lm


@pytest.fixture(scope="module")
def theirs(weights):
    """Their adapter with the same weights, and the same tokenizer in their form."""
    pytest.importorskip("accelerate", reason="the harness needs it for transformers")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from gpt2.data.bytelevel import BYTE_OF_CHAR

    printed = {b: c for c, b in BYTE_OF_CHAR.items()}
    vocab = {"".join(printed[b] for b in t): i for i, t in enumerate(MERGED.tokens[:-1])}
    merges = [(printed[ord(" ")], "a")]
    inner = Tokenizer(models.BPE({**vocab, EOT: 257}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOT, bos_token=EOT)
    model = GPT2LMHeadModel.from_pretrained(weights)
    model.config.eos_token_id = model.generation_config.eos_token_id = 257
    return HFLM(model, tokenizer=tokenizer, max_length=L, device="cpu", batch_size=2)


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def some_text(n, seed):
    return "".join(random.Random(seed).choices("abc dé\n", k=n))


PAIRS = [
    ("", " a cat"),
    ("the cat ", "sat"),  # the space is moved to the scored part
    ("cat", " a"),
    ("cat  ", ""),
    ("caf", "é"),
    (EOT, "a"),
    *((some_text(n, n), " a" + some_text(n % 7, n)) for n in (1, 5, 18, 23, 24, 25, 60)),
    ("xyz", "abc" * (L // 3)),
]


def test_loglikelihood_equals_that_of_their_adapter(ours, theirs):
    asked = requests("loglikelihood", PAIRS)
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    for pair, (log_p, greedy), (their_log_p, their_greedy) in zip(PAIRS, found, want, strict=True):
        assert log_p == pytest.approx(their_log_p, rel=1e-5), pair
        assert greedy == their_greedy, pair


def test_greedy_continuations_are_known_as_such(ours, theirs):
    """The model's own continuation, and the same with another last letter."""
    (text,) = ours.generate_until(requests("generate_until", [("cat", {"max_gen_toks": 4})]))
    asked = requests("loglikelihood", [("cat", text), ("cat", text + "?")])
    want = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def test_rolling_equals_that_of_their_adapter(ours, theirs):
    texts = [(some_text(n, n),) for n in (1, 2, L - 1, L, L + 1, 2 * L, 100)]
    asked = requests("loglikelihood_rolling", texts)
    want = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(want, rel=1e-5)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0.0]


def test_what_is_written_equals_that_of_their_adapter(ours, theirs):
    """Greedy, from contexts of all lengths, also too long ones, up to a stop string, which is left
    out."""
    contexts = [some_text(n, n) for n in (1, 3, 9, 14, 15, 40)]
    asked = [(text, {"max_gen_toks": 8, "until": []}) for text in contexts]
    want = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    found = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == want and len(set(found)) > 1
    stops = [text[3:5] for text in found]
    asked = [
        (text, {"max_gen_toks": 8, "until": [stop, "never"], "do_sample": False})
        for text, stop in zip(contexts, stops, strict=True)
    ]
    want = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    stopped = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert stopped == want
    for text, whole, stop in zip(stopped, found, stops, strict=True):
        assert text == whole.split(stop)[0] != whole


def test_the_batch_changes_nothing(ours):
    texts = [(some_text(n, n),) for n in (1, 30, 100)]
    before = [ours.batch_size]
    results = []
    for size in (1, 2, 50):
        ours.batch_size = size
        results.append(
            (
                [p for p, _ in ours.loglikelihood(requests("loglikelihood", PAIRS), True)],
                ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), True),
            )
        )
    ours.batch_size = before[0]
    for pairs, rolling in results[1:]:
        assert pairs == pytest.approx(results[0][0], rel=1e-5)
        assert rolling == pytest.approx(results[0][1], rel=1e-5)


def test_sampling_is_what_a_request_asks_for(ours):
    def written(**options):
        torch.manual_seed(0)
        asked = [("cat", {"max_gen_toks": 20, **options})]
        return ours.generate_until(requests("generate_until", asked), disable_tqdm=True)[0]

    greedy = written()
    assert written(do_sample=False, temperature=0.0) == greedy
    assert written(temperature=5.0) != greedy
    assert written(do_sample=True, temperature=5.0, top_k=1) == greedy
    with pytest.raises(InputError, match="generation has no option 'repetition_penalty'"):
        written(repetition_penalty=2.0)
    with pytest.raises(InputError, match="max_gen_toks must be below max_length 24, got 24"):
        written(max_gen_toks=24)


def test_documents_end_what_is_written(weights, monkeypatch):
    """Generation ends at <|endoftext|>, which is not part of the text; nothing is computed after
    it."""
    steps, tokens = [], decoding.tokens

    def counted(*args, **kwargs):
        for step in tokens(*args, **kwargs):
            steps.append(step)
            yield step

    monkeypatch.setattr(decoding, "tokens", counted)
    model = Model.from_pretrained(weights)
    with torch.no_grad():
        model.transformer["ln_f"].weight.zero_()
        model.transformer["wte"].weight[257] = 100 * model.transformer["ln_f"].bias
    lm = KernelsLM(model, MERGED)
    assert lm.generate_until(requests("generate_until", [("cat", {"max_gen_toks": 5})])) == [""]
    assert len(steps) == 1


def test_cached_results_are_added(ours, monkeypatch):
    added = []
    monkeypatch.setattr(ours.cache_hook, "add_partial", lambda *args: added.append(args))
    result = ours.loglikelihood(requests("loglikelihood", PAIRS[:2]), disable_tqdm=True)
    rolling = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("ab",)]))
    assert added == [
        ("loglikelihood", PAIRS[0], result[0]),
        ("loglikelihood", PAIRS[1], result[1]),
        ("loglikelihood_rolling", ("ab",), rolling[0]),
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantize": "int4"}, "quantize must be int8 or absent, got 'int4'"),
        ({"batch_size": "auto"}, "batch_size must be at least 1, got 'auto'"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"max_length": 25}, "max_length must be 1 to 24, got 25"),
        ({"dtype": "int8"}, "dtype must be auto, float32 or bfloat16, got 'int8'"),
        ({"pretrained": "none"}, "model must be .* got 'none'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message, weights):
    with pytest.raises(InputError, match=message):
        KernelsLM(**{"pretrained": weights, "tokenizer": str(weights / "ranks"), **arguments})


@pytest.mark.parametrize("device", [None, "auto", "cpu", "cuda:0"])
def test_the_harness_s_default_device_may_be_absent(device, weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = KernelsLM(str(weights), str(weights / "ranks"), device=device, batch_size="2")
    assert lm.device == torch.device("cpu") and lm.model.fast
    with pytest.raises(InputError, match="device must be auto or one that works here"):
        KernelsLM(str(weights), str(weights / "ranks"), device="warp")


def test_a_tokenizer_without_eot_has_no_empty_context():
    lm = KernelsLM(Model(Config(8, 256, n_layer=1, n_head=1, n_embd=8)).eval(), byte())
    assert len(lm.loglikelihood(requests("loglikelihood", [("a", "b")]))) == 1
    with pytest.raises(InputError, match=r"tokenizer must have <.endoftext.>"):
        lm.loglikelihood(requests("loglikelihood", [("", "b")]))
    with pytest.raises(InputError, match="a continuation must be 1 to max_length 8 tokens, got 9"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 9)]))
    with pytest.raises(InputError, match="tokenizer must be the model's Tokenizer"):
        KernelsLM(lm.model)


def test_a_task_of_the_harness_agrees_with_choices(weights, tmp_path, monkeypatch):
    """simple_evaluate, from the name of the model to the scores of a multiple-choice task."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    some = random.Random(2)

    def words(most):
        return some_text(some.randrange(2, most), some.random()).strip() or "a"

    questions = [
        {"ctx": words(40), "endings": [words(9) for _ in range(3)], "label": i % 3}
        for i in range(30)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "small", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "validation_split": "validation", "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    arguments = {"pretrained": str(weights), "tokenizer": str(weights / "ranks")}
    assert get_model("gpt2_kernels") is KernelsLM
    with kernels.use("reference"):
        found = lm_eval.simple_evaluate(
            "gpt2_kernels", model_args=arguments, tasks=[task], bootstrap_iters=0, device="cpu"
        )["results"]["small"]
        config = convert.read(weights).config
        model = KernelsLM(**arguments, device="cpu").model
        want = multiple_choice.evaluate(
            model, multiple_choice.read(path, MERGED, config.block_size)
        )
    assert 0 < want.acc < 1 and want.acc != want.acc_norm
    assert found["acc,none"] == pytest.approx(want.acc)
    assert found["acc_norm,none"] == pytest.approx(want.acc_norm)
