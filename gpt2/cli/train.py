"""gpt2 train: a flag for every option of a run."""

import argparse
from dataclasses import fields
from typing import get_args, get_type_hints

from ..train.config import TrainConfig

_METAVARS = {int: "N", float: "X", str: "NAME"}
_DEFAULTS = {"None": "none", "False": "no", "True": "yes"}


def run(flags: argparse.Namespace) -> int:
    """Train a model. Without flags: a small one, on Python's own language reference, which takes
    two CPU cores some minutes. The run's folder gets config.json, metrics.jsonl, loss.png,
    tokenizer.json and checkpoint.safetensors. Ctrl-C saves before it stops."""
    chosen = {k: v for k, v in vars(flags).items() if k not in ("command", "resume")}
    if flags.resume is None:
        if chosen.get("init") is None:
            options = TrainConfig(**chosen)
        else:
            from ..train import pretrained

            options = pretrained.options(**chosen)
        from ..train.start import train

        return train(options)
    from ..train.start import resume

    return resume(flags.resume, **chosen)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of TrainConfig; only those given appear in the namespace."""
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="resume the run in this folder, with its options and any others given here",
    )
    hints, groups = get_type_hints(TrainConfig), {}
    for f in fields(TrainConfig):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, *_ = get_args(hints[f.name]) or (hints[f.name],)
        help = f.metadata["help"]
        if "[default" not in help:
            help += f" [default: {_DEFAULTS.get(str(f.default), f.default)}]"
        form = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "metavar": f.metadata.get("metavar", _METAVARS[kind])}
        )
        groups[group].add_argument(
            "--" + f.name.replace("_", "-"), help=help, default=argparse.SUPPRESS, **form
        )
