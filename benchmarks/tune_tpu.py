"""Finds sizes for `jaxformer.attention.tpu_table` without a TPU: estimates, not measurements.

    python benchmarks/tune_tpu.py --generations v5e v6e --pass backward

libtpu (extra `aot-tpu`) compiles the kernels for each generation and profiles them statically. A
case runs in a process of its own, since libtpu aborts on what it cannot compile. That of JAX 0.10.2
(0.0.42) aborts in the profile for tpu7x; that of JAX 0.12 (0.0.50) does not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SECONDS = 300
SHAPE = {"batch": 1, "heads": 4, "length": 2048, "size": 128, "sentence": 0}
"""With sentences the row is packed, as a window pictures it: the profile cannot know segments."""


def candidates(which: str, packed: bool) -> list[tuple[int, ...]]:
    """Tiles, as the fields of `tpu_table.Tiles`."""
    if packed:
        blocks = (1024, 2048) if which == "forward" else (2048, 1024)
        return [(128, m, *blocks, 128, m, heads) for m in (128, 64) for heads in (1, 4, 8)]
    pieces = [(128, 128), (128, 256), (256, 128), (256, 256)]
    tiles = [(1024, 1024), (512, 512)]
    held = {"forward": lambda n, m: (n, 4096), "backward": lambda n, m: (4096, m)}[which]
    return [(n, m, *held(n, m), *piece) for (n, m), piece in itertools.product(tiles, pieces)]


def measure(generation: str, which: str, sizes: list[int], shape: dict[str, int]) -> dict[str, int]:
    """Estimated cycles of each op of a program; empty where it does not compile in time."""
    case = json.dumps([generation, which, sizes, shape])
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder} "
            "--xla_msa_enable=false",
        }
        command = [sys.executable, __file__, "--case", case]
        try:
            subprocess.run(
                command, env=environment, timeout=SECONDS, capture_output=True, check=True
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as failure:
            last = (failure.stderr or b"").decode(errors="replace").strip().splitlines()[-1:]
            print(generation, sizes, type(failure).__name__, *last, file=sys.stderr)
            return {}
        cycles = {}
        for path in Path(folder).glob("*static_llo_profile.textproto"):
            found = re.search(r"estimated_cycles: (\d+)", path.read_text())
            cycles[path.name] = int(found[1]) if found else 0
        return cycles


def compile_case(generation: str, which: str, sizes: list[int], shape: dict[str, int]) -> None:
    """Compiles a causal call in bfloat16; libtpu leaves its profile.

    Heads stand side by side, as a projection leaves them: apart in memory, XLA would copy them.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from jaxformer.attention import Mask, attention, tpu_table

    if sizes:
        tiles = tpu_table.Tiles(*sizes)
        given = tpu_table.tiles

        def chosen(*arguments, **options):
            forward, backward = given(*arguments, **options)
            return (tiles, backward) if which == "forward" else (forward, tiles)

        tpu_table.tiles = chosen
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",), axis_types=explicit)
    x = jax.ShapeDtypeStruct(
        (shape["batch"], shape["length"], shape["heads"] * shape["size"]),
        jnp.bfloat16,
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )

    def call(*qkv):
        heads = (shape["batch"], shape["length"], shape["heads"], shape["size"])
        q, k, v = (a.reshape(heads) for a in qkv)
        mask = Mask(causal=not shape["sentence"], window=shape["sentence"] // 2 or None)
        return attention(q, k, v, mask, implementation="pallas_tpu").reshape(x.shape)

    def both(gradient, *primals):
        out, pull = jax.vjp(call, *primals)
        return out, *pull(gradient)

    with jax.set_mesh(mesh):
        if which == "forward":
            jax.jit(call).lower(x, x, x).compile()
        else:
            jax.jit(both).lower(x, x, x, x).compile()


def kernel_cycles(cycles: dict[str, int], which: str) -> int | None:
    """Those of the kernel itself."""
    found = [
        count
        for name, count in cycles.items()
        if "flash_attention" in name and ("backward" in name) == (which == "backward")
    ]
    return sum(found) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", nargs="+", choices=TOPOLOGIES, default=[*TOPOLOGIES])
    parser.add_argument("--pass", dest="which", choices=("forward", "backward"), default="forward")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sizes", type=json.loads, action="append", help="only these, [n, m, ...]")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.case:
        return compile_case(*options.case)
    shape = {name: getattr(options, name) for name in SHAPE}
    for generation in options.generations:
        results = []
        for sizes in options.sizes or candidates(options.which, options.sentence > 0):
            cycles = measure(generation, options.which, list(sizes), shape)
            kernel = kernel_cycles(cycles, options.which)
            print(generation, options.which, sizes, kernel, sum(cycles.values()), flush=True)
            if kernel:
                results.append((kernel, sizes))
        if results:
            print(f"{generation}: best {min(results)[1]}, {min(results)[0]:,} cycles (estimate)")


if __name__ == "__main__":
    main()
