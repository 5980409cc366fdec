"""One job, many processes: how they find each other, and what they say when one is missing.

The engine is `jax.distributed`. It aborts a process that waits for another in vain, and does not
say for whom. So the processes first call the roll on the coordinator's port (`roll.py`), and keep
these connections (`line.py`): each learns at once when another ends. A host that falls silent
without closing its connections is what the engine's heartbeats are for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

from jaxformer.errors import EXIT_CODE, UserError
from jaxformer.processes.line import LOST, Line
from jaxformer.processes.place import Place, find_place
from jaxformer.processes.roll import Prints, answer_roll, call_roll

__all__ = [
    "Place",
    "check_same",
    "count",
    "find_place",
    "index",
    "joined",
    "leave",
    "shared",
    "wait_for_all",
]

SETTLE = 2.0  # seconds in which the line tells who is gone, before an error counts as one's own
POLL_MS = 5000
DAY_MS = 24 * 3600 * 1000


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
    call = call_roll if place.index == 0 else answer_roll
    _line = Line(place, *call(place, prints, deadline, join_seconds))
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


def wait_for_all(what: str) -> None:
    """Returns when every process has got here; if one dies on the way, the line says so."""
    if _line is not None:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"jaxformer/{what}/{next(_line.calls)}", DAY_MS)


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


_line: Line | None = None


def _end(code: int, said: str, reason: str) -> NoReturn:
    if _line is None:  # all have left: no one waits
        print(said, file=sys.stderr, flush=True)
        os._exit(code)
    _line.end(code, said, f"{_line.name(index())} has failed: {reason}")
