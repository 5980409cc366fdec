"""Taking a part of the model away, to see what it was good for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax

from jaxformer.config import ModelConfig
from jaxformer.errors import UserError
from jaxformer.model import Transformer

STACKS = {
    "encoder": ("encoder", "self_attention"),
    "decoder": ("decoder", "self_attention"),
    "cross": ("decoder", "cross_attention"),
}
"""Where attention is: the part of the model, and the sub-layer of its blocks."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What is taken away; nothing by default.

    Attributes:
      heads: (stack, layer, head), counted from 0: what the head says is not heard.
      positions: False removes positions from embeddings, and their turn from queries and keys.
      causal_mask: False lets the decoder see the tokens that it is to predict.
      pad_mask: False lets PAD be attended to like any other token.
    """

    heads: tuple[tuple[str, int, int], ...] = ()
    positions: bool = True
    causal_mask: bool = True
    pad_mask: bool = True

    def __bool__(self) -> bool:
        return self != Ablation()

    def names(self) -> list[str]:
        """The flags that ask for this, as a person writes them."""
        flags = [f"--ablate {stack}={layer + 1}.{head + 1}" for stack, layer, head in self.heads]
        switches = ("positions", "causal_mask", "pad_mask")
        off = [f"--no-{name.replace('_', '-')}" for name in switches if not getattr(self, name)]
        return flags + off


def layers_of(config: ModelConfig, stack: str) -> int:
    """How many layers attention has in a stack of `STACKS`."""
    return config.encoder_layers if stack == "encoder" else config.decoder_layers


def place(config: ModelConfig, stack: str, layer: int | None, head: int | None) -> None:
    """Refuses what the model does not have; counts from 1, as people do.

    Raises:
      UserError: names the range.
    """
    for name, value, count in (
        ("layer", layer, layers_of(config, stack)),
        ("head", head, config.num_heads),
    ):
        if value is not None and not 1 <= value <= count:
            raise UserError(f"There is no {name} {value} in {stack}; it has {name}s 1 to {count}.")


def parse(config: ModelConfig, asked: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """`head=3.5` (cross-attention), `encoder=1.2`, ...: (stack, layer, head), counted from 0.

    Raises:
      UserError: it is not written so, or there is no such head.
    """
    heads = []
    for text in asked:
        match = re.fullmatch(r"(head|encoder|decoder|cross)=(\d+)\.(\d+)", text)
        if not match:
            raise UserError(
                f"--ablate={text} is not understood; write head=LAYER.HEAD for a head of the "
                "cross-attention, encoder=LAYER.HEAD or decoder=LAYER.HEAD for self-attention."
            )
        stack = "cross" if match[1] == "head" else match[1]
        layer, head = int(match[2]), int(match[3])
        place(config, stack, layer, head)
        heads.append((stack, layer - 1, head - 1))
    return tuple(heads)


def ablated(model: Transformer, ablation: Ablation) -> Transformer:
    """The model without the heads and positions of the ablation; masks are told to the call.

    The output projection of a head that is taken away is zero, so that it adds nothing.
    """
    model = jax.tree.map(lambda leaf: leaf, model)  # a copy of the tree, not of the numbers
    for stack, layer, head in ablation.heads:
        side, name = STACKS[stack]
        attention = getattr(getattr(model, side).blocks, name)
        output_LHKD = attention.output_HKD[...]
        attention.output_HKD[...] = output_LHKD.at[layer, head].set(0.0)
    if not ablation.positions:
        model.config = dataclasses.replace(model.config, positions="none")
        model.source_positions_TD = model.target_positions_TD = None
    return model
