"""Several real processes of `train.py` on a small job: started, waited for, read."""

import os
import subprocess
import sys
import time
from pathlib import Path

from jaxformer.launch.local import free_port

ROOT = Path(__file__).parent.parent
LIMIT = 100.0  # seconds; what still runs then hangs


def environment(devices: int = 1) -> dict[str, str]:
    """One process's environment: so many CPU devices, and programs compiled once for all tests."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def start(options, place=None, devices=1):
    """`train.py` with these options; place is (port, count, index), more flags may follow."""
    flags = []
    if place:
        port, count, index, *more = place
        flags = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process_id={index}"]
        flags += ["--lost_seconds=10", *more]
    return subprocess.Popen(
        [sys.executable, "train.py", "--config=configs/tsv.py", *options, *flags],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def together(options, count, devices=1):
    """All processes of a run, to their end: (exit codes, what they said)."""
    port = free_port()
    return ended([start(options, (port, count, index), devices) for index in range(count)])


def ended(processes):
    """(exit codes, what each said); a process that hangs fails the test."""
    deadline = time.monotonic() + LIMIT
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=max(deadline - time.monotonic(), 1))[0])
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said
