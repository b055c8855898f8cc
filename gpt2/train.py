"""Training, from options to a finished run.

Step k is a pure function of the weights, the optimizer's state and (seed, k): batch and dropout
are drawn from them anew. So a run that goes on from a checkpoint computes what it would have
computed without the stop, bit for bit.
"""

import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, data, files, finetune, optim, report, sampling
from . import tokenizer as tokenizers
from .config import Config
from .errors import InputError, NonFiniteError, brief
from .machine import peak_flops, pick_device, pick_dtype
from .model import Model
from .tokenizer import Tokenizer
from .train_config import FIXED, TrainConfig

CONFIG, METRICS, PLOT = "config.json", "metrics.jsonl", "loss.png"  # in the folder of a run


def train(options: TrainConfig) -> int:
    """A new run; the exit code is 0, or 128 and the number of the signal that stopped it.

    Raises InputError, with nothing written, where the options cannot make a run.
    """
    folder = Path(options.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    files.check_new_folder("out", folder)
    start = None if options.init is None else finetune.start(options)
    trainer = Trainer(options, start and start.tokenizer)
    if start is not None:
        trainer.start_from(start)
    files.make_folder("out", folder)
    files.write_atomic(folder / tokenizers.FILE, trainer.corpus.tokenizer.to_json())
    return trainer.run(folder)


def resume(folder: str | Path, **changes: Any) -> int:
    """Goes on with the run in folder, with some options changed; the exit code is that of train.

    Raises InputError, with nothing written, where folder does not hold a run, where its data are
    no longer the same, and for a change that would make it another run.
    """
    folder = Path(folder)
    for name in FIXED & set(changes):
        raise InputError(f"{name} cannot change where a run goes on, got {changes[name]!r}")
    options = _read_options(folder / CONFIG)
    _, progress = checkpoint.read(folder / checkpoint.FILE)
    options = replace(options, **changes)
    tokenizer = tokenizers.load(folder / tokenizers.FILE, options.tokenizer_dir)
    trainer = Trainer(options, tokenizer)
    trainer.load(folder / checkpoint.FILE, progress)
    files.sweep(folder)
    return trainer.run(folder)


class Trainer:
    """A model, its data, its optimizer, and how far they have come. Writes nothing until run.

    Raises InputError where the options fit neither each other, nor the data, nor this machine.
    """

    def __init__(self, options: TrainConfig, tokenizer: Tokenizer | None = None):
        self.options = o = options
        self.device = pick_device(o.device)
        self.dtype = pick_dtype(o.dtype, self.device)
        self.corpus = data.load(
            o.data,
            o.block_size,
            tokenizer=tokenizer or o.tokenizer,
            tokenizer_dir=o.tokenizer_dir,
            val_fraction=o.val_fraction,
            named=o.tokenizer is not None,
        )
        vocab_size = self.corpus.tokenizer.vocab_size
        config = Config(o.block_size, vocab_size, o.n_layer, o.n_head, o.n_embd, o.dropout)
        torch.manual_seed(o.seed)
        fast = self.device.type == "cuda" if o.fast is None else o.fast
        self.model = Model(config, fast=fast).to(self.device)
        self.forward = torch.compile(self.model) if o.compile else self.model
        self.optimizer = optim.adamw(
            self.model, lr=o.lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay
        )
        self.step = 0  # optimizer steps done
        self.elapsed_s = 0.0  # by the processes before this one

    def start_from(self, start: finetune.Start) -> None:
        """Takes these weights in place of random ones."""
        state = start.state()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])

    def load(self, path: Path, progress: dict[str, Any]) -> None:
        """Goes to where the checkpoint at path was saved."""
        step, tokens = progress["step"], progress.get("train_tokens")
        if step >= self.options.steps:
            raise InputError(f"steps must be above the {step} done, got {self.options.steps}")
        if tokens != len(self.corpus.train):
            raise InputError(
                f"data {self.options.data!r} must be what the run began with, {tokens} training "
                f"tokens, got {len(self.corpus.train)}"
            )
        checkpoint.load(path, self.model, self.optimizer)
        self.step, self.elapsed_s = step, progress.get("elapsed_s", 0.0)

    def run(self, folder: Path) -> int:
        """Trains to the last step or to a signal, and leaves everything in folder."""
        o = self.options
        settings = {"model": asdict(self.model.config), "train": asdict(o)}
        files.write_atomic(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
        peak, source = peak_flops(self.device, self.dtype)
        _say(
            f"{self.model.num_params():,} parameters on {self.device}, "
            f"{len(self.corpus.train):,} training tokens; mfu is a part of {source}"
        )
        with (
            _signals() as stop,
            report.Progress(
                folder / METRICS,
                step=self.step,
                steps=o.steps,
                elapsed_s=self.elapsed_s,
                tokens_per_step=o.tokens_per_step,
                flops_per_token=self.model.flops_per_token(o.block_size),
                peak_flops=peak,
            ) as progress,
        ):
            saved = None
            while self.step < o.steps and not stop:
                start = time.perf_counter()
                loss, lr = self.train_step()
                progress.add(loss, time.perf_counter() - start)

                last = self.step == o.steps
                val_loss = None
                if last or self.step % o.eval_interval == 0:
                    val_loss = self.evaluate(limit=0 if last else o.eval_batches)
                if val_loss is not None or stop or self.step % o.log_interval == 0:
                    progress.line(self.step, lr, val_loss)
                if last or stop or self.step % o.save_interval == 0:
                    self.save(folder, progress)
                    saved = self.step
            if saved != self.step:  # a signal came during the last lines, or before the first step
                self.save(folder, progress)
        if self.step < o.steps:
            _say(
                f"stopped at step {self.step} of {o.steps}; "
                f"go on: gpt2 train --resume {shlex.quote(str(folder))}"
            )
            return 128 + stop[0]
        self._finish(folder, val_loss)
        return 0

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; its loss, in nats per token, and its learning rate.

        Raises NonFiniteError, before anything is updated, where loss or gradient is not finite.
        """
        o, k = self.options, self.step
        torch.manual_seed(int(np.random.SeedSequence((o.seed, k)).generate_state(1, np.uint64)[0]))
        x, y = self.corpus.train.batch(o.seed, k, o.batch_size * o.grad_accum, o.block_size)
        loss = self.backward(self._to_device(x), self._to_device(y))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip or math.inf)
        loss, norm = torch.stack([loss, norm]).tolist()  # waits for the device, once a step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {k + 1} (batch {k} of seed {o.seed}) has loss {loss} and gradient norm "
                f"{norm}: stopped before the update; a lower lr than {o.lr:g} may help"
            )
        lr = optim.learning_rate(
            k, steps=o.steps, warmup_steps=o.warmup_steps, lr=o.lr, min_lr=o.final_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, lr

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the gradient of the mean loss over the targets y (B, T); that loss.

        batch_size windows go through the model at a time, weighted by the targets they have, so
        that the cut changes memory and nothing else.
        """
        total = torch.zeros((), device=self.device)
        targets = (y != -1).sum()
        for x_part, y_part in zip(
            x.split(self.options.batch_size), y.split(self.options.batch_size), strict=True
        ):
            with self._autocast():
                _, loss = self.forward(x_part, y_part)
            loss = loss * ((y_part != -1).sum() / targets)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, limit: int = 0) -> float:
        """The mean loss of the validation split, or of limit batches of it, in nats per token."""
        o, total, count = self.options, 0.0, 0
        self.model.eval()
        for x, y in self.corpus.val.windows(o.batch_size, o.block_size, limit):
            targets = int((y != -1).sum())
            with self._autocast():
                _, loss = self.model(self._to_device(x), self._to_device(y), return_logits=False)
            total += loss.item() * targets
            count += targets
        self.model.train()
        return total / count

    def save(self, folder: Path, progress: report.Progress) -> None:
        """The checkpoint, and the plot up to it."""
        checkpoint.save(
            folder / checkpoint.FILE,
            self.model,
            self.optimizer,
            step=self.step,
            elapsed_s=progress.elapsed_s,
            train_tokens=len(self.corpus.train),
        )
        if progress.rows:
            report.plot(folder / PLOT, progress.rows, f"GPT-2, {folder.name}", self._unit)

    def _finish(self, folder: Path, val_loss: float) -> None:
        o = self.options
        if o.sample_tokens:
            text = sampling.stream_text(
                self.model,
                self.corpus.tokenizer,
                max_new_tokens=o.sample_tokens,
                temperature=0.7,
                seed=o.seed,
            )
            for part in text:
                print(part, end="", flush=True)
            print()
        _say(
            f"validation loss {val_loss:.4f} nats per {self._unit} over the whole split, "
            f"{len(self.corpus.val):,} tokens; sample from it: "
            f"gpt2 sample {shlex.quote(str(folder))} --prompt TEXT"
        )

    @property
    def _unit(self) -> str:
        return {"char": "character", "byte": "byte"}.get(self.corpus.tokenizer.name, "token")

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM is put into; the second takes its usual course."""
    caught: list[int] = []
    before = {}

    def note(number, frame):
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        _say("\nfinishing this step, then saving; again to quit at once")

    for each in (signal.SIGINT, signal.SIGTERM):
        before[each] = signal.signal(each, note)
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _read_options(path: Path) -> TrainConfig:
    try:
        settings = files.parse_json(path.read_text(encoding="utf-8"))
        if settings.keys() == {"model"}:
            raise InputError("got converted weights, which --init trains")
        return TrainConfig.from_dict(settings["train"])
    except OSError as e:
        raise InputError(f"resume must be the folder of a run, got {str(path.parent)!r}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # InputError is a ValueError
        raise InputError(f"{str(path)!r} must hold a run's options: {brief(e)}") from e


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
