"""Reads and writes Hugging Face's tokenizers, with the same ids as their library for any text."""

import json
import random
import shutil

import numpy as np
import pytest
from checkpoint_files import published
from huggingface_models import random_model

import gpt2
from gpt2 import Config, Model, loading
from gpt2.cli import main
from gpt2.data import bytelevel, documents, hf_tokenizer
from gpt2.data import tokenizers as tk
from gpt2.errors import InputError

pytestmark = pytest.mark.usefixtures("without_the_interpreter")

tokenizers = pytest.importorskip("tokenizers")
LINES = "First, the naïve café: 1 234 日本語 don't  \n\n\tWE'LL see... ¡años! aaaa aabaa aaa " * 20


EOT = tk.EOT


def texts(n=150):
    """Text of every plane, words, and text at which regular expressions could split differently."""
    pool = [*LINES[:200], *" \r\n\t'sdmtlvre1!\u00a0\u200b\x1c\x00\x85é日😀\u0301a", " the", EOT]
    pool += [chr(random.choice((random.randrange(32, 0x3000), random.randrange(65536, 0x1FFFF))))
             for _ in range(300)]  # fmt: skip
    return ["".join(random.choices(pool, k=random.randrange(50))) for _ in range(n)]


def their_training(size=400, special=(EOT,), **options):
    """A tokenizer trained in the usual way: special tokens get the first ids."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([LINES, "abcabc bcab cabcab " * 30], trainer)
    return found


@pytest.fixture(scope="module")
def theirs():
    return their_training()


@pytest.fixture(scope="module")
def trained():
    return tk.train_bpe([LINES], 330)


def without_specials(theirs, text):
    """The ids of a text without recognizing special tokens, as ours encodes."""
    plain = tokenizers.Tokenizer.from_str(theirs.to_str())
    plain.encode_special_tokens = True
    return plain.encode(text, add_special_tokens=False).ids


def put(theirs, folder, form="tokenizer.json"):
    folder.mkdir(exist_ok=True)
    if form == "tokenizer.json":
        theirs.save(str(folder / form))
    else:
        theirs.model.save(str(folder))
    return folder


# ---- in


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_a_tokenizer_of_theirs_gives_their_ids(form, theirs, tmp_path):
    """`<|endoftext|>` is id 0, and ids are not in the order of the merges."""
    put(theirs, tmp_path, form)
    for path in (tmp_path, tmp_path / form):
        ours = tk.load(path)
        assert (ours.name, ours.vocab_size, ours.eot) == ("hf", theirs.get_vocab_size(), 0)
        for kept in (ours, tk.from_json(ours.to_json())):
            for text in texts(80):
                ids = kept.encode(text).tolist()
                assert ids == without_specials(theirs, text)
                assert kept.decode(ids) == text
    assert ours.encode(f"a{EOT}b", special=True).tolist() == theirs.encode(f"a{EOT}b").ids


def test_blocks_and_documents_of_theirs(theirs, tmp_path):
    """An end of text with id 0 was treated as missing."""
    ours = tk.load(put(theirs, tmp_path / "t"))
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).write_text(name * 9)
    found = documents.encode(documents.documents(str(tmp_path / "data")), ours)
    ids = np.concatenate(list(found))
    assert ours.decode(ids) == f"{'a' * 9}{EOT}{'b' * 9}" and (ids == 0).sum() == 1


def test_special_tokens_have_ids_and_no_text_becomes_one(tmp_path):
    theirs = their_training(special=("[PAD]", "</s>"))
    put(theirs, tmp_path)
    ours = tk.load(tmp_path)
    assert ours.eot is None and ours.decode([0, 1]) == "[PAD]</s>"
    assert ours.encode("[PAD]").tolist() == without_specials(theirs, "[PAD]") != [0]
    config = {"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"0": {"content": "[PAD]"}}}
    config["added_tokens_decoder"]["0"]["special"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tk.load(tmp_path).eot == 1
    assert tk.load(tmp_path).encode("a</s>", special=True).tolist()[-1] == 1


def at(*keys, value):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(token):
    return lambda state: state["model"]["vocab"].pop(token)


def snowman(state):
    state["model"]["vocab"]["☃"] = len(state["model"]["vocab"])


def word(state):
    state["added_tokens"].append({**state["added_tokens"][0], "id": 400, "content": "w"})
    state["added_tokens"][-1]["special"] = False


REFUSED = {
    "normalizer": (at("normalizer", value={"type": "NFC"}), "normalizer must be null"),
    "prefix": (at("pre_tokenizer", "add_prefix_space", value=True), "add_prefix_space must be fal"),
    "pattern": (at("pre_tokenizer", "use_regex", value=False), "use_regex must be true"),
    "pre": (at("pre_tokenizer", value={"type": "Whitespace"}), "pre_tokenizer must be ByteLevel"),
    "no pre": (at("pre_tokenizer", value=None), "pre_tokenizer must be ByteLevel, got None"),
    "post": (at("post_processor", value={"type": "BertProcessing"}), "post_processor must be null"),
    "decoder": (at("decoder", value={"type": "WordPiece"}), "decoder must be null or ByteLevel"),
    "type": (at("model", "type", value="Unigram"), "type must be 'BPE', got 'Unigram'"),
    "dropout": (at("model", "dropout", value=0.1), "dropout must be None, got 0.1"),
    "suffix": (at("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix must be None"),
    "added": (word, "added_tokens must be special, .* got 'w'"),
    "vocab": (at("model", "vocab", value=[1]), "vocab must be an object"),
    "merges": (at("model", "merges", value={}), "merges must be a list"),
    "bad merge": (at("model", "merges", value=[["a", "☃"]]), "model cannot be read"),
    "hole": (at("model", "vocab", "a", value=4000), "vocab must have the ids 0 to"),
    "no id": (at("model", "vocab", "a", value="1"), "vocab must be an object from tokens to ids"),
    "not bytes": (snowman, "vocab must hold bytes as characters"),
    "byte gone": (drop("a"), "vocab must"),
    "no model": (at("model", value=None), "a tokenizer is expected|name must be"),
    "other id": (at("added_tokens", 0, "id", value=7), "'<|endoftext|>' has two ids"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_encodes_otherwise_is_refused_by_name(change, message, theirs, tmp_path):
    state = json.loads(theirs.to_str())
    change(state)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match=message.replace("|end", r"\|end").replace("|>", r"\|>")):
        tk.load(path)


@pytest.mark.parametrize("key", ["add_prefix_space", "add_bos_token"])
def test_a_setting_beside_it_is_refused_and_the_flag_is_named(key, theirs, tmp_path):
    random_model(Config(8, 400, 1, 1, 4)).save_pretrained(tmp_path)
    put(theirs, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: True}))
    with pytest.raises(InputError, match=f"config.json': {key} must be false.*; --tokenizer names"):
        gpt2.load(tmp_path)
    assert gpt2.load(tmp_path, tokenizer="byte")[1].name == "byte"


def test_merges_must_lie_beside_a_vocabulary(theirs, tmp_path):
    put(theirs, tmp_path, "vocab.json")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"vocab.json': merges.txt must be beside it: No such"):
        tk.load(tmp_path)


def test_a_folder_s_tokenizer_is_its_model_s(theirs, tmp_path, monkeypatch, capsys):
    """GPT-2's tokenizer was used, with ids of other words."""
    size = theirs.get_vocab_size()
    model = random_model(Config(16, size + 1, 1, 1, 8))  # resized by one
    model.save_pretrained(tmp_path / "hf")
    put(theirs, tmp_path / "hf")
    loaded, tokenizer = gpt2.load(tmp_path / "hf")
    assert loaded.config.vocab_size == tokenizer.vocab_size == size
    assert tokenizer.encode("abcabc").tolist() == theirs.encode("abcabc").ids
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(LINES)
    few = ["--data", "text.txt", "--steps", "1", "--sample-tokens", "3", "--batch-size", "2"]
    assert main(["train", "--init", "hf", *few, "--out", "run"]) == 0
    assert loading.load("run")[1].encode(LINES).tolist() == theirs.encode(LINES).ids
    assert main(["convert", "hf", "cropped", "--to", "run", "--vocab-size", str(size)]) == 0
    assert main(["convert", "hf", "padded", "--to", "run"]) == 2
    assert "--vocab-size crops" in capsys.readouterr().err
    assert main(["convert", "hf", "half", "--to", "hf", "--dtype", "float16"]) == 0
    assert (tmp_path / "half/tokenizer.json").read_bytes() == (
        tmp_path / "hf/tokenizer.json"
    ).read_bytes()


