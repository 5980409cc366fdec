"""What a compiled program does, counted in its text: products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once and knows no links. Here a loop counts as
often as it runs, and a step has loops over layers, micro-batches and chunks of the loss.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from jaxformer.plan.hlo_text import (
    Instruction,
    attribute,
    called_by,
    dimensions_of,
    group_of,
    parse,
    shape_of,
    size,
)

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all",
    "partition-id", "replica-id", "opt-barrier", "domain", "token", "send", "recv",
}  # fmt: skip
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """Devices that exchange data, `times` in a step."""

    kind: str
    sent: float
    """Bytes that one device sends each time, round a ring."""
    group: tuple[int, ...]
    """One group of devices that do it together."""
    shape: str
    times: int
    beyond: bool = False
    """Whether it goes over the network between slices, by the runtime of the hosts."""


@dataclasses.dataclass
class Counts:
    """Of one device, in one step."""

    flops: float = 0.0
    """Of matrix products and convolutions; opaque kernels count as their full picture."""
    bytes: float = 0.0
    """Between memory and chip, if no operation finds its input on the chip already."""
    roof: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """(flops, bytes) of each operation: what it takes at least is the slower of both."""
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def add(self, other: Counts, times: int = 1) -> None:
        """Adds `other`, done `times`."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.roof += [(times * flops, times * moved) for flops, moved in other.roof]
        self.collectives += [
            dataclasses.replace(c, times=times * c.times) for c in other.collectives
        ]


def count(text: str) -> Counts:
    """The counts of a compiled program's `as_text()`."""
    computations, entry = parse(text)
    return _Counter(computations).computation(entry)


def operations(text: str) -> list[tuple[Instruction, Counts, int]]:
    """What a program runs, one after the other: (operation, what it does, times)."""
    computations, entry = parse(text)
    counter = _Counter(computations)

    def within(name: str, times: int) -> list[tuple[Instruction, Counts, int]]:
        found = []
        for i in computations[name].values():
            called = [n for n in called_by(i) if n in computations]
            if i.opcode == "while":
                found += within(attribute(i, "body"), times * counter.trips(i))
            elif i.opcode in ("call", "async-start", "conditional"):
                found += [one for n in called for one in within(n, times)]
            elif i.opcode not in FREE:
                found.append((i, counter.instruction(i, computations[name])[0], times))
        return found

    return within(entry, 1)


class _Counter:
    def __init__(self, computations: dict[str, dict[str, Instruction]]):
        self.computations = computations
        self.known: dict[str, Counts] = {}

    def computation(self, name: str) -> Counts:
        if name not in self.known:
            counts = Counts()
            for instruction in self.computations[name].values():
                counts.add(*self.instruction(instruction, self.computations[name]))
            self.known[name] = counts
        return self.known[name]

    def instruction(self, i: Instruction, body: dict[str, Instruction]) -> tuple[Counts, int]:
        kind = i.opcode.removesuffix("-start")
        called = [n for n in called_by(i) if n in self.computations]
        if i.opcode == "while":
            trips = self.trips(i)
            return self.computation(attribute(i, "body")), trips
        if i.opcode == "conditional":
            branches = [self.computation(n) for n in called]
            return max(branches, key=lambda c: (c.bytes, c.flops)), 1
        if kind in ("call", "async"):  # tpu7x calls collectives on its sparse cores
            total = Counts()
            for name in called:
                total.add(self.computation(name))
            return total, 1
        if kind in COLLECTIVES:
            return self.collective(i, kind, body), 1
        if i.opcode == "send" and "megascale" in i.rest:
            return self.between_slices(i, body), 1
        if i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
            return Counts(), 1
        flops = self.flops(i, body)
        moved = self.moved(i, body)
        counts = Counts(flops, moved, [(flops, moved)])
        if i.opcode == "fusion":  # some compilers fuse collectives with what they overlap
            inner = self.computations[attribute(i, "calls")]
            for j in inner.values():
                if (within := j.opcode.removesuffix("-start")) in COLLECTIVES:
                    counts.add(self.collective(j, within, inner))
        return counts, 1

    def flops(self, i: Instruction, body: dict[str, Instruction]) -> float:
        if i.opcode == "fusion":
            inner = self.computations[attribute(i, "calls")]
            return sum(self.flops(j, inner) for j in inner.values())
        shapes = [shape_of(body[name].result) for name in i.operands if name in body]
        if i.opcode == "dot":
            contracted = dimensions_of(i.rest, "lhs_contracting_dims")
            depth = math.prod(shapes[0][axis] for axis in contracted)
            return 2.0 * math.prod(shape_of(i.result)) * depth
        if i.opcode == "convolution":
            return _convolution_flops(i, shapes)
        if i.opcode == "custom-call":
            return _kernel_flops(i, shapes)
        return 0.0

    def moved(self, i: Instruction, body: dict[str, Instruction]) -> float:
        """Bytes read and written, where slices of a larger array count as what is taken."""
        if i.opcode.endswith("-start"):  # a copy between memory and chip, one way
            return size(body[i.operands[0]].result, in_memory=False) if i.operands else 0.0
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * size(i.result)
        if i.opcode == "dynamic-update-slice":
            return 2 * size(body[i.operands[1]].result)
        results = size(i.result)
        operands = [size(body[name].result) for name in i.operands if name in body]
        if i.opcode == "fusion":
            inner = self.computations[attribute(i, "calls")]
            operands = [_read(inner, number, whole) for number, whole in enumerate(operands)]
            results = min(results, _written(inner, results))
        return results + sum(operands)

    def collective(self, i: Instruction, kind: str, body: dict[str, Instruction]) -> Counts:
        group = group_of(i.rest)
        n = max(len(group), 1)
        whole = sum(size(body[name].result, False) for name in i.operands if name in body)
        others = (n - 1) / n
        sent = {
            "all-gather": whole * (n - 1),
            "all-reduce": 2 * whole * others,
            "reduce-scatter": whole * others,
            "all-to-all": whole * others,
        }.get(kind, whole)
        one = Collective(kind, sent, group, i.result, 1)
        alone = n == 1 and kind != "collective-permute"
        return Counts(collectives=[] if alone else [one])

    def between_slices(self, i: Instruction, body: dict[str, Instruction]) -> Counts:
        """What the hosts of several TPU slices exchange: a send to them and a receive."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
        name = kind[1].lower().replace("_", "-") if kind else "send"
        target = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', i.rest)
        n = sum(
            1 if ":" not in part else int(part.split(":")[1]) - int(part.split(":")[0]) + 1
            for part in (target[1].split(",") if target else "12")
        )
        sent = size(body[i.operands[0]].result, False) * (n - 1) / n
        sent *= {"all-reduce": 2, "all-gather": n}.get(name, 1)
        return Counts(collectives=[Collective(name, sent, tuple(range(n)), i.result, 1, True)])

    def trips(self, i: Instruction) -> int:
        """How often a loop runs; 1 for one whose end depends on data."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest):
            return int(known[1])
        condition = self.computations[attribute(i, "condition")]
        compare = [j for j in condition.values() if j.opcode == "compare"]
        ends = [condition[n] for j in compare for n in j.operands if n in condition]
        numbers = [e.operands[0] for e in ends if e.opcode == "constant"]
        return int(numbers[0]) if len(numbers) == 1 and numbers[0].isdigit() else 1


