"""The training loop, with the model, the data, the optimizer and the folder of the run.

Step k is a pure function of the weights, the optimizer's state and (seed, k): the batch and the
dropout masks are drawn from (seed, k). So a resumed run computes, bit for bit, what it would have
computed without the interruption.
"""

import json
import math
import shlex
import sys
import time
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import files, memory
from ..bars import say
from ..checkpoints import checkpoint
from ..config import Config
from ..data import batches
from ..data.digest import digest
from ..data.tokenizer import Tokenizer
from ..device import describe, peak_flops, pick_device, pick_dtype
from ..errors import InputError, NonFiniteError, WriteError, brief, quoted
from ..generate import completion
from ..kernels.ids import raise_pending
from ..model import Model
from . import best, metrics, optim, pretrained, run_folder, signals
from .config import TrainConfig
from .work import Work

CONFIG, METRICS, PLOT = "config.json", "metrics.jsonl", "loss.png"  # in the folder of a run


class Trainer:
    """A model, its data, its optimizer, and their progress. Writes nothing before run is called.

    Raises InputError if the options do not fit each other, the data or this machine.
    """

    def __init__(self, options: TrainConfig, tokenizer: Tokenizer | None = None):
        self.options = o = options
        self.device = pick_device(o.device)
        self.dtype = pick_dtype(o.dtype, self.device)
        fast = self.device.type == "cuda" if o.fast is None else o.fast

        def config_for(vocab_size: int) -> Config:
            """The model's configuration. Raises InputError if training would not fit in memory."""
            config = Config(o.block_size, vocab_size, o.n_layer, o.n_head, o.n_embd, o.dropout)
            memory.check_training(
                config,
                batch_size=o.batch_size,
                grad_accum=o.grad_accum,
                fast=fast,
                dtype=self.dtype,
                device=self.device,
            )
            return config

        config_for(1)  # a lower bound, checked before any text is read
        self.corpus = batches.load(
            o.data,
            o.block_size,
            tokenizer=tokenizer or o.tokenizer,
            tokenizer_dir=o.tokenizer_dir,
            val_fraction=o.val_fraction,
            named=o.tokenizer is not None,
        )
        config = config_for(self.corpus.tokenizer.vocab_size)
        torch.manual_seed(o.seed)
        self.model = Model(config, fast=fast).to(self.device)
        self.work = Work(self.model, o, self.device, self.dtype)
        self.step = 0  # optimizer steps done
        self.elapsed_s = 0.0  # spent by earlier processes of this run
        self._plot_failed = False
        self._identity: tuple[int, int] | None = None  # of the folder, while it runs
        self.best = math.inf, 0  # the lowest validation loss and its step: see _keep_if_best

    @cached_property
    def digest(self) -> str:
        """The hash of the data, which must be the same on resume."""
        return digest(self.corpus.train, self.corpus.val)

    def start_from(self, start: pretrained.Start) -> None:
        """Replaces the random weights by those of start."""
        state = start.state()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])

    def load(self, path: Path, progress: dict[str, Any]) -> None:
        """Restores the model, the optimizer and the step from the checkpoint at path.

        progress is the checkpoint's metadata. Raises InputError if no steps are left to train or
        the data have changed.
        """
        step, tokens = progress["step"], progress.get("train_tokens")
        if step >= self.options.steps:
            raise InputError(f"steps must be above the {step} done, got {self.options.steps}")
        began_with = f"data {self.options.data!r} must be what the run began with"
        if tokens != len(self.corpus.train):
            raise InputError(
                f"{began_with}, {tokens} training tokens, got {len(self.corpus.train)}"
            )
        if progress.get("data", self.digest) != self.digest:  # absent in older versions
            raise InputError(f"{began_with}, got other tokens of the same number")
        checkpoint.load(path, self.model, self.work.optimizer)
        self.work.forget_graphs()
        self.step, self.elapsed_s = step, progress.get("elapsed_s", 0.0)

    def run(self, folder: Path) -> int:
        """Trains until the last step or a signal, and writes everything into folder. Returns the
        exit code."""
        with signals.caught() as stop:
            return self._run(folder, stop)

    def _run(self, folder: Path, stop: list[int]) -> int:
        o = self.options
        self._identity = files.identity(folder)
        peak = run_folder.kept_peak(folder / CONFIG, describe(self.device, self.dtype))
        peak = peak or peak_flops(self.device, self.dtype)
        config = asdict(self.model.config)
        settings = {"model": config, "train": asdict(o), "peak": peak._asdict()}
        files.write_atomic(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
        if o.keep_best:
            self.best = self._best_so_far(folder)
        say(
            f"{self.model.num_params():,} parameters on {self.device}, "
            f"{len(self.corpus.train):,} training tokens; mfu is relative to {peak.source}"
        )
        with metrics.Progress(
            folder / METRICS,
            step=self.step,
            steps=o.steps,
            elapsed_s=self.elapsed_s,
            tokens_per_step=o.tokens_per_step,
            flops_per_token=self.model.flops_per_token(o.block_size),
            peak_flops=peak.flops,
        ) as progress:
            saved = None
            while self.step < o.steps and not stop:
                start = time.perf_counter()
                loss, lr = self.train_step()
                progress.add(loss, time.perf_counter() - start)

                last = self.step == o.steps
                val_loss = None
                if last or self.step % o.eval_interval == 0:
                    val_loss = self.evaluate(limit=0 if last else o.eval_batches)
                    if o.keep_best:
                        self._keep_if_best(folder, val_loss, last)
                if val_loss is not None or stop or self.step % o.log_interval == 0:
                    progress.line(self.step, lr, val_loss)
                if last or stop or self.step % o.save_interval == 0:
                    self.save(folder, progress)
                    saved = self.step
            if saved != self.step:  # a signal came after the save above, or before the first step
                self.save(folder, progress)
        if self.step < o.steps:
            say(
                f"stopped at step {self.step} of {o.steps}; "
                f"continue with: gpt2 train --resume {shlex.quote(str(folder))}"
            )
            return 128 + stop[0]
        self._finish(folder, val_loss)
        return 0

    def train_step(self) -> tuple[float, float]:
        """Does one optimizer step. Returns its loss, in nats per token, and its learning rate.

        Raises NonFiniteError, before anything is updated, if the loss or the norm of the gradient
        is not finite.
        """
        o, k = self.options, self.step
        torch.manual_seed(int(np.random.SeedSequence((o.seed, k)).generate_state(1, np.uint64)[0]))
        x, y = self.corpus.train.batch(o.seed, k, o.batch_size * o.grad_accum, o.block_size)
        found = self.work.gradients(*self.work.batch(x, y))
        loss, norm = found.tolist()  # the step's only synchronization
        raise_pending(self.device)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {k + 1} (batch {k} of seed {o.seed}) has loss {loss} and gradient norm "
                f"{norm}: stopped before the update; a lower lr than {o.lr:g} may help"
            )
        lr = optim.learning_rate(
            k, steps=o.steps, warmup_steps=o.warmup_steps, lr=o.lr, min_lr=o.final_lr
        )
        self.work.update(lr)
        self.step += 1
        return loss, lr

    def _best_so_far(self, folder: Path) -> tuple[float, int]:
        """The lowest validation loss over eval_batches so far, and its step. If that loss was
        measured on other batches, the loss of the kept weights is computed again."""
        found = best.read(folder)
        if found is None:
            return math.inf, 0
        if found.get("measure") == self._measure:
            return found["val_loss"], found["step"]
        model = Model(self.model.config, fast=self.model.fast).to(self.device)
        checkpoint.load(folder / best.FOLDER / checkpoint.FILE, model)
        return self.evaluate(self.options.eval_batches, model), found["step"]

    def _keep_if_best(self, folder: Path, val_loss: float, last: bool) -> None:
        """Keeps the weights if their loss over eval_batches is the lowest so far. After the last
        step, val_loss is that of the whole split, so the loss over eval_batches is computed."""
        limit = self.options.eval_batches
        loss = self.evaluate(limit) if last and limit else val_loss
        if loss < self.best[0]:
            self._check_there(folder)
            best.write(
                folder,
                self.model,
                self.corpus.tokenizer,
                step=self.step,
                val_loss=loss,
                measure=self._measure,
            )
            self.best = loss, self.step

    @property
    def _measure(self) -> list[int]:
        """Identifies the validation batches that the best loss is measured on."""
        o = self.options
        return [o.eval_batches, o.batch_size if o.eval_batches else 0]

    @torch.no_grad()
    def evaluate(self, limit: int = 0, model: Model | None = None) -> float:
        """The mean loss over the validation split, or over `limit` batches of it, in nats per
        token. The default model is the trainer's.

        Raises NonFiniteError if the loss is not finite.
        """
        o, total, count = self.options, 0.0, 0
        model = model or self.model
        loss_of = self.work.loss if model is self.model else partial(self.work.loss_of, model)
        model.eval()
        for x, y in self.corpus.val.windows(o.batch_size, o.block_size, limit):
            targets = int((y != -1).sum())
            total += loss_of(*self.work.batch(x, y)).item() * targets
            raise_pending(self.device)
            count += targets
        model.train()
        if not math.isfinite(total):
            raise NonFiniteError(
                f"the validation loss after step {self.step} is {total / count}; a lower lr than "
                f"{o.lr:g} may help"
            )
        return total / count

    def save(self, folder: Path, progress: metrics.Progress) -> None:
        """Writes the checkpoint and the plot."""
        self._check_there(folder)
        checkpoint.save(
            folder / checkpoint.FILE,
            self.model,
            self.work.optimizer,
            step=self.step,
            elapsed_s=progress.elapsed_s,
            train_tokens=len(self.corpus.train),
            data=self.digest,
        )
        if progress.rows:
            self._plot(folder, progress.rows)

    def _check_there(self, folder: Path) -> None:
        """Raises WriteError if the run's folder has been moved, removed or replaced."""
        if files.identity(folder) != self._identity:
            raise WriteError(folder, "it was moved or removed while the run trained")

    def _plot(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        """Draws the curves. Any error is reported once and training continues, because
        metrics.jsonl holds the data."""
        path = folder / PLOT
        try:
            metrics.plot(path, rows, f"GPT-2, {folder.name}", self._unit)
        except Exception as e:
            if not self._plot_failed:
                kind = type(e).__name__
                told = f"{quoted(path)} cannot be drawn, training continues ({kind}: {brief(e)})"
                tqdm.write(told, file=sys.stderr)  # above the bar
            self._plot_failed = True

    def _finish(self, folder: Path, val_loss: float) -> None:
        o = self.options
        if o.sample_tokens:
            text = completion.stream_text(
                self.model,
                self.corpus.tokenizer,
                max_new_tokens=o.sample_tokens,
                temperature=0.7,
                seed=o.seed,
            )
            for part in text:
                print(part, end="", flush=True)
            print()
        if o.keep_best:
            loss, step = self.best
            kept = shlex.quote(str(folder / best.FOLDER))
            say(f"lowest validation loss over eval_batches {loss:.4f}, after step {step}: {kept}")
        say(
            f"validation loss {val_loss:.4f} nats per {self._unit} over the whole split, "
            f"{len(self.corpus.val):,} tokens; sample from it: "
            f"gpt2 sample {shlex.quote(str(folder))} --prompt TEXT"
        )

    @property
    def _unit(self) -> str:
        return {"char": "character", "byte": "byte"}.get(self.corpus.tokenizer.name, "token")
