"""The training loop: data, mesh, state, then one step after the other until the end."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax import Array
from rich.console import Console

from jaxformer import report, sharding
from jaxformer.checkpoint import Checkpoints
from jaxformer.config import Config
from jaxformer.data import pipeline
from jaxformer.data.batches import prefetch
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.errors import UserError
from jaxformer.model.loss import Sums
from jaxformer.training import flops, state
from jaxformer.training.checks import check_same_run
from jaxformer.training.optimizer import make, schedule
from jaxformer.training.record import Display, Record
from jaxformer.training.step import add_sums, loss_sums, train_step

PROFILED = range(10, 15)
"""Steps after the start whose trace `config.profile` keeps: past compilation and first touches."""


def run(values: Mapping[str, Any], workdir: str | Path, console: Console | None = None) -> bool:
    """Trains until `train.steps`, going on from the newest checkpoint in `workdir`.

    SIGINT and SIGTERM end the run after the step under way, with a checkpoint. After the last step
    the model is scored on held-out text, and `report.html` is written.

    Returns:
      Whether the last step was reached (and not a signal).

    Raises:
      UserError: something that a person can put right; nothing half-written is left.
    """
    config, workdir = Config.of(values), Path(workdir)
    # Sentences are for people and scripts alike: where there is no terminal, they stay whole.
    console = console or Console(stderr=True, soft_wrap=not sys.stderr.isatty())
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_mesh(config, mesh.shape)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    with jax.set_mesh(mesh), contextlib.closing(checkpoints):
        training = Training(config, workdir, mesh, checkpoints, console)
        with _stop_signals() as stopped:
            finished = training.until(config.train.steps, stopped)
    del training  # the report needs the memory
    if finished:
        report.finish(workdir, console)
    return finished


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
        meta = checkpoints.meta() if checkpoints.latest() is not None else None
        tokenizer = None if meta is None else _tokenizer(meta)
        self.data = pipeline.prepare(config, tokenizer)
        if meta is not None:
            check_same_run(config, self.data.fingerprint, meta, workdir)
        vocab_size, S = self.data.tokenizer.vocab_size, self.data.source_length
        sharding.check_mesh(config, mesh.shape, vocab_size, S)
        self.optimizer = make(config)
        self.state = self._first_state(meta)
        self._announce()
        if meta is None:
            text = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
            (workdir / "config.json").write_text(text, encoding="utf-8")

    def until(self, last: int, stopped: Callable[[], bool]) -> bool:
        """Takes steps up to `last`; saves, evaluates and logs on the way."""
        first = int(self.state["step"])
        if first >= last:
            self.console.print("There is nothing left to do; raise config.train.steps to go on.")
            return True
        self.step_function, self.eval_function = self._compile()
        record = Record(self.workdir, first)
        with contextlib.closing(record), Display(self.console, first, last) as display:
            watch = _Watch(self, record, display)
            with contextlib.closing(
                prefetch(self.data.train, first, last, workers=self.config.data.workers)
            ) as batches:
                for index, batch in batches:
                    self._profile(index - first)
                    placed = sharding.place(batch, self.mesh)
                    self.state, metrics = self.step_function(self.state, placed)
                    done = index + 1
                    watch.step(done, metrics)
                    ends = done == last or stopped()
                    # What a step logs is on disk before its checkpoint: a run that goes on from
                    # there does not evaluate it again.
                    if done == last or done % self.config.train.eval_every == 0:
                        watch.evaluate(done)
                    if ends or done % self.config.train.checkpoint_every == 0:
                        watch.flush()
                        self.save(done)
                    if ends:
                        break
            self._profile(PROFILED.stop)
            self.checkpoints.wait()
        reached = int(self.state["step"])
        where = self.workdir / "checkpoints" / str(reached)
        if reached < last:
            self.console.print(
                f"Stopped at step {reached}, saved in {where}; the same command goes on."
            )
        return reached == last

    def save(self, done: int) -> None:
        """Starts writing a checkpoint of the state after `done` steps."""
        meta = {
            "step": done,
            "config": dataclasses.asdict(self.config),
            "tokenizer": base64.b64encode(self.data.tokenizer.to_bytes()).decode(),
            "data_fingerprint": self.data.fingerprint,
        }
        self.checkpoints.save(done, state.to_named(self.state), meta)

    def held_out(self) -> dict[str, float]:
        """Loss per token on the validation split, by the weights that would translate."""
        if self.data.valid is None:
            return {}
        model = self.state.get("ema", self.state["params"])
        limit = self.config.train.eval_batches
        total: Sums | None = None
        for index, batch in enumerate(self.data.valid):
            if limit and index == limit:
                break
            sums = self.eval_function(model, sharding.place(batch, self.mesh))
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
        batch = sharding.place(self.data.train.batch_at(0), self.mesh)
        compiled = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()
        memory = compiled.memory_analysis()
        temporary = 0 if memory is None else memory.temp_size_in_bytes
        self.console.print(
            f"Compiled the step in {time.perf_counter() - start:.1f} s; "
            f"{temporary / 2**20:,.0f} MiB of temporaries per device"
        )
        smoothing = self.config.train.label_smoothing
        return compiled, jax.jit(lambda model, batch: loss_sums(model, batch, smoothing, None))

    def _profile(self, since_start: int) -> None:
        if not self.config.profile:
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


class _Watch:
    """Reads the metrics of a step while the device computes the next one, and acts on them."""

    def __init__(self, training: Training, record: Record, display: Display):
        self.training, self.record, self.display = training, record, display
        config, data = training.config, training.data
        rows = config.data.tokens_per_batch // config.data.target_length
        self.rate = schedule(config)
        self.peak = flops.matmul_peak(config.model.dtype)
        self.flops = flops.step_flops(
            config.model,
            data.tokenizer.vocab_size,
            rows,
            data.source_length,
            config.data.target_length,
        )
        self.pending: tuple[int, dict[str, Array]] | None = None
        self.clock = time.perf_counter()
        self.since = {"seconds": 0.0, "tokens": 0.0, "steps": 0.0}  # the last record

    def step(self, done: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of the step just dispatched and reads those of the one before."""
        self.flush()
        self.pending = (done, metrics)

    def flush(self) -> None:
        """Reads what is pending: waits for that step to be finished."""
        if self.pending is None:
            return
        (done, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        config = self.training.config
        self._check_finite(done, int(values["skipped_in_row"]))
        numbers = per_token(values) | {
            "learning_rate": float(self.rate(done - 1 - int(values["skipped"]))),
            "grad_norm": values["grad_norm"],
            "tokens": values["count"],
            "skipped": values["skipped"],
        }
        speed, share = values["count"] / seconds, self.flops / seconds / self.peak
        self.display.update(done, numbers["loss"], numbers["learning_rate"], speed, share)
        more = {"seconds": seconds, "tokens": values["count"], "steps": 1.0}
        self.since = {name: self.since[name] + more[name] for name in more}
        if done % config.train.log_every == 0 or done == config.train.steps:
            self.record.write(done, numbers | self._speeds())

    def _speeds(self) -> dict[str, float]:
        """Over the steps since the last record; only these differ when a resumed run repeats."""
        since, self.since = self.since, dict.fromkeys(self.since, 0.0)
        seconds = since["seconds"]
        return {
            "seconds": seconds,
            "tokens_per_second": since["tokens"] / seconds,
            "share_of_peak": since["steps"] * self.flops / seconds / self.peak,
        }

    def evaluate(self, done: int) -> None:
        """Records the loss on held-out text; its time counts for no step."""
        self.flush()
        if held_out := self.training.held_out():
            self.record.write(done, held_out)
        self.clock = time.perf_counter()

    def _check_finite(self, done: int, in_row: int) -> None:
        if not in_row:
            return
        self.display.say(
            f"Step {done}: loss or gradient is not finite; this update is skipped "
            f"({in_row} in a row)"
        )
        if in_row >= self.training.config.train.max_nonfinite:
            ids = [
                pair for row in self.training.data.train.example_ids_at(done - 1) for pair in row
            ]
            raise UserError(
                f"Training stopped at step {done}: {in_row} updates in a row were not finite. The "
                f"last batch holds the training pairs {', '.join(map(str, ids))}. Lower "
                "config.optimizer.learning_rate, set config.optimizer.clip_norm=1.0, or look at "
                "these pairs; the checkpoints before are intact."
            )


def per_token(sums: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Sums over tokens as means per token: loss and nll in nats, accuracy as a share."""
    count = max(float(sums["count"]), 1.0)
    return {
        f"{prefix}loss": float(sums["loss"]) / count,
        f"{prefix}nll": float(sums["nll"]) / count,
        f"{prefix}accuracy": float(sums["correct"]) / count,
    }


def _tokenizer(meta: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question that the loop asks after each step."""
    seen: list[int] = []
    old = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
