"""What a run tells: progress on the screen, JSON lines and TensorBoard events in the workdir."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxformer import writing
from jaxformer.metrics import LOG, read_log

CURE = "make room on the disk and start the same command again, it goes on from the last checkpoint"

QUIET_SECONDS = 15.0
"""Where there is no terminal, a line of progress is printed this often."""


class Record:
    """Writes the numbers of a run to disk.

    A run that goes on at `step` first drops what was written after it: those steps will come again.
    """

    def __init__(self, workdir: Path, step: int):
        kept = [record for record in read_log(workdir) if record["step"] <= step]
        with writing.below(workdir, CURE):
            with writing.whole(workdir / LOG) as partial:
                partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            self._file = (workdir / LOG).open("a", encoding="utf-8")
            folder = workdir / "tensorboard"
            folder.mkdir(exist_ok=True)
            # The plain writer: SummaryWriter keeps events of up to two minutes in a queue, and they
            # would be lost with the process, though the steps are in a checkpoint.
            self._events = EventsWriter(str(folder / "events"), f".{step}")
            # TensorBoard forgets what the files before hold of later steps.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line and one event for each value; on disk before this returns."""
        with writing.below(Path(self._file.name).parent, CURE):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            scalars = [
                Summary.Value(tag=name, simple_value=value) for name, value in values.items()
            ]
            summary = Summary(value=scalars)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):  # what could not be written has been told
                file.close()


class NoRecord:
    """What a process has that is not the first: it computes the numbers and writes none."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Display:
    """A live line: step, loss, learning rate, tokens per second, share of the peak, time left."""

    def __init__(self, console: Console, first: int, last: int):
        self._console = console
        self._last = last
        self._clock = time.monotonic()
        self._first = first
        self._said = self._clock
        self._loss: float | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=last, completed=first, status="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, rate: float, tokens: float, share: float) -> None:
        """Shows one step; `tokens` per second, `share` of the matmul peak."""
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        status = f"loss {self._loss:.3f}  lr {rate:.2e}  {tokens:,.0f} tok/s  {share:.0%} of peak"
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        due = now - self._said > QUIET_SECONDS or step == self._last
        if due and not self._console.is_terminal:
            self._said = now
            left = (now - self._clock) / max(step - self._first, 1) * (self._last - step)
            self._console.print(f"step {step}/{self._last}  {status}  {_time(left)} left")

    def say(self, text: str) -> None:
        """A line above the progress."""
        self._console.print(text)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
