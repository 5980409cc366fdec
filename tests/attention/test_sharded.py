"""Attention on 8 devices, rows and heads dealt out, is attention on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import REFUSALS, Case, error, inputs, slopes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer.attention import IMPLEMENTATIONS, Mask, attention

KEY = jax.random.key(5)
PLAIN = Case("sharded", T=33, S=33, H=4, G=4, B=4, causal=True, segments=3, dropout=0.2)
RICH = Case(
    "sharded, all", T=17, S=17, H=4, G=2, B=4, bias=4, alibi=True, soft_cap=2.0, dropout=0.2
)
SHARED_BIAS = Case("sharded, one bias", T=17, S=17, H=4, G=4, B=4, bias=1)


def run(name: str, case: Case, place):
    """Output, log-sum-exp and gradients, with `place` laying out each array."""
    (q, k, v, out_grad), bias, mask = inputs(case)
    ids = mask.q_segments_BT
    ids = None if ids is None else place(ids, P(("data", "fsdp"), None))
    mask = Mask(ids, ids, causal=case.causal)
    array = P(("data", "fsdp"), None, "tensor", None)
    primals = [place(x, array) for x in (q, k, v)]
    if bias is not None:
        rows = None if case.bias == 1 else ("data", "fsdp")
        primals.append(place(bias, P(rows, "tensor", None, None)))
    alibi = None if slopes(case) is None else jnp.asarray(slopes(case))
    drop = (case.dropout, KEY) if case.dropout else None

    @jax.jit
    def both(out_grad, *primals):
        def call(q, k, v, bias=None):
            return attention(
                q, k, v, mask, bias=bias, alibi=alibi, soft_cap=case.soft_cap, dropout=drop,
                implementation=name, return_lse=True,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(call, *primals)
        return out, lse, pull((out_grad, jnp.zeros_like(lse)))

    return both(place(out_grad, array), *primals)


# A bias for all rows is the same to every implementation: its gradient is added up outside.
DEALT = [(name, case) for name in IMPLEMENTATIONS for case in (PLAIN, RICH)]


@pytest.mark.parametrize(
    ("name", "case"), [*DEALT, ("blockwise", SHARED_BIAS)], ids=lambda x: getattr(x, "name", x)
)
def test_rows_and_heads_on_8_devices_give_what_one_gives(name, case):
    if case.features & REFUSALS[name]:
        pytest.skip("refused: see REFUSALS")
    alone = run(name, case, lambda x, _: jnp.asarray(x))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3)
    with jax.set_mesh(mesh):
        spread = run(name, case, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)))
    out, lse, (q_grad, *_) = spread
    layout = P(("data", "fsdp"), None, "tensor", None)
    assert out.sharding.spec == q_grad.sharding.spec == layout
    assert lse.sharding.spec == P(("data", "fsdp"), "tensor", None)
    for got, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        assert len(got.sharding.device_set) == 8
        assert error(got, np.asarray(wanted)) <= 2e-6
