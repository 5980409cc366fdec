"""Kills small runs in many ways, starts them again, and compares the end with an undisturbed run.

    python -m benchmarks.kill_matrix --runs 104 --workers 2

Every run is `train.py` in one process or in two, with dropout and packing on. It is disturbed once,
started again with the same command until it is through, and must then hold bit for bit the
parameters, optimizer state and counters of the undisturbed run. Prints one table.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.kill_job import EVERY, HANGS, STEPS, Job, content, may_mount, small_disk, write_text


def any_moment(job: Job, rng: random.Random, seconds: float) -> None:
    """SIGKILL to all at any time of the run, its start included."""
    time.sleep(rng.uniform(0, seconds))
    job.kill()


def in_a_save(job: Job, rng: random.Random, seconds: float) -> None:
    """SIGKILL to all while a checkpoint is being written."""
    wanted = rng.randrange(EVERY, STEPS, EVERY)
    partial = job.workdir / "checkpoints" / f"{wanted}.partial"
    job.until(lambda: partial.exists() or wanted in job.steps())
    time.sleep(rng.uniform(0, 0.05))
    job.kill()


def in_a_restore(job: Job, rng: random.Random, seconds: float) -> None:
    """A run with checkpoints is started again, and killed with a checkpoint's file open."""
    _with_steps(job, rng, 1)
    job.kill()
    job.wait()
    job.start()
    folder = str(job.workdir / "checkpoints") + os.sep
    job.until(lambda: any(_opens(process.pid, folder) for process in job.processes))
    time.sleep(rng.uniform(0, 0.1))
    job.kill()


def full_disk(job: Job, rng: random.Random, seconds: float) -> None:
    """The disk is full at some save; then there is room again."""
    _with_steps(job, rng, 1)
    ballast = job.workdir / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    codes = job.wait()
    assert HANGS not in codes, "a full disk must not make the run hang"
    assert 0 not in codes, f"a full disk must end the run: {codes}"
    ballast.unlink()


def flipped_bit(job: Job, rng: random.Random, seconds: float) -> None:
    """SIGKILL to all; then one bit of the newest checkpoint is another."""
    _with_steps(job, rng, 2)
    job.kill()
    job.wait()
    newest = job.workdir / "checkpoints" / str(job.steps()[-1])
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    (path,) = rng.choices(files, sizes)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def lost_process(job: Job, rng: random.Random, seconds: float) -> None:
    """SIGKILL to one of two: the other ends by itself, says who is gone, and exits non-zero."""
    victim = rng.randrange(job.count)
    _with_steps(job, rng, 0)
    time.sleep(rng.uniform(0, 1))
    job.processes[victim].kill()
    codes = job.wait()
    if job.steps()[-1:] != [STEPS]:
        assert HANGS not in codes, "the other process hangs"
        assert 0 not in codes, f"the other process must end too: {codes}"
        assert f"Process {victim} (" in job.said(), "nobody said who is gone"


def told_twice(job: Job, rng: random.Random, seconds: float) -> None:
    """SIGTERM, and SIGKILL during the save that it asks for."""
    _with_steps(job, rng, 1)
    known = set(job.steps())
    job.kill(signal.SIGTERM)
    partials = job.workdir / "checkpoints"
    job.until(lambda: bool(list(partials.glob("*.partial"))) or set(job.steps()) != known)
    time.sleep(rng.uniform(0, 0.05))
    job.kill()


KINDS: dict[str, tuple[Callable[[Job, random.Random, float], None], tuple[int, ...]]] = {
    "at any moment": (any_moment, (1, 2)),
    "during a save": (in_a_save, (1, 2)),
    "during a restore": (in_a_restore, (1, 2)),
    "disk full": (full_disk, (1, 2)),
    "bit flipped in the newest checkpoint": (flipped_bit, (1, 2)),
    "told to stop, then killed in the save": (told_twice, (1, 2)),
    "one process of two lost": (lost_process, (2,)),
}


class Result(NamedTuple):
    """What became of one disturbed run."""

    kind: str
    processes: int
    killed_after: int  # newest complete checkpoint when it was disturbed; 0: none
    same: bool
    trouble: str  # "" unless the run was lost