# ---- out


def auto(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


KINDS = {
    "gpt2": lambda trained: published(),
    "bpe": lambda trained: trained,
    "byte": lambda trained: tk.byte(),
    "first": lambda trained: tk.first(trained, 300),
    "hf": lambda trained: hf_tokenizer.from_state(json.loads(their_training().to_str())),
    "unreachable": lambda trained: tk.bpe([*trained.tokens[:300], b" zqzq", b"zqz"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_loads_the_same_ids(kind, trained, tmp_path):
    pytest.importorskip("transformers")
    ours = KINDS[kind](trained)
    Model(Config(8, ours.vocab_size, 1, 1, 4)).save_pretrained(tmp_path, tokenizer=ours)
    theirs = auto(tmp_path)
    whole = ours.whole or ours
    assert theirs.eos_token_id == whole.eot and len(theirs) == whole.vocab_size
    for text in [*texts(), " zqzq zqz zqzq"]:
        text = text.replace(EOT, "<|>")
        ids = theirs(text)["input_ids"]
        assert ids == whole.encode(text).tolist()
        assert theirs.decode(ids) == text
    again = gpt2.load(tmp_path)[1]
    assert again.tokens == ours.tokens and again.eot == ours.eot
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == ours.eot


def test_characters_are_written_whole_or_refused(tmp_path):
    alphabet = list(dict.fromkeys([*"zyx \n\t'aé日😀\u0301", *"".join(texts(20))]))
    ours = tk.characters(alphabet)
    Model(Config(8, len(alphabet), 1, 1, 4)).save_pretrained(tmp_path, tokenizer=ours)
    again = gpt2.load(tmp_path)[1]
    assert again.name == "char" and again.tokens == ours.tokens
    theirs = auto(tmp_path)
    for _ in range(100):
        text = "".join(random.choices(alphabet, k=30))
        if EOT in text:
            continue
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    with pytest.raises(Exception, match="Missing"):  # an error, not another character
        theirs("\U0010fffd")


def test_merges_of_gpt2_are_the_published_ones(tmp_path):
    merges, whole = bytelevel.merges_of(published().tokens[:-1])
    assert whole and len(merges) == 50000
    assert [tuple(map(bytelevel.to_chars, m)) for m in merges[:3]] == [
        ("Ġ", "t"),
        ("Ġ", "a"),
        ("h", "e"),
    ]


def test_vocab_and_merges_are_written_too(trained, tmp_path):
    hf_tokenizer.write(trained, tmp_path, 8)
    (tmp_path / "tokenizer.json").unlink()
    again = tk.load(tmp_path)
    assert again.tokens == trained.tokens and again.eot == trained.eot
    assert again.encode(LINES).tolist() == trained.encode(LINES).tolist()


def test_a_run_s_tokenizer_goes_with_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = random_model(Config(8, trained.vocab_size, 1, 1, 4))
    model.save_pretrained("bare")
    (tmp_path / "bpe.json").write_text(trained.to_json())
    named = ["--tokenizer", "bpe.json"]
    assert main(["convert", "bare", "run", "--to", "run", *named]) == 0
    assert main(["convert", "run", "hf", "--to", "hf"]) == 0
    assert "no tokenizer" not in capsys.readouterr().err
    assert gpt2.load("hf")[1].tokens == trained.tokens
    assert main(["convert", "bare", "named", "--to", "hf", *named]) == 0
    assert gpt2.load("named")[1].tokens == trained.tokens
    assert main(["convert", "bare", "again", "--to", "hf"]) == 0
    assert "gpt2: no tokenizer is written; --tokenizer names one" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_is_refused_before_anything_is_written(trained, tmp_path):
    model = random_model(Config(8, trained.vocab_size - 1, 1, 1, 4))
    with pytest.raises(InputError, match=f"got {trained.vocab_size}"):
        model.save_pretrained(tmp_path / "new", tokenizer=trained)
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_written_over_another_is_the_one_that_loads(trained, theirs, tmp_path):
    put(theirs, tmp_path), put(theirs, tmp_path, "vocab.json")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 400}')
    model = random_model(Config(8, trained.vocab_size, 1, 1, 4))
    model.save_pretrained(tmp_path, tokenizer=trained)
    assert gpt2.load(tmp_path)[1].tokens == trained.tokens
    assert not (tmp_path / "added_tokens.json").exists()
    shutil.copytree(tmp_path, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    assert tk.load(tmp_path / "copy").tokens == trained.tokens


def test_what_transformers_have_saved_again_is_read(trained, tmp_path):
    """transformers adds a template for text alone, which changes nothing. It was refused."""
    transformers = pytest.importorskip("transformers")
    hf_tokenizer.write(trained, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(tmp_path / "again")
    found = tk.load(tmp_path / "again" / "tokenizer.json")
    assert found.encode(LINES).tolist() == theirs.encode(LINES) == trained.encode(LINES).tolist()
    assert found.vocab_size == trained.vocab_size + 1 and found.eot == trained.eot
    assert found.tokens[theirs.pad_token_id] == b"<pad>"
