"""A call of attention compiled for a chip that is not here, in a process of its own.

For a TPU the compiler tells the cycles of every operation, by a static model: estimates. For a GPU
the assembler tells registers, spills and instructions of every kernel.

python -m benchmarks.ahead  < case.json  > result.json
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError
from jaxformer.hardware import CHIPS
from jaxformer.plan import compiler, hlo, hlo_text
from jaxformer.plan.target import describe, parse

ROOT = Path(__file__).parent.parent
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
HEADS_FIRST = ("library", "xla")
"""Kernels that take arrays [B, H, S, D] without another copy; ours takes [B, S, H D]."""
CYCLES = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention over bfloat16 arrays; S queries and as many keys in a row."""

    chip: str
    kernel: str
    """ours (Pallas), library (JAX's flash attention for TPU), xla (`jax.nn`), dense (ours)"""
    S: int = 2048
    D: int = 128
    causal: bool = True
    backward: bool = False
    """Output and all gradients in one program, or the output alone."""
    B: int = 1
    H: int = 4
    G: int = 4
    """Heads of keys and values."""
    options: tuple[str, ...] = ()
    """Of our kernel: segments, alibi, soft_cap, dropout."""
    window: int | None = None
    """Of our kernel: as that of `Mask`."""
    tiles: tuple[int, ...] = ()
    """Of our kernel for TPU, in the pass that comes last; none: those of the table."""
    blocks: tuple[int, int] = (1024, 512)
    """The library's, queries and keys alike, forward and backward; shorter rows take less."""
    profile: bool = True
    """Whether the compiler is asked for cycles; that of JAX 0.10.2 cannot tell them for tpu7x."""

    @property
    def flops(self) -> float:
        """What the mask leaves of 2 products forward and 5 backward (Dao et al. 2022)."""
        pairs = self.S * (self.S + 1) / 2 if self.causal else self.S**2
        return 2.0 * (7 if self.backward else 2) * self.B * self.H * self.D * pairs


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one device."""

    refused: str = ""
    """Why there is nothing else here."""
    operations: list[tuple[str, float, float, float]] = dataclasses.field(default_factory=list)
    """(name, cycles, FLOPs of products, bytes to and from memory), in the order in which they run.

    Cycles are 0 where the compiler's model has none.
    """
    pictures: list[str] = dataclasses.field(default_factory=list)
    """Arrays of at least S times S elements that the program holds."""
    temporaries: float = 0.0
    """Bytes."""
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """On a GPU: name, registers, spills (bytes), instructions."""
    seconds: float = 0.0
    """That the compiler took."""

    @property
    def cycles(self) -> float:
        """Of all operations."""
        return sum(cycles for _, cycles, _, _ in self.operations)

    @property
    def kernel_cycles(self) -> float:
        """Of kernels alone: without what is done to arrays before and after."""
        return sum(cycles for name, cycles, _, _ in self.operations if "flash" in name)

    def seconds_on(self, chip: str) -> float:
        """One operation after the other, each the slowest of its cycles, products and bytes.

        Products bound only what has no cycles: of a kernel they count what its mask skips.
        """
        peak = CHIPS[chip]
        return sum(
            max(cycles / peak.clock or flops / peak.bf16_flops, moved / peak.bandwidth)
            for _, cycles, flops, moved in self.operations
        )


def measure(case: Case, limit: float = 300.0) -> Result:
    """Compiles a case within `limit` seconds; what could not be compiled says why."""
    with tempfile.TemporaryDirectory(prefix="ahead-") as scratch:
        profile = f" --xla_jf_dump_static_llo_profile_to={scratch}" if case.profile else ""
        environment = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            # Arguments stay in memory, as in a model, where other operations run in between.
            "LIBTPU_INIT_ARGS": "--xla_msa_enable=false" + profile,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_TO": scratch,
        }
        try:
            found = compiler.ask(
                "benchmarks.ahead", dataclasses.asdict(case), case.chip, limit, environment
            )
        except UserError as error:
            return Result(refused=str(error))
    found["operations"] = [tuple(one) for one in found["operations"]]
    return Result(**found)


def main() -> None:
    """Reads a case from stdin, writes one line of JSON."""
    job = json.load(sys.stdin)
    case = Case(**job | {name: tuple(job[name]) for name in ("options", "tiles", "blocks")})
    try:
        result = _compile(case)
    except (UserError, NotImplementedError) as refusal:
        print(json.dumps({"refused": f"{type(refusal).__name__}: {refusal}"}))
        return
    answer = dataclasses.asdict(result)
    del answer["refused"]
    print(json.dumps(answer))


def _compile(case: Case) -> Result:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from benchmarks import sass

    chip = CHIPS[case.chip]
    target = parse("h100:1x1" if case.chip == "h100" else chip.topology)
    device = np.array(describe(target)[:1])
    mesh = Mesh(device, ("data",), axis_types=(AxisType.Explicit,))
    layout = NamedSharding(mesh, PartitionSpec())

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    # Axes are in the order that a kernel likes best: projections can write them in any.
    def axes(heads):
        if case.kernel in HEADS_FIRST:
            return case.B, heads, case.S, case.D
        return case.B, case.S, heads * case.D

    q, k = array(axes(case.H)), array(axes(case.G))
    extras = {}
    if "segments" in case.options:
        extras["segments"] = array((case.B, case.S), jnp.int32)
    if "alibi" in case.options:
        extras["slopes"] = array((case.H,), jnp.float32)
    if "dropout" in case.options:
        extras["words"] = array((2,), jnp.uint32)

    def forward(q, k, v, extras):
        if case.kernel in HEADS_FIRST:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            return jnp.swapaxes(function(case)(q, k, v, extras), 1, 2)
        q, k, v = (x.reshape(case.B, case.S, -1, case.D) for x in (q, k, v))
        return function(case)(q, k, v, extras).reshape(case.B, case.S, -1)

    def both(q, k, v, extras, out_grad):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, extras), q, k, v)
        return out, pull(out_grad)

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(both).lower(q, k, k, extras, q) if case.backward else (
            jax.jit(forward).lower(q, k, k, extras)
        )  # fmt: skip
        program = lowered.compile()
    seconds = time.perf_counter() - start
    text = program.as_text() or ""
    memory: Any = program.memory_analysis()
    operations = []
    for i, counts, times in hlo.operations(text):
        found = CYCLES.search(i.rest)
        done = (float(found[1]) if found else 0.0, counts.flops, counts.bytes)
        if any(done):
            operations.append((i.name, *(times * x for x in done)))
    return Result(
        operations=operations,
        pictures=pictures(text, case.S * case.S),
        temporaries=memory.temp_size_in_bytes,
        kernels=sass.read(Path(os.environ["MOSAIC_GPU_DUMP_TO"])) if case.chip == "h100" else [],
        seconds=seconds,
    )


def function(case: Case) -> Any:
    """Attention of q_BTHK, k_BSGK, v_BSGK and what the options of a case bring."""
    import jax
    import jax.numpy as jnp

    from jaxformer.attention import Mask, attention, tpu_table

    if case.kernel == "xla":
        return lambda q, k, v, _: jax.nn.dot_product_attention(
            q, k, v, is_causal=case.causal, implementation="xla"
        )
    if case.kernel == "library":
        from jax.experimental.pallas.ops.tpu import flash_attention as library

        n, m = (min(block, case.S) for block in case.blocks)
        sizes = library.BlockSizes(
            block_b=1, block_q=n, block_k_major=n, block_k=n,
            block_q_major_dkv=m, block_q_dkv=m, block_k_major_dkv=m, block_k_dkv=m,
            block_q_dq=m, block_k_major_dq=m, block_k_dq=m,
        )  # fmt: skip

        def heads_first(q, k, v, _):
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            out = library.flash_attention(
                q, k, v, causal=case.causal, sm_scale=case.D**-0.5, block_sizes=sizes
            )
            return jnp.swapaxes(out, 1, 2)

        return heads_first
    own = "pallas_gpu" if case.chip == "h100" else "pallas_tpu"
    if case.tiles:
        given, chosen = tpu_table.tiles, tpu_table.Tiles(*case.tiles)

        def tiles(kind, **options):
            forward, backward = given(kind, **options)
            return (forward, chosen) if case.backward else (chosen, backward)

        tpu_table.tiles = tiles  # this process compiles nothing else

    def ours(q, k, v, extras):
        dropout = None
        if "words" in extras:
            dropout = 0.1, jax.random.wrap_key_data(extras["words"])
        segments = extras.get("segments")
        return attention(
            q, k, v,
            Mask(segments, segments, case.causal, case.window),
            alibi=extras.get("slopes"),
            soft_cap=30.0 if "soft_cap" in case.options else None,
            dropout=dropout,
            implementation=own if case.kernel == "ours" else case.kernel,
        )  # fmt: skip

    return ours


def pictures(text: str, elements: int) -> list[str]:
    """Arrays of a program that have so many elements; what stays within a fusion is none."""
    computations, _ = hlo_text.parse(text)
    fused = {
        hlo_text.attribute(i, "calls")
        for body in computations.values()
        for i in body.values()
        if i.opcode == "fusion"
    }
    return [
        f"{i.name} [{dimensions}]"
        for name, body in computations.items()
        if name not in fused
        for i in body.values()
        for _, dimensions, _ in hlo_text.ARRAY.findall(i.result)
        if math.prod(int(n) for n in dimensions.split(",") if n) >= elements
    ]


if __name__ == "__main__":
    main()
