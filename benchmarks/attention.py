"""Attention on TPUs that are not here: our kernel beside JAX's flash attention and XLA's.

    python -m benchmarks.attention [--only v5e v6e] [--lengths 512 2048] [--sizes 128]

Every figure is an ESTIMATE: cycles by the compiler's static model, and no operation takes less time
than its bytes at the memory's bandwidth. Arrays are bfloat16, B 1, H 4, each library's in the order
of axes that it likes best. tpu7x takes the libtpu of JAX 0.12: that of 0.10.2 aborts. Results are
kept in benchmarks/results/attention.jsonl: what is known of this source and these versions is not
compiled again, so a run may be stopped and goes on later.
With `--short`, rows of a translation: B S = 16,384 tokens, H 8, D 64, and `dense` beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ahead import ROOT, TPUS, Case, measure
from jaxformer.errors import UserError
from jaxformer.hardware import CHIPS
from jaxformer.plan.target import parse

RESULTS = ROOT / "benchmarks/results/attention.jsonl"
LENGTHS = (512, 1024, 2048, 4096, 8192)
SHORT = (32, 64, 128, 256, 512, 1024)
SIZES = (128, 64)
MASKS = ("causal", "full")
TOKENS = 16384
SOURCES = {
    "ours": ("*tpu*.py", "platform.py", "sharded.py", "extras.py"),
    "dense": ("dense.py", "reference.py", "extras.py"),
}
FORM = 1
"""Of the records; a new number makes all of them old."""


def cases(
    chips: Iterable[str],
    lengths: Iterable[int],
    sizes: Iterable[int],
    masks: Iterable[str],
    short: bool,
) -> list[Case]:
    """The most telling ones first."""
    if short:
        shape = functools.partial(Case, D=64, H=8, G=8)
        return [
            shape(chip, kernel, S=S, B=TOKENS // S, backward=backward)
            for S in lengths
            for chip in chips
            for backward in (False, True)
            for kernel in ("ours", "dense", "xla")
        ]
    found = [
        Case(chip, kernel, S, D, causal, backward)
        for causal in (mask == "causal" for mask in masks)
        for D in sizes
        for S in lengths
        for backward in (False, True)
        for chip in chips
        for kernel in ("ours", "xla", "library")
    ]
    return sorted(found, key=lambda c: (not c.causal, (c.S, c.D) != (2048, 128)))


@functools.cache
def versions() -> str:
    """What compiles."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


@functools.cache
def fingerprint(kernel: str) -> str:
    """Changes with the source of a kernel and with what compiles it."""
    text = f"{FORM} {versions()}"
    for pattern in SOURCES.get(kernel, ()):
        for path in sorted((ROOT / "jaxformer/attention").glob(pattern)):
            text += path.name + path.read_text(encoding="utf-8")
    return f"{zlib.crc32(text.encode()):08x}"


def record(case: Case, limit: float) -> dict[str, Any]:
    """A case and what became of it, for a line of JSON."""
    result = measure(case, limit)
    told = {
        "case": dataclasses.asdict(case),
        "made_of": fingerprint(case.kernel),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "compile_seconds": round(result.seconds, 1),
    }
    if result.refused:
        return told | {"refused": result.refused}
    # Of some fusions with products the model has no cycles: then the sum is a lower bound.
    whole = all(cycles or not flops for _, cycles, flops, _ in result.operations)
    return told | {
        "cycles": round(result.cycles),
        "kernel_cycles": round(result.kernel_cycles),
        "microseconds": round(result.seconds_on(case.chip) * 1e6, 2),
        "at_least": not whole,
    }


def key(case: dict[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)


def known(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file that are still true, by their case."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {
        key(line["case"]): line
        for line in lines
        if line["made_of"] == fingerprint(line["case"]["kernel"])
    }


def fill(wanted: list[Case], path: Path, limit: float, workers: int) -> dict[str, dict[str, Any]]:
    """Compiles what is not known yet, and appends it to the file one by one."""
    found = known(path)
    missing = [case for case in wanted if key(dataclasses.asdict(case)) not in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(workers)
    try:
        todo = [pool.submit(record, case, limit) for case in missing]
        console = Console(stderr=True)
        for done in track(as_completed(todo), "Compiling", len(todo), console=console):
            line = done.result()
            found[key(line["case"])] = line
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped: the table shows what is known so far.")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def table(wanted: list[Case], found: dict[str, dict[str, Any]]) -> tuple[Table, list[str]]:
    """The estimates for people, and why some are missing."""
    kernels = list(dict.fromkeys(case.kernel for case in wanted))
    shown = Table(box=box.MARKDOWN, title=f"ESTIMATES ({versions()})")
    for name in ("chip", "S", "D", "mask", "pass"):
        shown.add_column(name)
    for name in kernels:
        shown.add_column(f"{name}: cycles, µs, share of peak", justify="right")
    for name in kernels[1:]:
        shown.add_column(f"µs, ours / {name}", justify="right")
    reasons: dict[str, None] = {}
    rows: dict[tuple, dict[str, Case]] = {}
    for case in wanted:
        row = (case.chip, case.S, case.D, case.causal, case.backward)
        rows.setdefault(row, {})[case.kernel] = case
    for (chip, S, D, causal, backward), row in rows.items():
        lines = {name: found.get(key(dataclasses.asdict(case))) for name, case in row.items()}
        if not any(lines.values()):
            continue
        cells, times = [], {}
        for name, line in lines.items():
            if line is None:
                cells.append("")
            elif "refused" in line:
                cells.append("aborts")
                reasons[f"{name} on {chip}: {line['refused'][:300]}"] = None
            else:
                times[name] = line["microseconds"]
                share = row[name].flops / (times[name] / 1e6) / CHIPS[chip].bf16_flops
                least = "≥ " if line["at_least"] else ""
                cells.append(f"{least}{line['cycles']:,}, {least}{times[name]:,.1f}, {share:.0%}")
        ratios = [
            f"{times['ours'] / times[name]:.2f}" if {"ours", name} <= set(times) else ""
            for name in kernels[1:]
        ]
        mask, way = ("causal" if causal else "full"), ("f+b" if backward else "forward")
        shown.add_row(chip, str(S), str(D), mask, way, *cells, *ratios)
    return shown, list(reasons)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TPUS, default=TPUS, help="generations")
    parser.add_argument("--lengths", type=int, nargs="+", help="S")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="D")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--short", action="store_true", help="rows of a translation instead")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one compilation")
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are kept")
    arguments = parser.parse_args()
    try:
        parse(CHIPS[arguments.only[0]].topology)
    except UserError as missing:
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    lengths = arguments.lengths or (SHORT if arguments.short else LENGTHS)
    wanted = cases(arguments.only, lengths, arguments.sizes, arguments.masks, arguments.short)
    found = fill(wanted, arguments.results, arguments.limit, arguments.workers)
    shown, reasons = table(wanted, found)
    console = Console(width=200)
    console.print(shown)
    for reason in reasons:
        console.print(f"{reason}", soft_wrap=True)


if __name__ == "__main__":
    main()
