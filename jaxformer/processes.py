"""One job, many processes: how they find each other, and what they say when one is missing.

The engine is `jax.distributed`. It aborts a process that waits for another in vain, and does not say
for whom, so the processes first call the roll on the coordinator's port: each names itself and what
it is about to run, and process 0 names the absent and the different. The connections stay open, so
that every process learns at once when another ends; a host that falls silent without closing its
connections is what the engine's heartbeats are for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed

from jaxformer.errors import EXIT_CODE, UserError

LOST = 1
"""Exit code of a process that ends because another one did."""

SETTLE = 2.0  # seconds in which the line tells who is gone, before an error counts as one's own
RETRY = 0.2  # seconds between two attempts to reach the coordinator
POLL_MS = 5000

Prints = Mapping[str, str]
"""What must be equal on all processes: {"config.model.d_ff": "2048", "the code": "1f0c..."}."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, and where process 0 listens ("host:port")."""

    coordinator: str
    count: int
    index: int


def find_place(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
    """The place that the flags name, or else the scheduler; None for a process on its own.

    SLURM, Open MPI, Kubernetes (Job and JobSet) and TPU pods are recognised by JAX's own detection.
    This asks no backend.

    Raises:
      UserError: some of the flags are given and others not, or they contradict each other.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _detected()
    if coordinator is None or count is None or index is None:
        raise UserError(
            f"{' and '.join(missing)} must be given too, or none of {', '.join(given)}."
        )
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be from 0 to {count - 1} (--processes - 1).")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={coordinator} must be the host and port of process 0.")
    return Place(coordinator, count, index) if count > 1 else None


def _detected() -> Place | None:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], None, 60)
    address, count, index, _ = found
    return Place(address, count, index) if address and index is not None and count > 1 else None


@contextlib.contextmanager
def joined(
    place: Place | None, prints: Prints, join_seconds: float, lost_seconds: int
) -> Iterator[None]:
    """Runs the block as one process of the job; with no place, as the only one.

    Where one process fails or is lost, all end: the block is left by `os._exit`, because nobody
    would answer at the engine's own farewell.

    Args:
      place: of this process.
      prints: compared before anything else happens.
      join_seconds: by then all must be there.
      lost_seconds: a host that has been silent for so long counts as dead.

    Raises:
      UserError: a process is absent or runs something else.
    """
    global _line
    if place is None:
        yield
        return
    deadline = time.monotonic() + join_seconds
    call = _call_roll if place.index == 0 else _answer_roll
    _line = _Line(place, *call(place, prints, deadline, join_seconds))
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            initialization_timeout=max(round(deadline - time.monotonic()), 10),
            heartbeat_timeout_seconds=lost_seconds,
        )
        yield
        leave()
    except UserError as error:
        _end(EXIT_CODE, f"error: {error}", str(error))
    except BaseException as error:
        said = traceback.format_exc()
        time.sleep(SETTLE)
        _end(LOST, said, f"{type(error).__name__}: {error}".splitlines()[0])


def index() -> int:
    """The number of this process; 0 is the one that writes."""
    return 0 if _line is None else _line.place.index


def count() -> int:
    """How many processes there are."""
    return 1 if _line is None else _line.place.count


def shared(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0 (JSON), on every process; only process 0 calls it.

    All processes must call this the same number of times in the same order.
    """
    if _line is None:
        return make()
    key = f"jaxformer/shared/{next(_line.calls)}"
    client = distributed.global_state.client
    assert client is not None
    if index() == 0:
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    while True:  # process 0 may be at work for hours; if it dies, the line says so
        try:
            return json.loads(client.blocking_key_value_get(key, POLL_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def check_same(name: str, value: str) -> None:
    """Refuses to go on where a process has another value than process 0.

    Raises:
      UserError: on the processes that differ; it names them, and ends all others too.
    """
    wanted = shared(lambda: value)
    if value != wanted:
        assert _line is not None
        raise UserError(
            f"{_line.name(index())} has other {name} than process 0 ({value[:12]}, not "
            f"{wanted[:12]}); give all of them the same."
        )


def leave() -> None:
    """Ends the common part of the job: waits for all, then each is on its own."""
    global _line
    if _line is not None:
        line, _line = _line, None
        line.say_goodbye()
        jax.distributed.shutdown()
        line.close()


class _Line:
    """The open connections: from process 0 to each other process."""

    def __init__(self, place: Place, peers: dict[int, socket.socket], hosts: Sequence[str]):
        self.place, self.peers, self.hosts = place, peers, hosts
        self.calls = itertools.count()
        self.gone: set[int] = set()  # who has said goodbye
        self._ends = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._thread.start()

    def name(self, process: int) -> str:
        return f"Process {process} ({self.hosts[process]})"

    def tell(self, words: str) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"lost": words})

    def say_goodbye(self) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"goodbye": True})

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()

    def end(self, code: int, said: str, told: str) -> NoReturn:
        """Tells the others why, and ends this process."""
        with self._ends:  # the first to get here speaks
            self.tell(told)
            sys.stdout.flush()
            print(said, file=sys.stderr, flush=True)
            os._exit(code)

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        for process, peer in self.peers.items():
            selector.register(peer, selectors.EVENT_READ, (process, peer.makefile("r")))
        while selector.get_map():
            for key, _ in selector.select():
                process, lines = key.data
                try:
                    words = lines.readline()
                except (OSError, ValueError):
                    words = ""
                message = json.loads(words) if words.endswith("\n") else {}
                if "goodbye" in message:
                    self.gone.add(process)
                elif "lost" in message:
                    self.end(LOST, f"error: {message['lost']}", message["lost"])
                elif process in self.gone:
                    selector.unregister(key.fileobj)
                else:
                    told = f"{self.name(process)} has ended before its time; see its log."
                    self.end(LOST, f"error: {told}", told)


