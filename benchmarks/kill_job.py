"""The small runs that `benchmarks/kill_matrix.py` kills: started, watched, and their end read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxformer.launch.local import free_port

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 40, 4
LIMIT = 120.0  # seconds; a process that still lives then hangs
LOST_SECONDS = 10
HANGS = 999  # instead of an exit code

WORDS = {"我": "I", "你": "you", "看见": "see", "建造": "build", "房子": "house", "桥": "bridge"}


class Job:
    """The processes of one run, and its folder."""

    def __init__(self, folder: Path, workdir: Path, count: int):
        self.folder, self.workdir, self.count = folder, workdir, count
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts the run, or starts it again."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": str(2 // self.count),  # the same layout of two devices
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        port = free_port()
        self.processes = []
        for index in range(self.count):
            place = (
                [
                    f"--coordinator=127.0.0.1:{port}",
                    f"--processes={self.count}",
                    f"--process_id={index}",
                    "--join_seconds=60",
                    f"--lost_seconds={LOST_SECONDS}",
                ]
                if self.count > 1
                else []
            )
            with (self.folder / f"{self.workdir.name}.{index}.log").open("ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "train.py", *flags(self.folder, self.workdir), *place],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=log,
                    )
                )

    def wait(self) -> list[int]:
        """The exit codes. A process that hangs is killed and answers HANGS."""
        deadline = time.monotonic() + LIMIT
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(deadline - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(HANGS)
        return codes

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends all processes a signal."""
        for process in self.processes:
            process.send_signal(number)

    def alive(self) -> bool:
        """Whether any process has not ended."""
        return any(process.poll() is None for process in self.processes)

    def said(self) -> str:
        """What all processes have written."""
        logs = self.folder.glob(f"{self.workdir.name}.*.log")
        return "".join(log.read_text(errors="replace") for log in logs)

    def steps(self) -> list[int]:
        """The complete checkpoints."""
        folder = self.workdir / "checkpoints"
        return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())

    def until(self, true: Callable[[], bool]) -> None:
        """Returns when it is true or the run has ended."""
        while self.alive() and not true():
            time.sleep(0.001)


def flags(folder: Path, workdir: Path) -> list[str]:
    """The small job: two layers, dropout, packed rows, average of parameters."""
    values = {
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "d_ff": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "dropout": 0.1,
        },
        "data": {
            "train": str(folder / "train.tsv"),
            "data_dir": str(folder / "data"),
            "vocab_size": 300,
            "target_length": 16,
            "tokens_per_batch": 256,
        },
        "optimizer": {"warmup_steps": 5, "ema_decay": 0.9},
        "train": {"steps": STEPS, "log_every": 1, "checkpoint_every": EVERY, "keep_checkpoints": 3},
        "decode": {"beam": 1, "max_length": 16},
    }
    changes = [f"--config.{s}.{n}={v}" for s, fields in values.items() for n, v in fields.items()]
    return ["--config=configs/tsv.py", f"--workdir={workdir}", *changes]


def write_text(folder: Path) -> None:
    """train.tsv: random words, each translated by itself."""
    rng = random.Random(0)
    rows = [rng.choices(list(WORDS), k=rng.randint(1, 6)) for _ in range(300)]
    text = "".join("".join(r) + "\t" + " ".join(WORDS[w] for w in r) + "\n" for r in rows)
    (folder / "train.tsv").write_text(text, encoding="utf-8")


def content(workdir: Path) -> str:
    """SHA-256 over every array of the last checkpoint, and over the logged losses."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    path = workdir / "checkpoints" / str(STEPS)
    assert path.is_dir(), f"{workdir} has not reached step {STEPS}"
    digest = hashlib.sha256()
    stored = ocp.checkpointables_metadata(path.absolute()).metadata
    like = {
        name: jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), stored[name])
        for name in ("params", "ema", "train")
    }
    loaded = ocp.load_checkpointables(path.absolute(), like)
    for where, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        digest.update(f"{jax.tree_util.keystr(where)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        digest.update(f"{record['step']} {record.get('loss')} {record.get('grad_norm')}".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 4 MiB at `path`; needs the right to mount."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def may_mount() -> bool:
    """Whether `small_disk` works here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "disk"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False
