"""The roll call: every process names itself, and process 0 names the absent and the different."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from jaxformer.errors import UserError
from jaxformer.processes.line import read_line, send
from jaxformer.processes.place import Place

RETRY = 0.2  # seconds between two attempts to reach the coordinator

Prints = Mapping[str, str]
"""What must be equal on all processes: {"config.model.d_ff": "2048", "the code": "1f0c..."}."""


def call_roll(
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
                there = json.loads(read_line(peer))
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
            send(peer, {"trouble": trouble, "hosts": hosts})
            peer.settimeout(None)
    if trouble:
        raise UserError(trouble)
    return peers, hosts


def answer_roll(
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
        send(line, _introduction(place, prints))
        line.settimeout(max(deadline - time.monotonic(), 0) + 15)
        answer = json.loads(read_line(line))
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
