"""What all pages of the tour share: the reader's trained model, and how pictures are shown."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from IPython.display import SVG
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxformer import Translator
from jaxformer.data.batches import eval_batches
from jaxformer.data.tokens import TokenPairs

ROOT = Path(__file__).parents[2]
WORKDIR = Path(os.environ.get("JAXFORMER_WORKDIR") or ROOT / "runs" / "steve")
"""The run that the pages look into."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the fonts of the reader
    "svg.hashsalt": "tour",  # the same picture has the same bytes
    "font.sans-serif": [
        "DejaVu Sans",
        "Noto Sans CJK SC",
        "PingFang SC",
        "Microsoft YaHei",
        "sans-serif",
    ],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ef",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
}
"""How the pictures look: `matplotlib.rcParams.update(STYLE)` was done on import."""

SECONDS = 6
"""That an animation takes before it begins anew."""

matplotlib.use("Agg")
matplotlib.rcParams.update(STYLE)
# The fonts of this machine need not know the characters that the reader's do.
warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@functools.cache
def trained() -> Translator:
    """The reader's own model: that of `WORKDIR`."""
    return Translator.load(WORKDIR)


def show(figure: Figure) -> SVG:
    """The figure as a picture of the page."""
    return SVG(data=drawn(figure))


def drawn(figure: Figure) -> str:
    """The figure as SVG, always the same for the same figure."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def animated(figure: Figure, paths: dict[str, tuple[Axes, np.ndarray]]) -> SVG:
    """The figure with moving points.

    Args:
      figure: each of its moving points is an artist with a gid, drawn at the start of its path.
      paths: for each gid the axes that the path is in, and its points [steps, 2], in data units.
        All have equally many.

    Returns:
      An SVG that moves by itself by CSS; it stands still for readers who ask for less motion.
    """
    figure.canvas.draw()
    frames = []
    for gid, (axes, path_N2) in paths.items():
        # An SVG counts 72 points to the inch from the top, so y is turned round.
        places_N2 = axes.transData.transform(path_N2) * 72 / figure.dpi
        moves_N2 = (places_N2 - places_N2[0]) * [1, -1]
        frames.append(
            f"#{gid}{{animation:{gid} {SECONDS}s infinite step-end}}@keyframes {gid}{{"
            + "".join(
                f"{100 * i / len(moves_N2):.2f}%{{transform:translate({x:.2f}px,{y:.2f}px)}}"
                for i, (x, y) in enumerate(moves_N2)
            )
            + "}"
        )
    still = "@media (prefers-reduced-motion: reduce){g{animation:none!important}}"
    return SVG(
        data=re.sub(
            "(<svg[^>]*>)", rf"\1<style>{''.join(frames)}{still}</style>", drawn(figure), count=1
        )
    )


def batch(
    translator: Translator, pairs: Sequence[tuple[str, str]], lengths: tuple[int, int] = (32, 32)
) -> dict[str, np.ndarray]:
    """Sentence pairs as training sees them, by the data layer of the library.

    Args:
      translator: whose tokenizer cuts them.
      pairs: (source, target); neighbours share a row where they fit.
      lengths: source and target positions of a row.
    """
    encode = translator.tokenizer.encode
    pairs_of_ids = TokenPairs.of(*(encode(side) for side in zip(*pairs, strict=True)))
    return eval_batches(pairs_of_ids, len(pairs), *lengths).batch_at(0)


def equal(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Whether two arrays, or two sequences of them, are the same up to rounding."""
    if isinstance(a, Sequence):
        return len(a) == len(b) and all(equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=tolerance, atol=tolerance))
