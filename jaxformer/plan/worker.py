"""Compiles a step for a target, in a process of its own: compilers end the process on some errors.

python -m jaxformer.plan.worker  < job.json  > result.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
from typing import Any

from jaxformer.config import Config
from jaxformer.errors import UserError
from jaxformer.plan import hlo
from jaxformer.plan.compiler import ask
from jaxformer.plan.target import Target, describe, parse, places

BATCH = (
    "source_BS", "source_segments_BS", "source_positions_BS",
    "inputs_BT", "targets_BT", "target_segments_BT", "target_positions_BT",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One device's share of a step, in bytes and operations."""

    mesh: dict[str, int]
    parameters: float
    optimizer: float
    batch: float
    activations: float
    """What the forward pass keeps for the backward pass."""
    temporaries: float
    """The rest of what the program takes beside its arguments, its own code included."""
    needed: float
    """All of it at once; what the compiler says when that is more than there is."""
    compiled: bool
    seconds: float
    counts: hlo.Counts
    places: list[tuple[int, ...]]


def compile_step(config: Config, target: Target, limit: float) -> Compiled:
    """Compiles the training step of a config for a target, within `limit` seconds.

    Raises:
      UserError: it took too long, or the compiler failed; its last words are in the sentence.
    """
    job = {"config": config.to_json(), "target": target.name}
    result = ask("jaxformer.plan.worker", job, target.name, limit)
    counts = result.pop("counts")
    collectives = [
        hlo.Collective(**(c | {"group": tuple(c["group"])})) for c in counts.pop("collectives")
    ]
    counts = hlo.Counts(**counts, collectives=collectives)
    return Compiled(**result, counts=counts)


def main() -> None:
    """Reads a job from stdin, writes one line of JSON."""
    job = json.load(sys.stdin)
    target = parse(job["target"])
    import jax

    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", target.devices)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    try:
        result = _compile(Config.of(json.loads(job["config"])), target)
    except UserError as refusal:
        print(json.dumps({"refused": str(refusal)}))
        return
    print(json.dumps(dataclasses.asdict(result)))


def _compile(config: Config, target: Target) -> Compiled:
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from jaxformer import sharding
    from jaxformer.training import state
    from jaxformer.training.optimizer import make
    from jaxformer.training.step import train_step

    devices = describe(target)
    vocab_size, S = config.data.vocab_size, source_length(config)
    shape = sharding.mesh_shape(config.mesh, len(devices))
    sharding.check_mesh(config, shape, vocab_size, S)
    grid = np.array(devices).reshape(tuple(shape.values()))
    mesh = Mesh(grid, tuple(shape), axis_types=(AxisType.Explicit,) * len(shape))
    with jax.set_mesh(mesh):
        optimizer = make(config)
        like = state.abstract(config, vocab_size, optimizer, mesh)
        batch = _abstract_batch(config, mesh, S)
        step = functools.partial(train_step, config=config, optimizer=optimizer)
        activations = _kept(config, like["params"], batch)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(like, batch)
        try:
            program = lowered.compile()
        except Exception as error:  # the compiler's own types differ from platform to platform
            if (said := _said_to_need(str(error))) is None:
                raise
            program, counts, temporaries = None, hlo.Counts(), 0.0
            needed = max(said, _bytes((like, batch)))
        seconds = time.perf_counter() - start
    if program is not None:
        counts = hlo.count(program.as_text() or "")
        memory: Any = program.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
        if target.platform == "tpu":  # its temporaries share memory that others have left
            needed = memory.peak_memory_in_bytes
        needed += memory.generated_code_size_in_bytes
        taken = max(needed - memory.argument_size_in_bytes, 0)
        activations = min(activations, taken)
        temporaries = taken - activations
    return Compiled(
        mesh=shape,
        parameters=_bytes(like["params"]),
        optimizer=sum(_bytes(like[part]) for part in ("optimizer", "ema") if part in like),
        batch=_bytes(batch),
        activations=activations,
        temporaries=temporaries,
        needed=needed,
        compiled=program is not None,
        seconds=seconds,
        counts=counts,
        places=places(target, devices),
    )


def source_length(config: Config) -> int:
    """S of the packed rows; training fits it to the data, a plan takes T where it is left open."""
    return config.data.source_length or config.data.target_length


def _abstract_batch(config: Config, mesh: Any, S: int) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from jaxformer import sharding

    T = config.data.target_length
    rows = config.data.tokens_per_batch // T
    layout = NamedSharding(mesh, sharding.layout(mesh, "batch", "length"))
    return {
        name: jax.ShapeDtypeStruct((rows, S if "S" in name[-2:] else T), np.int32, sharding=layout)
        for name in BATCH
    }


def _kept(config: Config, params: Any, batch: dict[str, Any]) -> float:
    """Bytes per device that the forward pass of one micro-batch keeps, parameters not counted."""
    import jax

    from jaxformer.training.step import loss_sums

    k = config.optimizer.accumulate

    def forward(params: Any, batch: dict[str, Any]) -> Any:
        key = jax.random.key(0)
        smoothing = config.train.label_smoothing
        return jax.vjp(lambda p: loss_sums(p, batch, smoothing, key)["loss"], params)[1]

    micro = {
        name: jax.ShapeDtypeStruct((x.shape[0] // k, x.shape[1]), x.dtype, sharding=x.sharding)
        for name, x in batch.items()
    }
    leaves = jax.tree.leaves(jax.eval_shape(forward, params, micro))
    given = [(x.shape, x.dtype) for x in jax.tree.leaves((params, micro))]
    kept = 0.0
    for leaf in leaves:
        if (leaf.shape, leaf.dtype) in given:
            given.remove((leaf.shape, leaf.dtype))
        elif not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kept += _bytes(leaf)
    return kept


def _bytes(tree: Any) -> float:
    """Bytes on each device."""
    import jax
    import numpy as np

    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += float(np.prod(shape, dtype=np.float64)) * leaf.dtype.itemsize
    return total


UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
REFUSALS = (
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
    r"allocat\w+ ([\d.]+)([KMGT]?)i?B",
)


def _said_to_need(words: str) -> float | None:
    """How much memory the compiler's refusal says that it needs; None for another failure."""
    for form in REFUSALS:
        if match := re.search(form, words):
            return float(match[1]) * UNITS[match[2]]
    return None


if __name__ == "__main__":
    main()
