"""The connections that stay open between the processes of a job: who ends, tells the others."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxformer.processes.place import Place

LOST = 1
"""Exit code of a process that ends because another one did."""


class Line:
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
                send(peer, {"lost": words})

    def say_goodbye(self) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                send(peer, {"goodbye": True})

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


def send(peer: socket.socket, message: Mapping[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def read_line(peer: socket.socket) -> bytes:
    """Up to the newline and no byte further: what follows is for `Line`."""
    read = bytearray()
    while not read.endswith(b"\n"):
        if not (byte := peer.recv(1)):
            raise OSError("closed")
        read += byte
    return bytes(read)
