"""`jaxformer plan`: what a training step takes on hardware that is not here, on one page."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jaxformer import sharding
from jaxformer.command_line import load_config
from jaxformer.config import Config, MeshConfig
from jaxformer.errors import UserError
from jaxformer.plan import search
from jaxformer.plan.estimate import Estimate, estimate
from jaxformer.plan.target import Target, parse
from jaxformer.plan.worker import Compiled, compile_step, source_length


def plan(arguments: Namespace, overrides: Sequence[str], console: Console | None = None) -> bool:
    """Compiles the step and prints the page.

    Returns:
      Whether the step fits into memory, as it is.

    Raises:
      UserError: a topology, mesh or config that cannot be, or a compiler that is not installed.
    """
    console = console or Console(soft_wrap=not sys.stdout.isatty())
    target = parse(arguments.topology)
    config = load(arguments.config, overrides)
    if arguments.mesh is not None:
        config = dataclasses.replace(config, mesh=mesh_of(arguments.mesh))
    shape = sharding.mesh_shape(config.mesh, target.devices)
    sharding.check_mesh(config, shape, config.data.vocab_size, source_length(config))
    with console.status(f"compiling the step for {target.name}, {target.devices} devices") as line:
        compiled = compile_step(config, target, arguments.limit)
        told = estimate(compiled, config, target)
        best: search.Tried | None = None
        tried: list[search.Tried] = []
        if not search.fits(compiled, target):
            best, tried = search.cheapest(config, target, shape, arguments.limit, line.update)
    _heading(console, config, target, compiled)
    console.print(_memory(compiled, target))
    if compiled.compiled:
        _times(console, config, target, compiled, told)
    _verdict(console, config, target, compiled, best, tried)
    return search.fits(compiled, target)


def load(config: str, overrides: Sequence[str]) -> Config:
    """The config of a file and preset, `configs/wmt.py:big`, with `--config.FIELD=VALUE` flags.

    Raises:
      UserError: a file, preset or field that is not there.
    """
    unknown = [flag for flag in overrides if not flag.startswith("--config.")]
    if unknown:
        raise UserError(f"{unknown[0]} is not known to jaxformer plan; see jaxformer plan --help.")
    return Config.of(load_config(config, overrides))


def mesh_of(text: str) -> MeshConfig:
    """data=2,fsdp=8: axes that are not named have size 1.

    Raises:
      UserError: an axis or a size that cannot be.
    """
    sizes = dict.fromkeys(sharding.AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not (size == "-1" or (size.isdigit() and int(size) > 0)):
            raise UserError(
                f"--mesh {text}: {part!r} is no axis and size; write such as data=2,fsdp=8, with "
                f"the axes {', '.join(sharding.AXES)} and -1 for all devices that are left."
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"--mesh {text}: only one axis can take all devices that are left (-1).")
    return MeshConfig(**sizes)


def _heading(console: Console, config: Config, target: Target, compiled: Compiled) -> None:
    data, model = config.data, config.model
    rows = data.tokens_per_batch // data.target_length
    guess = "" if data.source_length else " (config.data.source_length is open: taken as long)"
    console.print(
        f"{target.name}: {target.chips:,} chips, {target.devices:,} devices, mesh "
        f"{sharding.written(compiled.mesh)}\n"
        f"{rows:,} rows of {source_length(config)} source{guess} and {data.target_length} target "
        f"positions, vocabulary {data.vocab_size:,}, {model.dtype}; compiled in "
        f"{compiled.seconds:.0f} s",
        highlight=False,
    )


def _memory(compiled: Compiled, target: Target) -> Table:
    table = Table("per device", "bytes", "of its memory")
    table.columns[1].justify = table.columns[2].justify = "right"
    parts = {
        "parameters": compiled.parameters,
        "optimizer": compiled.optimizer,
        "batch": compiled.batch,
        "activations": compiled.activations,
    }
    if compiled.compiled:
        parts["temporaries"] = compiled.temporaries
    parts["in all"] = compiled.needed
    for name, size in parts.items():
        table.add_row(name, amount(size, "B"), f"{size / target.chip.memory:.1%}")
    table.add_row("its memory", amount(target.chip.memory, "B"), "")
    return table


def _times(
    console: Console, config: Config, target: Target, compiled: Compiled, told: Estimate
) -> None:
    table = Table("per device and step", "amount", "estimate, ms")
    table.columns[1].justify = table.columns[2].justify = "right"
    counts = compiled.counts
    table.add_row("matrix products", amount(counts.flops, "FLOP"), f"{1e3 * told.products:.2f}")
    table.add_row("memory traffic", amount(counts.bytes, "B"), f"{1e3 * told.memory:.2f}")
    table.add_row("operation after operation", "", f"{1e3 * told.chip:.2f}")
    for part in told.traffic:
        words = f"{part.kind}, {part.way}, {part.calls} calls"
        table.add_row(words, amount(part.bytes, "B"), f"{1e3 * part.seconds:.2f}")
    table.add_row("step, nothing overlapped", "", f"{1e3 * told.step:.2f}")
    table.add_row("step, all overlapped", "", f"{1e3 * told.overlapped:.2f}")
    console.print(table)
    rate = config.data.tokens_per_batch / told.step
    hours = config.train.steps * told.step / 3600
    console.print(
        f"estimate: {rate:,.0f} target positions/s, bound by {told.bound}; "
        f"{config.train.steps:,} steps in {hours:,.2f} hours, "
        f"{hours * target.chips:,.1f} chip-hours (nothing overlapped, every unit at its peak)",
        highlight=False,
    )


def _verdict(
    console: Console,
    config: Config,
    target: Target,
    compiled: Compiled,
    best: search.Tried | None,
    tried: list[search.Tried],
) -> None:
    memory = amount(target.chip.memory, "B")
    if search.fits(compiled, target):
        console.print(f"It fits: {amount(compiled.needed, 'B')} of {memory}.", highlight=False)
        return
    console.print(f"It does not fit: {amount(compiled.needed, 'B')} of {memory}.", highlight=False)
    for t in tried:
        words = "fits" if search.fits(t.compiled, target) else "does not fit"
        time = f", {1e3 * t.estimate.step:.2f} ms a step (estimate)" if t.compiled.compiled else ""
        console.print(
            f"  {t.change.flags}: {words}, {amount(t.compiled.needed, 'B')}{time}", highlight=False
        )
    if best is not None:
        console.print(f"The cheapest change that fits: {best.change.flags}", highlight=False)
    else:
        console.print("No change that was tried fits; take more devices or a smaller batch.")


def amount(number: float, unit: str) -> str:
    """1.23 GB: a number with a prefix, in powers of a thousand."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}{unit}"
