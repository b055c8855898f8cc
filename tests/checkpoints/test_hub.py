"""Published models by name, with and without a network."""

import sys

import pytest
from huggingface_models import random_model, same

from gpt2 import Model
from gpt2.checkpoints import hub, huggingface
from gpt2.errors import InputError


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "distilgpt2"])
def test_a_published_name_is_downloaded_though_a_folder_has_it(name, monkeypatch, tmp_path):
    model, folder = random_model(), tmp_path / "saved"
    model.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert same(Model.from_pretrained(name), model)
    repository = "distilbert/distilgpt2" if name == "distilgpt2" else "openai-community/gpt2"
    assert asked == [(repository, huggingface.FILES)]
    with pytest.raises(InputError, match=r"config.json' cannot be read"):
        Model.from_pretrained(f"./{name}")


def test_without_huggingface_hub_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"'gpt2-xl' must be downloaded.*pip install huggingf"):
        Model.from_pretrained("gpt2-xl")


def test_no_network_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"'gpt2' is neither in .*cache nor") as error:
        Model.from_pretrained("gpt2")
    assert "\n" not in str(error.value)


def test_all_published_names():
    assert set(hub.PUBLISHED) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
    assert hub.is_published("openai-community/gpt2-large") and not hub.is_published("gpt3")
