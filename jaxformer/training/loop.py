"""The training loop: data, mesh, state, then one step after the other until the end."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from rich.console import Console

from jaxformer import processes, report, sharding, writing
from jaxformer.checkpoint import Checkpoints
from jaxformer.config import Config
from jaxformer.data import pipeline
from jaxformer.data.batches import prefetch
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.metrics import read_log
from jaxformer.model import Transformer
from jaxformer.model.loss import Sums
from jaxformer.training import state
from jaxformer.training.checks import check_same_run
from jaxformer.training.goodput import Goodput, told
from jaxformer.training.optimizer import make
from jaxformer.training.record import Display, NoRecord, Record
from jaxformer.training.step import add_sums, loss_sums, train_step
from jaxformer.training.stopping import stop_signals, time_limit
from jaxformer.training.watch import Watch, per_token

PROFILED = range(10, 15)
"""Steps after the start whose trace `config.profile` keeps: past compilation and first touches."""


def run(values: Mapping[str, Any], workdir: str | Path, console: Console | None = None) -> bool:
    """`train`; after the last step the model is scored on held-out text, and `report.html` written.

    Returns and raises what `train` does.
    """
    console = console or stderr()
    finished = train(values, workdir, console)
    if finished:
        report.finish(Path(workdir), console)
    return finished


def train(values: Mapping[str, Any], workdir: str | Path, console: Console) -> bool:
    """Trains until `train.steps`, going on from the newest checkpoint in `workdir`.

    SIGINT and SIGTERM end the run after the step under way, with a checkpoint.

    Returns:
      Whether the last step was reached (and not a signal).

    Raises:
      UserError: something that a person can put right; nothing half-written is left.
    """
    config, workdir = Config.of(values), Path(workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_mesh(config, mesh.shape)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints, config.train.keep_best)
    with jax.set_mesh(mesh), contextlib.closing(checkpoints):
        training = Training(config, workdir, mesh, checkpoints, console)
        with stop_signals() as stopped:
            return training.until(config.train.steps, stopped)


def stderr() -> Console:
    """Where a run speaks. Sentences are for scripts too: without a terminal they stay whole."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty(), quiet=processes.index() > 0)


def batch_rows(config: Config) -> int:
    """B, the rows of a global batch."""
    return config.data.tokens_per_batch // config.data.target_length


