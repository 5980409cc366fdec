"""The text of a compiled program, read: computations, instructions, types, groups of devices."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """All computations, {name: {instruction name: instruction}}, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = "", {}
    for line in text.splitlines():
        if line.startswith(("  ", "\t")) and " = " in line:
            instruction = read(line.strip())
            body[instruction.name] = instruction
        elif header := HEADER.match(line):
            body = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    return computations, entry


def read(line: str) -> Instruction:
    """An instruction from its line; what a constant or a parameter holds is its operand."""
    name, _, line = line.removeprefix("ROOT ").partition(" = ")
    result, line = _balanced(line) if line.startswith("(") else line.split(" ", 1)
    opcode, _, line = line.strip().partition("(")
    arguments, rest = _balanced("(" + line)
    operands = tuple(NAME.findall(arguments))
    if opcode in ("parameter", "constant"):
        operands = (arguments[1:-1],)
    return Instruction(name.lstrip("%"), result, opcode, operands, rest)


def _balanced(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes its first one, and what follows."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""


def shape_of(result: str) -> tuple[int, ...]:
    """The dimensions of the first array of a type."""
    match = ARRAY.search(result)
    return tuple(int(n) for n in match[2].split(",") if n) if match else ()


def size(result: str, in_memory: bool = True) -> float:
    """Bytes of all arrays of a type; with `in_memory` without those that stay on the chip."""
    total = 0.0
    for kind, dimensions, layout in ARRAY.findall(result):
        on_chip = in_memory and re.search(r"S\([1-9]\)", layout)
        bits = BITS.get(kind) or int(re.sub(r"^\D+", "", kind.split("e")[0]) or 0)
        elements = math.prod(int(n) for n in dimensions.split(",") if n)
        total += 0 if on_chip else elements * bits / 8
    return total


def attribute(i: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", i.rest)
    return match[1] if match else ""


def called_by(i: Instruction) -> list[str]:
    attributes = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    names = re.findall(attributes, i.rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


def dimensions_of(rest: str, name: str) -> list[int]:
    match = re.search(rf"{name}=\{{([\d,]*)\}}", rest)
    return [int(n) for n in match[1].split(",") if n] if match else []


def group_of(rest: str) -> tuple[int, ...]:
    """The first of the groups of devices of a collective, in all forms in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs[1]), int(pairs[2])
    if plain := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return tuple(int(n) for n in plain[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(_iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])[0].tolist())
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", rest
    ):
        axes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(axes.values()))
        together = re.findall(r"'(\w+)'", mesh[3])
        spread = ids.reshape(tuple(axes.values()))
        first = tuple(slice(None) if name in together else 0 for name in axes)
        return tuple(spread[first].reshape(-1).tolist())
    return ()


def _iota(text: str) -> np.ndarray:
    """Device numbers in order, [2,8], seen transposed, T(1,0)."""
    dimensions, _, order = text.partition("T")
    shape = [int(n) for n in re.findall(r"\d+", dimensions)]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else ids
