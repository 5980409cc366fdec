"""Processes of this machine as one job: started, heard, and ended together."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from jaxformer.errors import UserError

OWN_END = 15.0  # seconds in which the processes may end by themselves after one has failed
STOP_END = 10.0  # seconds from SIGTERM to SIGKILL after that
PORTS = range(20_000, 30_000)  # below those that systems hand out by themselves


def run(
    flags: Sequence[str], count: int, environment: Mapping[str, str], out: IO[str] | None = None
) -> int:
    """Runs `train.py` in `count` processes; every line of theirs is shown behind "[process] ".

    SIGINT and SIGTERM are passed on as SIGTERM, so that the run saves and stops. When one process
    fails, all end.

    Args:
      flags: of `train.py`, without those that tell the processes apart.
      count: of processes.
      environment: added to this process's own.
      out: where their lines go; None: stdout.

    Returns:
      The exit code of the first process that failed; 0 if none did.

    Raises:
      UserError: there is no `train.py` here.
    """
    if not Path("train.py").exists():
        raise UserError("There is no train.py in this directory; run this in jaxformer's own.")
    port = free_port()
    out = out or sys.stdout
    processes = []
    lock = threading.Lock()
    for index in range(count):
        place = (f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process_id={index}")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-u", "train.py", *flags, *place],
                env={**os.environ, "JAX_LOCAL_DEVICE_IDS": str(index), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is passed on once, not twice
                text=True,
                errors="replace",
            )
        )
    readers = [
        threading.Thread(target=_show, args=(index, process, out, lock))
        for index, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    old = {
        number: signal.signal(number, lambda *_: _send(processes, signal.SIGTERM))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        failed = _first_failure(processes)
        if failed is not None:
            _end(processes)
            code = processes[failed].returncode
            ended = f"with exit code {code}" if code > 0 else signal.Signals(-code).name
            print(f"Process {failed} ended first, {ended}; all have ended.", file=out, flush=True)
    finally:
        _send(processes, signal.SIGKILL)
        for number, handler in old.items():
            signal.signal(number, handler)
        for reader in readers:
            reader.join()
    return 0 if failed is None else abs(processes[failed].returncode)


def _first_failure(processes: Sequence[subprocess.Popen[str]]) -> int | None:
    """Waits for the end of all, or for the first that fails."""
    while True:
        codes = [process.poll() for process in processes]
        for index, code in enumerate(codes):
            if code:
                return index
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for seconds, number in ((OWN_END, signal.SIGTERM), (STOP_END, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                _send(processes, number)
                break
            time.sleep(0.05)
    for process in processes:
        process.wait()


def _send(processes: Sequence[subprocess.Popen[str]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _show(index: int, process: subprocess.Popen[str], out: IO[str], lock: threading.Lock) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with lock:
            out.write(f"[{index}] {line}" if line.endswith("\n") else f"[{index}] {line}\n")
            out.flush()


def free_port() -> int:
    """A TCP port that nobody uses, and that no outgoing connection will be given."""
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError(f"No port from {PORTS[0]} to {PORTS[-1]} is free on this machine.")
