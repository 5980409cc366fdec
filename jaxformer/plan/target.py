"""Which hardware a plan is for: v5p:2x2x4, 16*v5e:16x16, h100:32x8."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError
from jaxformer.hardware import CHIPS, Chip

EXTRAS = {"tpu": ("aot-tpu", "libtpu"), "cuda": ("aot-gpu", "jax_plugins.xla_cuda13")}
"""The optional dependency that compiles for a platform, and the module that it brings."""

HERE = Chip("cpu:8", 1e11, 16e9, 30e9, 3e9, 10e9, 1e9)
"""The CPU of this machine as so many devices, with round figures: to rehearse the plan itself."""

FORM = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<chip>\w+):(?P<layout>\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Target:
    """Slices of chips in a torus, or hosts of GPUs."""

    name: str
    chip: Chip
    platform: str
    """tpu | cuda | cpu"""
    layout: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """How many JAX devices."""
        return self.slices * math.prod(self.layout) * self.chip.devices

    @property
    def chips(self) -> int:
        """How many of what the maker sells as one."""
        return self.slices * math.prod(self.layout)


def parse(text: str) -> Target:
    """A target from its name.

    Raises:
      UserError: an unknown chip or form, with examples of what is right; or the optional dependency
        that compiles for it is not installed, with the command that installs it.
    """
    known = ", ".join([*CHIPS, "cpu"])
    match = FORM.fullmatch(text)
    if match is None or match["chip"] not in (*CHIPS, "cpu"):
        raise UserError(
            f"--topology {text} is not known; write CHIP:LAYOUT with CHIP one of {known}, such as "
            "v5p:2x2x4, v5e:16x16, 16*v5e:16x16 (16 slices) or h100:4x8 (4 hosts of 8)."
        )
    name, slices = match["chip"], int(match["slices"] or 1)
    layout = tuple(int(n) for n in match["layout"].split("x"))
    platform = {"h100": "cuda", "cpu": "cpu"}.get(name, "tpu")
    wanted = {"v5e": 2, "v6e": 2, "cuda": 2, "cpu": 1}
    axes = wanted.get(name, wanted.get(platform, 3))
    if len(layout) != axes or 0 in layout or (platform != "tpu" and slices > 1):
        examples = {1: "cpu:8", 2: f"{name}:4x8", 3: f"{name}:2x2x4"}
        raise UserError(
            f"--topology {text} does not describe a layout of {name}; write it as {examples[axes]}."
        )
    if platform in EXTRAS:
        extra, module = EXTRAS[platform]
        if not _installed(module):
            raise UserError(
                f"--topology {text} needs the compiler of that hardware: pip install "
                f"'jaxformer[{extra}]' brings it (no accelerator is needed)."
            )
    return Target(text, CHIPS.get(name, HERE), platform, layout, slices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def describe(target: Target) -> Sequence[Any]:
    """The devices of a target, as the compiler sees them. Only a process of its own calls this."""
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        return jax.devices()[: target.devices]
    if target.platform == "cuda":
        text = (Path(__file__).parent / "h100.txt").read_text(encoding="utf-8")
        layout = f"1x{target.layout[0]}x{target.layout[1]}"
        description = topologies.get_topology_desc(
            "", platform="cuda", topology=layout, target_config=text
        )
        return description.devices
    slices = {"num_slices": target.slices} if target.slices > 1 else {}
    name = target.name.split("*")[-1]
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices


def places(target: Target, devices: Sequence[Any]) -> list[tuple[int, ...]]:
    """Where each device stands: its slice (or host), then its coordinates in the torus.

    Two devices of one chip stand at one place: what they send each other leaves no chip.
    """
    if target.platform == "tpu":
        return [(getattr(d, "slice_index", None) or 0, *d.coords) for d in devices]
    per_host = target.layout[-1]
    return [(i // per_host, i % per_host) for i in range(len(devices))]
