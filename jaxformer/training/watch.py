"""What is done with the numbers of a step while the device computes the next."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax import Array

from jaxformer.errors import UserError
from jaxformer.training import flops
from jaxformer.training.optimizer import schedule
from jaxformer.training.record import Display, NoRecord, Record

if TYPE_CHECKING:
    from jaxformer.training.loop import Training


class Watch:
    """Reads the metrics of a step while the device computes the next one, and acts on them."""

    def __init__(self, training: Training, record: Record | NoRecord, display: Display):
        self.training, self.record, self.display = training, record, display
        config, data = training.config, training.data
        self.rate = schedule(config)
        self.peak = flops.matmul_peak(config.model.dtype)
        self.flops = flops.step_flops(
            config.model,
            data.tokenizer.vocab_size,
            training.rows,
            data.source_length,
            config.data.target_length,
        )
        self.fastest = 0.0  # the highest rate of a step, in FLOP/s
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
        self.fastest = max(self.fastest, self.flops / seconds)
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

    def evaluate(self, done: int) -> float | None:
        """Records the loss on held-out text, and returns it; its time counts for no step."""
        self.flush()
        with self.training.goodput.spend("evaluation"):
            held_out = self.training.held_out()
            if self.fastest > self.peak:  # another program slowed the products that were timed
                self.peak = max(self.peak, flops.matmul_peak(self.training.config.model.dtype))
        if held_out:
            self.record.write(done, held_out)
        self.clock = time.perf_counter()
        return held_out.get("valid_loss")

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