_line: _Line | None = None


def _end(code: int, said: str, reason: str) -> NoReturn:
    if _line is None:  # all have left: no one waits
        print(said, file=sys.stderr, flush=True)
        os._exit(code)
    _line.end(code, said, f"{_line.name(index())} has failed: {reason}")


def _call_roll(
    place: Place, prints: Prints, deadline: float, seconds: float
) -> tuple[dict[int, socket.socket], list[str]]:
    """Process 0: hears all others, and tells them who is there, or why it cannot begin."""
    peers: dict[int, socket.socket] = {}
    heard: dict[int, dict[str, Any]] = {0: _introduction(place, prints)}
    trouble = ""
    with _server(place.coordinator) as server:
        while len(heard) < place.count and not trouble:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer, address = server.accept()
            except TimeoutError:
                trouble = _absence(place, heard, seconds)
                break
            try:
                peer.settimeout(min(max(deadline - time.monotonic(), 0.1), 10))
                there = json.loads(_read_line(peer))
                process = int(there["process"])
                where = str(there["host"])
            except (OSError, ValueError, LookupError, TypeError):
                peer.close()  # no process of ours
                continue
            if process in heard:
                trouble = (
                    f"Two processes call themselves process {process}, on {heard[process]['host']} "
                    f"and {where} ({address[0]}); give each its own --process_id."
                )
            heard.setdefault(process, there)
            peers.setdefault(process, peer)
    trouble = trouble or _difference(heard)
    hosts = [str(heard[process]["host"]) for process in sorted(heard)]
    for peer in peers.values():
        with contextlib.suppress(OSError):
            _send(peer, {"trouble": trouble, "hosts": hosts})
            peer.settimeout(None)
    if trouble:
        raise UserError(trouble)
    return peers, hosts


def _answer_roll(
    place: Place, prints: Prints, deadline: float, seconds: float
) -> tuple[dict[int, socket.socket], list[str]]:
    """Any other process: calls process 0 until it answers."""
    here = f"Process {place.index} ({socket.gethostname()})"
    host, _, port = place.coordinator.rpartition(":")
    while True:
        try:
            line = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{here} cannot reach process 0 at {place.coordinator} within {seconds:g} s "
                    f"({error.strerror or error}): it has not started, has given up, or the port "
                    "is closed."
                ) from error
            time.sleep(RETRY)
    try:
        _send(line, _introduction(place, prints))
        line.settimeout(max(deadline - time.monotonic(), 0) + 15)
        answer = json.loads(_read_line(line))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{here} has heard nothing from process 0 at {place.coordinator}; see the log of "
            "process 0."
        ) from error
    line.settimeout(None)
    if answer["trouble"]:
        raise UserError(answer["trouble"])
    return {0: line}, answer["hosts"]


def _introduction(place: Place, prints: Prints) -> dict[str, Any]:
    host = f"{socket.gethostname()}, pid {os.getpid()}"
    equal = {"--processes": str(place.count), **prints}
    return {"process": place.index, "host": host, "prints": equal}


def _absence(place: Place, heard: Mapping[int, Any], seconds: float) -> str:
    absent = [str(process) for process in range(place.count) if process not in heard]
    shown = ", ".join(absent[:20]) + (", ..." if len(absent) > 20 else "")
    there = ", ".join(sorted({str(heard[process]["host"]).split(",")[0] for process in heard}))
    return (
        f"{len(absent)} of {place.count} processes did not come to {place.coordinator} within "
        f"{seconds:g} s: process {shown} absent (those that came are on {there}). Start them, or "
        "raise --join_seconds."
    )


def _difference(heard: Mapping[int, dict[str, Any]]) -> str:
    """One sentence on the first process that would run something else; "" if all are equal."""
    wanted = heard[0]["prints"]
    for process in sorted(heard):
        there = heard[process]["prints"]
        for name in {**wanted, **there}:
            if there.get(name) != wanted.get(name):
                return (
                    f"Process {process} ({heard[process]['host']}) has {name} = "
                    f"{there.get(name, 'nothing')}, process 0 has {wanted.get(name, 'nothing')}; "
                    "start all with the same command and the same code."
                )
    return ""


def _server(coordinator: str) -> socket.socket:
    port = int(coordinator.rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen on port {port} ({error.strerror}); choose another port in "
            "--coordinator, or JAX_COORDINATOR_PORT under a scheduler."
        ) from error


def _send(peer: socket.socket, message: Mapping[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _read_line(peer: socket.socket) -> bytes:
    """Up to the newline and no byte further: what follows is for `_Line`."""
    read = bytearray()
    while not read.endswith(b"\n"):
        if not (byte := peer.recv(1)):
            raise OSError("closed")
        read += byte
    return bytes(read)
