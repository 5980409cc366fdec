"""The cheapest change that makes a step fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from jaxformer import sharding
from jaxformer.config import Config, MeshConfig
from jaxformer.plan.estimate import Estimate, estimate
from jaxformer.plan.target import Target
from jaxformer.plan.worker import Compiled, compile_step, source_length


@dataclasses.dataclass(frozen=True)
class Change:
    """Flags that change a config, and the config they make."""

    flags: str
    config: Config


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change, compiled."""

    change: Change
    compiled: Compiled
    estimate: Estimate


def fits(compiled: Compiled, target: Target) -> bool:
    """Whether all that a step needs is in the memory of a device.

    The compiler for TPU refuses what does not fit, and knows best how much there is.
    """
    judged = target.platform == "tpu" or compiled.needed <= target.chip.memory
    return compiled.compiled and judged


def changes(config: Config, shape: dict[str, int]) -> Iterator[Change]:
    """What may be changed with the same numbers coming out: single changes, then all together."""
    S = source_length(config)

    def legal(change: Change) -> bool:
        mesh = dataclasses.asdict(change.config.mesh)
        splits = sharding.splits(change.config, config.data.vocab_size, S)
        return sharding.broken(mesh, splits) is None

    singles = [_accumulated(config, 2), _accumulated(config, 4), _rematerialised(config)]
    singles += [_sharded(config, shape)]
    fixed = [c for c in singles if c is not None]
    together = config
    flags = []
    for part in (_sharded(config, shape), _rematerialised(config), _accumulated(config, 8)):
        if part is not None:
            flags.append(part.flags)
            together = _merged(together, part.config, config)
    for change in [*fixed, Change(" ".join(flags), together)]:
        at = dataclasses.replace(change.config.mesh, **_filled(change.config, shape))
        change = Change(change.flags, dataclasses.replace(change.config, mesh=at))
        if change.flags and legal(change):
            yield change


def cheapest(
    config: Config,
    target: Target,
    shape: dict[str, int],
    limit: float,
    say: Callable[[str], None],
) -> tuple[Tried | None, list[Tried]]:
    """The change that fits and costs the least estimated time; and all that were compiled."""
    tried: list[Tried] = []
    for change in changes(config, shape):
        alone = any(fits(t.compiled, target) for t in tried)
        if alone and change.flags.count("--") > 1:
            break  # no need for many changes where one is enough
        say(f"compiling with {change.flags}")
        compiled = compile_step(change.config, target, limit)
        tried.append(Tried(change, compiled, estimate(compiled, change.config, target)))
    good = [t for t in tried if fits(t.compiled, target)]
    return min(good, key=lambda t: t.estimate.step, default=None), tried


def _filled(config: Config, shape: dict[str, int]) -> dict[str, int]:
    mesh = dataclasses.asdict(config.mesh)
    return shape if -1 in mesh.values() else mesh


def _accumulated(config: Config, times: int) -> Change | None:
    k = config.optimizer.accumulate * times
    if config.data.tokens_per_batch // config.data.target_length % k:
        return None
    optimizer = dataclasses.replace(config.optimizer, accumulate=k)
    changed = dataclasses.replace(config, optimizer=optimizer)
    return Change(f"--config.optimizer.accumulate={k}", changed)


def _rematerialised(config: Config) -> Change | None:
    if config.model.remat:
        return None
    model = dataclasses.replace(config.model, remat=True)
    return Change("--config.model.remat=true", dataclasses.replace(config, model=model))


def _sharded(config: Config, shape: dict[str, int]) -> Change | None:
    """All rows over fsdp: parameters and optimizer in as many parts as there are rows' devices."""
    if shape["data"] == 1:
        return None
    whole = shape | {"data": 1, "fsdp": shape["data"] * shape["fsdp"]}
    changed = dataclasses.replace(config, mesh=MeshConfig(**whole))
    return Change(f"--mesh {sharding.written(whole)}", changed)


def _merged(config: Config, part: Config, original: Config) -> Config:
    """`config` with every section that `part` changed of `original`."""
    sections = {
        name: getattr(part, name)
        for name in ("model", "optimizer", "mesh")
        if getattr(part, name) != getattr(original, name)
    }
    return dataclasses.replace(config, **sections)
