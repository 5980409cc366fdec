"""From what a program does to the time that it takes at best on a chip. Estimates, all of it."""

from __future__ import annotations

import dataclasses

from jaxformer.config import Config
from jaxformer.plan.hlo import Collective
from jaxformer.plan.target import Target
from jaxformer.plan.worker import Compiled

FULL_PRECISION = 0.5
"""Share of the bfloat16 peak that float32 products reach on a GPU (TF32); TPUs round them."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends in a step with one kind of collective over one kind of way."""

    kind: str
    way: str
    bytes: float
    seconds: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, if every unit ran at its peak."""

    products: float
    """All matrix products at the peak of the chip."""
    memory: float
    """All traffic with memory at its bandwidth."""
    chip: float
    """Operation after operation, each the slower of its products and its traffic."""
    links: float
    """All collectives, one after the other."""
    traffic: list[Traffic]

    @property
    def step(self) -> float:
        """Nothing overlaps: the time of the chip and the time of the links."""
        return self.chip + self.links

    @property
    def overlapped(self) -> float:
        """Everything overlaps: the longer of the two."""
        return max(self.chip, self.links)

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        if self.links > self.chip:
            return "links"
        return "products" if self.products >= 0.5 * self.chip else "memory"


def estimate(compiled: Compiled, config: Config, target: Target) -> Estimate:
    """The roofline of a compiled step."""
    chip = target.chip
    exact = config.model.dtype == "float32" and target.platform == "cuda"
    peak = chip.bf16_flops * (FULL_PRECISION if exact else 1.0)
    counts = compiled.counts
    traffic = _traffic(counts.collectives, compiled.places, target)
    return Estimate(
        products=counts.flops / peak,
        memory=counts.bytes / chip.bandwidth,
        chip=sum(max(flops / peak, moved / chip.bandwidth) for flops, moved in counts.roof),
        links=sum(part.seconds for part in traffic),
        traffic=traffic,
    )


def _traffic(
    collectives: list[Collective], places: list[tuple[int, ...]], target: Target
) -> list[Traffic]:
    summed: dict[tuple[str, str], Traffic] = {}
    for c in collectives:
        way, rate = _way([] if c.beyond else [places[n] for n in c.group], target)
        sent = c.sent * c.times
        old = summed.get((c.kind, way), Traffic(c.kind, way, 0.0, 0.0, 0))
        summed[c.kind, way] = Traffic(
            c.kind, way, old.bytes + sent, old.seconds + sent / rate, old.calls + c.times
        )
    return sorted(summed.values(), key=lambda part: -part.seconds)


def _way(members: list[tuple[int, ...]], target: Target) -> tuple[str, float]:
    """What connects these devices, and the bytes a second that one of them sends over it.

    No members are all slices.
    """
    chip = target.chip
    varying = [len(set(numbers)) > 1 for numbers in zip(*members, strict=True)]
    if not members or varying[0]:
        return "network", chip.network
    if target.platform != "tpu":
        return "host", chip.link
    axes = sum(varying)  # cores of one chip stand at one place
    return f"{axes} torus axes" if axes > 1 else "1 torus axis", chip.link * max(axes, 1)
