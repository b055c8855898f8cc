"""The published models by name, through huggingface_hub, which keeps what it has downloaded."""

from collections.abc import Sequence
from pathlib import Path

from .errors import InputError, brief

PUBLISHED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def is_published(name: str | Path) -> bool:
    """Whether it is a published name, in its short or its full form. It is never taken for a
    folder that happens to be called so: that one is `./gpt2`."""
    return str(name) in PUBLISHED or str(name) in PUBLISHED.values()


def download(name: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of a published model that match one of these patterns.

    Raises InputError where huggingface_hub is not installed, and where the files are neither in
    its cache nor can be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name!r} must be downloaded, which takes huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(PUBLISHED.get(name, name), allow_patterns=list(patterns)))
    except (OSError, ValueError, RuntimeError) as e:  # of the network, of its client, of its cache
        raise InputError(
            f"{name!r} is neither in huggingface_hub's cache nor can it be downloaded "
            f"({type(e).__name__}: {brief(e)})"
        ) from e