def disturbed(
    folder: Path, kind: str, count: int, seed: int, seconds: float, wanted: str
) -> Result:
    """Starts a run, disturbs it, starts it again until it is through."""
    workdir = folder / f"run{seed}"
    disk: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if kind == "disk full":
        disk = small_disk(workdir)
    with disk:
        job = Job(folder, workdir, count)
        job.start()
        step, trouble, got = 0, "", ""
        try:
            KINDS[kind][0](job, random.Random(seed), seconds)
            job.wait()
            step = max(job.steps(), default=0)
            if kind == "bit flipped in the newest checkpoint":
                assert step, "nothing to damage"
            job.start()
            codes = job.wait()
            assert not any(codes), f"started again, it ended with {codes}"
            if kind == "bit flipped in the newest checkpoint" and step < STEPS:
                assert "is damaged" in job.said(), "the damage was not reported"
            got = content(job.workdir)
        except AssertionError as error:
            trouble = f"{error}; it said: {job.said()[-1000:]}"
        finally:
            job.kill()
            job.wait()
    return Result(kind, count, step, got == wanted, trouble)


def matrix(folder: Path, runs: int, workers: int, seed: int = 0) -> Iterator[Result]:
    """The undisturbed runs first, then `runs` disturbed ones, `workers` at a time."""
    write_text(folder)
    wanted, seconds = {}, {}
    for count in (1, 2):
        for name in (f"warm{count}", f"whole{count}"):  # the second finds everything compiled
            job = Job(folder, folder / name, count)
            start = time.monotonic()
            job.start()
            codes = job.wait()
            assert not any(codes), (codes, job.said())
            seconds[count] = time.monotonic() - start
        wanted[count] = content(folder / f"whole{count}")
        assert content(folder / f"warm{count}") == wanted[count], "a run does not repeat itself"
    pairs = [(kind, count) for kind, (_, counts) in KINDS.items() for count in counts]
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        waiting = [
            executor.submit(
                disturbed,
                folder,
                *pairs[number % len(pairs)],
                seed * 10_000 + number,
                seconds[pairs[number % len(pairs)][1]] * workers**0.5,
                wanted[pairs[number % len(pairs)][1]],
            )
            for number in range(runs)
        ]
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()


def table(results: list[Result]) -> str:
    """Markdown, a row for each kind and number of processes."""
    rows = collections.defaultdict(list)
    for result in results:
        rows[result.kind, result.processes].append(result)
    lines = ["| killed | processes | runs | bit for bit | lost |", "|---|---|---|---|---|"]
    for kind, (_, counts) in KINDS.items():
        for count in counts:
            if these := rows[kind, count]:
                same = sum(result.same for result in these)
                lost = sum(bool(result.trouble) for result in these)
                lines.append(f"| {kind} | {count} | {len(these)} | {same} | {lost} |")
    same, lost = sum(r.same for r in results), sum(bool(r.trouble) for r in results)
    lines.append(f"| **all** | | **{len(results)}** | **{same}** | **{lost}** |")
    return "\n".join(lines)


def _with_steps(job: Job, rng: random.Random, count: int) -> None:
    """Waits for so many checkpoints and a random number more."""
    count += rng.randrange(4)
    newest = (count + 1) * EVERY
    job.until(lambda: max(job.steps(), default=0) >= min(newest, STEPS - EVERY))


def _opens(pid: int, folder: str) -> bool:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(folder):
                    return True
    return False


def main() -> None:
    """Runs the matrix and prints the table; exit code 1 if a run was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=104)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file for every result, as JSON")
    arguments = parser.parse_args()
    if not may_mount():
        print("No right to mount a file system: runs on a full disk are left out.")
        KINDS.pop("disk full")
    results = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for result in matrix(Path(folder), arguments.runs, arguments.workers, arguments.seed):
            results.append(result)
            end = "the same" if result.same else f"LOST: {result.trouble or 'other numbers'}"
            print(
                f"{len(results)}/{arguments.runs} {time.monotonic() - start:.0f} s: {result.kind}, "
                f"{result.processes} process(es), from step {result.killed_after}: {end}",
                flush=True,
            )
    print(table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps([r._asdict() for r in results], indent=1) + "\n")
    sys.exit(any(not result.same for result in results))


if __name__ == "__main__":
    main()
