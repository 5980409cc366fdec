"""The paper's base and big on 8, 256 and 4,096 chips: the table of docs/scaling.md.

    nice python benchmarks/scaling.py [--chips v5p h100] [--workers 4]

Every line is a step compiled ahead of time (`jaxformer plan`); all times are estimates.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from configs import wmt
from jaxformer.config import Config
from jaxformer.errors import UserError
from jaxformer.plan.command import amount
from jaxformer.plan.estimate import estimate
from jaxformer.plan.target import parse
from jaxformer.plan.worker import compile_step

SIZES = {
    "v5e": ("v5e:2x4", "v5e:16x16", "16*v5e:16x16"),
    "v5p": ("v5p:2x2x2", "v5p:8x8x4", "v5p:16x16x16"),
    "v6e": ("v6e:2x4", "v6e:16x16", "16*v6e:16x16"),
    "tpu7x": ("tpu7x:2x2x2", "tpu7x:8x8x4", "tpu7x:16x16x16"),
    "h100": ("h100:1x8", "h100:32x8", "h100:512x8"),
}
ROWS = (96, 1024, 8192)
"""Rows of 256 positions in a batch, for each size: 8 chips take the paper's 25,000 tokens."""


def line(job: tuple[str, str, int]) -> str:
    """One line of the table."""
    preset, topology, rows = job
    values = wmt.get_config(preset)
    values.model.dtype = "bfloat16"
    values.data.tokens_per_batch = rows * values.data.target_length
    config, target = Config.of(values), parse(topology)
    try:
        compiled = compile_step(config, target, 1800)
    except UserError as error:
        return f"| {preset} | `{topology}` | {error} |"
    told = estimate(compiled, config, target)
    sent = sum(part.bytes for part in told.traffic)
    tokens = config.data.tokens_per_batch
    cells = (
        preset,
        f"`{topology}`",
        f"{tokens:,}",
        f"{amount(compiled.needed, 'B')} ({compiled.needed / target.chip.memory:.0%})",
        f"{1e3 * told.products:.2f}",
        f"{1e3 * told.chip:.2f}",
        f"{amount(sent, 'B')}, {1e3 * told.links:.2f}",
        f"{1e3 * told.overlapped:.2f} to {1e3 * told.step:.2f}",
        f"{tokens / told.step / 1e6:.2f} M",
        told.bound,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table as it fills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--workers", type=int, default=2, help="compilations at a time")
    arguments = parser.parse_args()
    jobs = [
        (preset, topology, rows)
        for chip in arguments.chips
        for preset in ("base", "big")
        for topology, rows in zip(SIZES[chip], ROWS, strict=True)
    ]
    heads = (
        "model", "topology", "tokens a step", "memory a device", "products, ms", "chip, ms",
        "links", "step, ms", "tokens/s", "bound",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with ThreadPoolExecutor(arguments.workers) as pool:
        for text in pool.map(line, jobs):
            print(text, flush=True)


if __name__ == "__main__":
    main()
