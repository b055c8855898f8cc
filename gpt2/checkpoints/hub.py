"""Published models by name, downloaded and cached by huggingface_hub."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, brief

PUBLISHED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def is_published(name: str | Path) -> bool:
    """Whether name is a published model's short or full name. Such a name never means a folder; a
    folder of that name must be given as `./gpt2`."""
    return str(name) in PUBLISHED or str(name) in PUBLISHED.values()


def download(name: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of a published model that match one of the patterns.

    Raises InputError if huggingface_hub is not installed, or if the files are not in its cache
    and cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name!r} must be downloaded, which needs huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(PUBLISHED.get(name, name), allow_patterns=list(patterns)))
    except (OSError, ValueError, RuntimeError) as e:  # from the network, the client or the cache
        raise InputError(
            f"{name!r} is neither in huggingface_hub's cache nor can it be downloaded "
            f"({type(e).__name__}: {brief(e)})"
        ) from e
