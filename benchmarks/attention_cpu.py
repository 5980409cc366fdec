"""Attention on the CPU: ours in blocks beside XLA's and PyTorch's flash kernel, interleaved.

    python benchmarks/attention_cpu.py [--lengths 512 2048] [--repeats 7] [--output FILE.jsonl]

Queries, keys and values are float32 [4, 8, S, 64] as PyTorch has them, [4, S, 8, 64] as JAX has
them. Each library runs in a process of its own; they take turns, one call each, so that what else
happens on the machine meets all of them. Times are medians; memory is how far the peak of the
process rises in one call. "padded" are rows of S, 3/4 S, 1/2 S and 1/4 S tokens. PyTorch is in the
extra `bench`; without it its columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

B, H, K = 4, 8, 64
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LIBRARIES = ("ours", "xla", "torch")
PICTURES = 4
"""At most so many [B, H, S, S] pictures does XLA hold at a time."""


class Worker:
    """One library in a process of its own."""

    def __init__(self, library: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> float:
        """What the process answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def stop(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(library: str) -> None:
    """Answers the questions on stdin: a case is prepared, then timed call by call."""
    call = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "prepare":
            call = None  # frees what the case before held
            call = prepare(library, question["S"], question["mask"], question["backward"])
            before = reset_peak()
            call()
            print((peak() - before) / 1024, flush=True)
        else:
            assert call is not None
            start = time.perf_counter()
            call()
            print((time.perf_counter() - start) * 1e3, flush=True)


def prepare(library: str, S: int, mask: str, backward: bool):
    """A call without arguments that returns when the result is there."""
    rng = np.random.default_rng(S)
    q, k, v, g = (rng.standard_normal((B, S, H, K), np.float32) for _ in range(4))
    lengths = S * np.arange(B, 0, -1) // B
    if library == "torch":
        return prepared_torch(q, k, v, g, mask, lengths, backward)
    import jax
    import jax.numpy as jnp

    from jaxformer.attention import Mask, attention

    segments = (np.arange(S)[None] < lengths[:, None]).astype(np.int32)

    def forward(q, k, v):
        causal = mask == "causal"
        if library == "xla":
            padding = None if causal else jnp.asarray(lengths, jnp.int32)
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=causal, query_seq_lengths=padding, key_value_seq_lengths=padding
            )
        segments_BS = None if causal else jnp.asarray(segments)
        return attention(q, k, v, Mask(segments_BS, segments_BS, causal=causal))

    def gradients(q, k, v, g):
        return jax.vjp(forward, q, k, v)[1](g)

    arguments = tuple(map(jnp.asarray, (q, k, v, g) if backward else (q, k, v)))
    compiled = jax.jit(gradients if backward else forward).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def prepared_torch(q, k, v, g, mask: str, lengths, backward: bool):
    """The same for PyTorch, heads first, as it wants them."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    q, k, v, g = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in (q, k, v, g))
    keys = torch.arange(q.shape[2])[None] < torch.from_numpy(lengths)[:, None]
    allowed = None if mask == "causal" else keys[:, None, None]
    for x in (q, k, v):
        x.requires_grad_(backward)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, is_causal=mask == "causal"
            )
            if backward:
                torch.autograd.grad(out, (q, k, v), g)

    return call


def reset_peak() -> int:
    """Makes the peak of this process what it holds now, and tells that, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The most that this process held since, in KiB."""
    return status("VmHWM")


def status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def measured(workers: dict[str, Worker], case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Milliseconds and MiB of each library in one case."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    picture = 4 * B * H * case["S"] ** 2
    fits = {"xla": picture * PICTURES < memory}
    result: dict[str, Any] = dict(case)
    taking_part = {name: w for name, w in workers.items() if fits.get(name, True)}
    for name, worker in taking_part.items():
        result[f"{name}_mib"] = round(worker.ask(do="prepare", **case), 1)
    times: dict[str, list[float]] = {name: [] for name in taking_part}
    for _ in range(repeats):
        for name, worker in taking_part.items():
            times[name].append(worker.ask(do="time"))
    for name, taken in times.items():
        result[f"{name}_ms"] = round(statistics.median(taken), 2)
    return result


def table(results: list[dict[str, Any]]) -> Table:
    """The results for people."""
    shown = Table(title=f"attention, float32 [{B}, {H}, S, {K}]: ms and MiB of one call")
    for name in ("mask", "S", "pass", *LIBRARIES, "ours / torch", "ours / xla"):
        shown.add_column(name, justify="left" if name in ("mask", "pass") else "right")
    for result in results:
        ours = result["ours_ms"]
        cells = [
            f"{result[f'{name}_ms']:,} ({result[f'{name}_mib']:,.0f})"
            if f"{name}_ms" in result
            else "-"
            for name in LIBRARIES
        ]
        ratios = [
            f"{ours / result[f'{name}_ms']:.2f}" if f"{name}_ms" in result else "-"
            for name in ("torch", "xla")
        ]
        way = "forward+backward" if result["backward"] else "forward"
        shown.add_row(result["mask"], str(result["S"]), way, *cells, *ratios)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="S of the rows")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each library")
    parser.add_argument("--output", type=Path, help="also writes the results there, as JSON lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    console = Console(width=120)
    there = [name for name in LIBRARIES if name != "torch" or importlib.util.find_spec("torch")]
    if "torch" not in there:
        console.print("PyTorch is not installed (pip install 'jaxformer[bench]'): not compared.")
    workers = {name: Worker(name) for name in there}
    cases = [
        {"mask": mask, "S": S, "backward": backward}
        for mask in ("causal", "padded")
        for backward in (False, True)
        for S in arguments.lengths
    ]
    results = []
    for case in track(cases, "Measuring", console=Console(stderr=True)):
        results.append(measured(workers, case, arguments.repeats))
        if arguments.output:
            lines = "".join(json.dumps(one) + "\n" for one in results)
            arguments.output.write_text(lines, encoding="utf-8")
    for worker in workers.values():
        worker.stop()
    console.print(table(results))
    if arguments.output:
        console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
