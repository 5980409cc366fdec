"""Flash attention for TPU in Pallas: the call, and the forward kernel.

Dao et al. (2022), "FlashAttention". Scores are kept transposed, [keys, queries]: the running
maximum and sum of a query then lie along lanes, so that reducing over keys adds vector registers to
each other, and spreading a statistic over keys repeats a sublane. Scores are exponents of 2, since
that is what the hardware raises; the factor log2(e) / sqrt(K) is on the queries.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.attention import tpu_table
from jaxformer.attention.extras import NOTHING, Extras
from jaxformer.attention.mask import Mask
from jaxformer.attention.platform import device_kind, platform
from jaxformer.attention.tpu_backward import backward
from jaxformer.attention.tpu_blocks import (
    LOG2_E,
    Plan,
    flat,
    key_span,
    over,
    pad,
    plan_of,
    segment_spans,
    tiled,
    unflat,
)
from jaxformer.attention.tpu_scores import (
    Tile,
    by_mask,
    column,
    dropped,
    finished,
    head,
    kept,
    one_ahead,
    pieces,
    product,
)

INTERPRET: Any = True
"""How the kernels run where there is no TPU; `pltpu.InterpretParams` looks for races."""


def pallas_tpu(
    q_BTHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Mask, extras: Extras
) -> tuple[Array, Array]:
    """Attention of any length and head size; on other machines than a TPU it is interpreted.

    Memory is linear in the length. A bias is a T x S picture itself, and its gradient B of them.
    """
    segments, bias = mask.q_segments_BT is not None, extras.bias_BHTS is not None
    interpret = platform() != "tpu" and INTERPRET
    forward_plan, backward_plan = (
        plan_of(
            q_BTHK,
            k_BSGK,
            mask,
            extras,
            tpu_table.tiles(device_kind(), backward, segments=segments, bias=bias),
            interpret,
        )
        for backward in (False, True)
    )
    return _attend(q_BTHK, k_BSGK, v_BSGK, extras.bias_BHTS, mask, extras, ...)