def _convolution_flops(i: Instruction, shapes: Sequence[tuple[int, ...]]) -> float:
    """2 x outputs x inputs that meet; TPU writes every product of matrices as a convolution."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None
    left, right, out = labels.groups()
    window = dict(
        re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", i.rest) or [""] * 2)[1])
    )
    result = shape_of(i.result)
    pairs = float(result[out.index("b")] * result[out.index("f")] * shapes[1][right.index("i")])

    def along(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    for axis in range(len(out) - 2):
        digit = str(axis)
        low = int(along("pad", axis, "0_0").split("_")[0])
        at = (
            np.arange(result[out.index(digit)])[:, None] * int(along("stride", axis, "1"))
            + np.arange(shapes[1][right.index(digit)])[None] * int(along("rhs_dilate", axis, "1"))
            - low
        )
        dilation = int(along("lhs_dilate", axis, "1"))
        last = (shapes[0][left.index(digit)] - 1) * dilation
        pairs *= int(((at >= 0) & (at <= last) & (at % dilation == 0)).sum())
    return 2.0 * pairs


PRODUCTS = {"forward": 2, "queries": 3, "keys": 4, "backward": 5}
"""Of a T x S picture, by the last part of the name of a kernel."""


def _kernel_flops(i: Instruction, shapes: Sequence[tuple[int, ...]]) -> float:
    """Flash attention over its full picture (what a mask skips counts); products by libraries."""
    kernel = re.search(r"flash_attention_?(\w*)", i.rest) or re.search("flash_attention()", i.name)
    if kernel:
        products = PRODUCTS.get(kernel[1], 2)
        if "mosaic_gpu" in i.rest:
            (B, T, H, K), (_, S, _, _) = shapes[:2]
            return 2.0 * products * B * H * T * S * K
        flat = [shape for shape in shapes if len(shape) == 3]
        if len(flat) > 2:  # ours for TPU: operands in the order of their names, k to q and v
            (_, S, _), (B, T, D) = flat[0], flat[-2]
            return 2.0 * products * B * T * S * D
        (B, H, T, K), (_, _, S, _) = [shape for shape in shapes if len(shape) == 4][:2]
        return 2.0 * products * B * H * T * S * K  # that of JAX, heads first
    if re.search(r'custom_call_target="[^"]*(?:gemm|matmul|dot)', i.rest) and len(shapes) > 1:
        depth = set(shapes[0]) & set(shapes[1])
        return 2.0 * math.prod(shape_of(i.result)) * max(depth, default=1)
    return 0.0


def _users(inner: dict[str, Instruction], name: str) -> list[Instruction]:
    """Who uses a value of a fusion, seen through what only renames it."""
    found = []
    for j in inner.values():
        if name in j.operands:
            found += _users(inner, j.name) if j.opcode == "bitcast" else [j]
    return found


def _read(inner: dict[str, Instruction], number: int, whole: float) -> float:
    """What a fusion reads of its operand `number`, of `whole` bytes."""
    name = next(
        (
            j.name
            for j in inner.values()
            if j.opcode == "parameter" and j.operands == (str(number),)
        ),
        None,
    )
    users = _users(inner, name) if name else []
    if users and all(j.opcode in ("dynamic-slice", "slice", "gather") for j in users):
        return min(whole, sum(size(j.result) for j in users))
    if users and all(j.opcode == "dynamic-update-slice" for j in users):
        return 0.0
    return whole


def _written(inner: dict[str, Instruction], whole: float) -> float:
    """What a fusion writes: of an array updated in place, the update."""
    updates = [j for j in inner.values() if j.opcode == "dynamic-update-slice"]
    saved = sum(size(j.result) - size(inner[j.operands[1]].result) for j in updates)
    return max(whole - max(saved, 0.0), 0.0)
