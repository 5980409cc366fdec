"""Draws the picture of one attention map for the README, out of a trained model.

python docs/pictures.py runs/steve 史蒂夫建造房子 docs/images/attention.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jaxformer import Translator, report
from jaxformer.attention import Mask, attention
from jaxformer.attention.extras import Extras
from jaxformer.attention.reference import scores_BHTS, softmax
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.errors import plainly_said
from jaxformer.metrics import read_log
from jaxformer.model import Transformer, forward, layers


def cross_attention_LTS(
    model: Transformer, source: list[int], target: list[int]
) -> list[np.ndarray]:
    """Weights of the decoder over the source, the mean over heads, for each layer."""
    seen: list[np.ndarray] = []

    def watched(q_BTHK, k_BSGK, v_BSGK, mask: Mask, **options):
        weights_BHTS, _ = softmax(scores_BHTS(q_BTHK, k_BSGK, Extras()), mask, Extras())
        seen.append(np.asarray(weights_BHTS[0].mean(0)))
        return attention(q_BTHK, k_BSGK, v_BSGK, mask, **options)

    def rows(ids: list[int]) -> dict[str, jax.Array]:
        row = jnp.asarray([ids], jnp.int32)
        return {"": row, "_segments": jnp.ones_like(row), "_positions": jnp.arange(len(ids))[None]}

    source_rows, target_rows = rows([*source, EOS]), rows([BOS, *target])
    batch = {f"source{name}_BS": row for name, row in source_rows.items()}
    batch |= {f"target{name}_BT": row for name, row in target_rows.items() if name}
    batch["inputs_BT"] = target_rows[""]
    # Without jit a scan is a Python loop, and what passes through it are numbers.
    with jax.disable_jit(), mock.patch.object(layers, "attention", watched):
        forward(model, batch)
    encoder_calls = model.config.encoder_layers
    return seen[encoder_calls + 1 :: 2]


def draw(weights_TS: np.ndarray, rows: list[str], columns: list[str], path: Path) -> None:
    """A heat map: which source pieces each target piece was chosen by."""
    plt.rcParams["font.sans-serif"] = ["Noto Sans CJK SC", "WenQuanYi Zen Hei", "DejaVu Sans"]
    figure, axes = plt.subplots(figsize=(1.5 + 0.6 * len(columns), 1.2 + 0.45 * len(rows)))
    image = axes.imshow(weights_TS, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.set_xlabel("source")
    axes.set_ylabel("next target piece")
    figure.colorbar(image, fraction=0.03, label="attention weight")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def picture_of_attention(workdir: str, path: str, sentence: str) -> None:
    """Translates the sentence and draws the last layer's cross-attention."""
    translator = Translator.load(workdir)
    tokenizer = translator.tokenizer
    output = translator([sentence])[0]
    source, target = tokenizer.encode([sentence, output])
    weights_TS = cross_attention_LTS(translator.model, source, target)[-1]
    rows = [*tokenizer.pieces(target), "<eos>"]
    draw(weights_TS, rows, [*tokenizer.pieces(source), "<eos>"], Path(path))
    print(f"{sentence} -> {output}; wrote {path}")


def picture_of_curve(workdir: str, path: str) -> None:
    """Draws the loss, the learning rate and the speed of a run, as its report does."""
    report.curves(read_log(Path(workdir))).savefig(path, dpi=120)
    print(f"wrote {path}")


PICTURES = {"attention": picture_of_attention, "curve": picture_of_curve}

if __name__ == "__main__":
    with plainly_said():
        PICTURES[sys.argv[1]](*sys.argv[2:])
