"""Finds sizes for `jaxformer.attention.tpu_table` without a TPU: estimates, not measurements.

    python -m benchmarks.tune_tpu --generations v5e v6e --pass backward
    python -m benchmarks.tune_tpu --full               # without a causal mask
    python -m benchmarks.tune_tpu --sentence 30        # packed rows

The two cores of v5p share the blocks of heads: there must be two, or one core counts for both.

The compiler of libtpu (extra `aot-tpu`) tells the cycles of the kernel for each choice of tiles.
That of JAX 0.10.2 (0.0.42) cannot tell them for tpu7x; that of JAX 0.12 (0.0.50) can.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

from benchmarks.ahead import TPUS, Case, Result, measure
from jaxformer.attention.tpu_table import Tiles

SECONDS = 300
SHAPE = {"B": 1, "H": 4, "S": 2048, "D": 128}


def candidates(which: str, packed: bool) -> list[Tiles]:
    """Tiles worth compiling."""
    if packed:
        blocks = (1024, 2048) if which == "forward" else (1024, 1024)
        sizes = [(128, 128, 128), (128, 256, 128), (128, 256, 256), (256, 128, 128)]
        return [
            Tiles(n, m, *blocks, n, piece, heads, unit=32)
            for n, m, piece in sizes
            for heads in (4, 8)
        ]
    pieces = [(128, 128), (128, 256), (256, 128), (256, 256)]
    tiles = [(1024, 1024), (512, 512)]
    held = {"forward": lambda n, m: (n, 4096), "backward": lambda n, m: (4096, m)}[which]
    return [
        Tiles(n, m, *held(n, m), *piece, heads)
        for (n, m), piece, heads in itertools.product(tiles, pieces, (1, 2))
    ]


def kernel_cycles(result: Result, which: str) -> float:
    """Those of the kernel that is tuned, without the other pass and what stands around it."""
    return sum(
        cycles
        for name, cycles, *_ in result.operations
        if "flash" in name and ("backward" in name) == (which == "backward")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", nargs="+", choices=TPUS, default=TPUS)
    parser.add_argument("--pass", dest="which", choices=("forward", "backward"), default="forward")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--sentence", type=int, default=0, help="tokens: packed rows, pictured by a window"
    )
    parser.add_argument("--full", action="store_true", help="a full mask, not a causal one")
    parser.add_argument("--tiles", type=json.loads, action="append", help="only these, [n, m, ...]")
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in SHAPE}
    # The compiler cannot know segments: it would count every tile.
    mask = {"causal": not (options.full or options.sentence)}
    if options.sentence:
        mask["window"] = options.sentence // 2
    backward = options.which == "backward"
    for chip in options.generations:
        found: list[tuple[float, Tiles]] = []
        for tiles in options.tiles or candidates(options.which, bool(options.sentence)):
            case = Case(
                chip, "ours", **shape, **mask, G=options.H, backward=backward, tiles=tuple(tiles)
            )
            result = measure(case, SECONDS)
            if result.refused:
                print(chip, tiles, result.refused, file=sys.stderr)
                continue
            found.append((kernel_cycles(result, options.which), Tiles(*tiles)))
            print(f"{chip} {options.which} {found[-1][1]}: {found[-1][0]:,.0f}", flush=True)
        if found:
            print(f"{chip}: best {min(found)[1]}, {min(found)[0]:,.0f} cycles (estimate)")


if __name__ == "__main__":
    main()