class Training:
    """A run that is set up: data, compiled functions, and the state where the last run left it."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        checkpoints: Checkpoints,
        console: Console,
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.checkpoints, self.console = checkpoints, console
        self.tracing = False
        self.rows = batch_rows(config)
        self.own_rows = sharding.own_rows(self.rows, mesh)
        has_begun = processes.shared(lambda: checkpoints.latest() is not None)
        meta = checkpoints.meta() if has_begun else None
        self.goodput = _goodput(meta, workdir)
        with self.goodput.spend("setup"):
            tokenizer = None if meta is None else _tokenizer(meta)
            self.data = _prepared(config, tokenizer)
            if meta is not None:
                check_same_run(config, self.data.fingerprint, meta, workdir)
            vocab_size, S = self.data.tokenizer.vocab_size, self.data.source_length
            sharding.check_mesh(config, mesh.shape, vocab_size, S)
            self.optimizer = make(config)
            self.state = self._first_state(meta)
        self._announce()
        if meta is None and processes.index() == 0:
            text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
            with writing.whole(workdir / "config.json") as partial:
                partial.write_text(text, encoding="utf-8")

    def until(self, last: int, stopped: Callable[[int], bool]) -> bool:
        """Takes steps up to `last`; saves, evaluates and logs on the way."""
        first = int(self.state["step"])
        if first >= last:
            self.console.print("There is nothing left to do; raise config.train.steps to go on.")
            return True
        with self.goodput.spend("compile"):
            self.step_function, self.eval_function = self._compile()
            # The first collective waits 30 s for the others and no longer, but compiling may take
            # one process minutes more than another.
            processes.wait_for_all("compiled")
        record = Record(self.workdir, first) if processes.index() == 0 else NoRecord()
        with contextlib.closing(record), Display(self.console, first, last) as display:
            watch = Watch(self, record, display)
            with contextlib.closing(self._batches(first, last)) as batches:
                self._steps(batches, watch, first, last, stopped)
            self._profile(PROFILED.stop)
        reached = int(self.state["step"])
        where = self.workdir / "checkpoints" / str(reached)
        if reached < last:
            self.console.print(
                f"Stopped at step {reached}, saved in {where}; the same command goes on."
            )
        self.console.print(told(self.goodput.seconds()))
        return reached == last

    def _batches(self, first: int, last: int) -> Generator[tuple[int, dict[str, np.ndarray]]]:
        workers = self.config.data.workers
        return prefetch(self.data.train, first, last, rows=self.own_rows, workers=workers)

    def _steps(
        self,
        batches: Iterator[tuple[int, dict[str, np.ndarray]]],
        watch: Watch,
        first: int,
        last: int,
        stopped: Callable[[int], bool],
    ) -> None:
        train = self.config.train
        for done in range(first + 1, last + 1):
            with self.goodput.spend("input"):
                index, batch = next(batches)
            self._profile(index - first)
            self.state, metrics = self.step_function(self.state, self._place(batch))
            watch.step(done, metrics)
            stops = stopped(done)
            # What a step logs is on disk before its checkpoint: a run that goes on from there does
            # not evaluate it again.
            score = None
            if done == last or done % train.eval_every == 0:
                score = watch.evaluate(done)
            if stops or done == last:
                watch.flush()
                with self.goodput.spend("checkpoint"), time_limit(train.stop_seconds):
                    self.save(done, score)
                    self.checkpoints.wait()
                return
            if done % train.checkpoint_every == 0:
                watch.flush()
                with self.goodput.spend("checkpoint"):
                    self.save(done, score)

    def save(self, done: int, score: float | None = None) -> None:
        """Starts writing a checkpoint of the state after `done` steps."""
        meta = {
            "step": done,
            "config": dataclasses.asdict(self.config),
            "tokenizer": base64.b64encode(self.data.tokenizer.to_bytes()).decode(),
            "data_fingerprint": self.data.fingerprint,
            "seconds": self.goodput.seconds(),
        }
        self.checkpoints.save(done, state.to_named(self.state), meta, score)

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return sharding.place(batch, self.mesh, self.rows)

    def held_out(self) -> dict[str, float]:
        """Loss per token on the validation split, by the weights that would translate."""
        if self.data.valid is None:
            return {}
        model = self._model()
        limit = self.config.train.eval_batches
        total: Sums | None = None
        for index in range(min(len(self.data.valid), limit or sys.maxsize)):
            batch = self.data.valid.batch_at(index, self.own_rows)
            sums = self.eval_function(model, self._place(batch))
            total = sums if total is None else add_sums(total, sums)
        return {} if total is None else per_token(jax.device_get(total), "valid_")

    def _first_state(self, meta: dict[str, Any] | None) -> state.State:
        vocab_size = self.data.tokenizer.vocab_size
        if meta is None:
            init = jax.jit(functools.partial(state.init, self.config, vocab_size, self.optimizer))
            return init()
        like = state.abstract(self.config, vocab_size, self.optimizer, self.mesh)
        named, _ = self.checkpoints.restore(state.to_named(like))
        return state.from_named(like, named)

    def _announce(self) -> None:
        data, train = self.data, self.data.train
        params = sum(leaf.size for leaf in jax.tree.leaves(self.state["params"]))
        pad_source, pad_target = train.padding
        valid = 0 if data.valid is None else data.valid.excluded
        self.console.print(
            f"{params / 1e6:.1f} M parameters, vocabulary {data.tokenizer.vocab_size:,}, on "
            f"{self.mesh.size} {jax.default_backend()} device(s)\n"
            f"{train.pairs:,} sentence pairs ({train.excluded:,} too long) packed into rows of "
            f"{data.source_length} and {self.config.data.target_length} tokens, "
            f"{pad_source:.1%} and {pad_target:.1%} padding; an epoch is "
            f"{train.steps_per_epoch:,.0f} steps of {train.tokens_per_batch:,.0f} target tokens"
        )
        if valid:
            self.console.print(f"{valid:,} validation pairs are too long for a row and left out")
        if int(self.state["step"]):
            self.console.print(f"Going on from step {int(self.state['step'])} of {self.workdir}")

    def _compile(self) -> tuple[Callable[..., Any], Callable[..., Sums]]:
        start = time.perf_counter()
        step = functools.partial(train_step, config=self.config, optimizer=self.optimizer)
        batch = self._place(self.data.train.batch_at(0, self.own_rows))
        compiled = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()
        memory = compiled.memory_analysis()
        temporary = 0 if memory is None else memory.temp_size_in_bytes
        self.console.print(
            f"Compiled the step in {time.perf_counter() - start:.1f} s; "
            f"{temporary / 2**20:,.0f} MiB of temporaries per device"
        )
        smoothing = self.config.train.label_smoothing
        held_out = jax.jit(lambda model, batch: loss_sums(model, batch, smoothing, None))
        if self.data.valid is None:
            return compiled, held_out
        return compiled, held_out.lower(self._model(), batch).compile()

    def _model(self) -> Transformer:
        """The weights that would translate."""
        return self.state["ema" if "ema" in self.state else "params"]

    def _profile(self, since_start: int) -> None:
        if not self.config.profile or processes.index():
            return
        folder = self.workdir / "profile"
        if since_start == PROFILED.start:
            jax.profiler.start_trace(str(folder))
            self.tracing = True
        elif since_start >= PROFILED.stop and self.tracing:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.tracing = False
            self.console.print(f"A trace of steps is in {folder}")


def _tokenizer(meta: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))


def _prepared(config: Config, tokenizer: Tokenizer | None) -> pipeline.Dataset:
    """The data, built by process 0 alone and read by the others when it is there."""
    mine = pipeline.prepare(config, tokenizer) if processes.index() == 0 else None
    processes.shared(lambda: True)
    data = mine or pipeline.prepare(config, tokenizer)
    processes.check_same("data (config.data)", data.fingerprint)
    return data


def _goodput(meta: dict[str, Any] | None, workdir: Path) -> Goodput:
    step = 0 if meta is None else meta["step"]
    after = [r.get("seconds", 0.0) for r in read_log(workdir) if r["step"] > step]
    return Goodput((meta or {}).get("seconds", {}), sum(after), bool(step or after))
