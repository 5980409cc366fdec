"""The figures of the page for files: drawn by Matplotlib from the same walk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxformer.explain.ablation import STACKS
from jaxformer.explain.walk import Walk

BLUE, ORANGE, GREEN, GREY = "#1f5fbf", "#c8561b", "#2d7d46", "#a3abb9"
WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#f7faff", "#74a9db", "#0d3b86"])
SIGNED = LinearSegmentedColormap.from_list("signed", [ORANGE, "#ffffff", BLUE])
CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB"),
)
"""Names of fonts that know Chinese characters."""
SHORT = {"self_attention": "self", "cross_attention": "cross", "feed_forward": "FFN"}


@dataclasses.dataclass(frozen=True)
class View:
    """What a figure shows; counts from 0, a head of None is the mean over heads."""

    stack: str = "cross"
    layer: int = 0
    head: int | None = None
    step: int = 0


@functools.cache
def fonts() -> Any:
    """Settings of Matplotlib for text in both languages; text of an SVG stays text."""
    listed = font_manager.fontManager
    if not {font.name for font in listed.ttflist} & set(CHINESE):
        # Matplotlib keeps its list of fonts from when it first ran; some may be newer.
        known = {font.fname for font in listed.ttflist}
        for path in sorted(set(font_manager.findSystemFonts()) - known):
            with contextlib.suppress(Exception):  # one that it cannot read
                listed.addfont(path)
    # Only names that are there: each that is not would be a warning.
    there = [name for name in CHINESE if name in {font.name for font in listed.ttflist}]
    return {"font.sans-serif": [*there, "DejaVu Sans"], "svg.fonttype": "none"}


def save(figure: Figure, path: Path, file: Path) -> str | None:
    """Writes a figure into a file, in the format that the ending of `path` names.

    Returns:
      A sentence for the user where no font here knows the characters of the picture.
    """
    with matplotlib.rc_context(fonts()), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.savefig(file, dpi=160, format=path.suffix[1:])
    others = [w for w in said if "missing from font" not in str(w.message)]
    for other in others:
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if len(others) == len(said) or path.suffix == ".svg":  # the fonts of its viewer draw an SVG
        return None
    return (
        "No font here knows Chinese characters: they are boxes in the picture. Install one "
        "(Debian: fonts-noto-cjk), or write an .svg."
    )


def draw(walk: Walk, name: str, view: View) -> Figure:
    """One of `FIGURES`; with an ablation one column for each run."""
    with matplotlib.rc_context(fonts()):
        figure = Figure(layout="constrained", facecolor="white")
        rows = 3 if name in ("embeddings", "qkv") else 2 if name == "norms" else 1
        runs = walk["runs"]
        grid = figure.subplots(rows, len(runs), squeeze=False)
        for column, run in enumerate(runs):
            FIGURES[name](list(grid[:, column]), walk, run, view)
            if len(runs) > 1:
                without = " ".join(run["without"]) or "original"
                grid[0, column].set_title(without, fontsize=10, loc="left")
        tokens = max(len(walk["source"]["ids"]), len(walk["target"]["ids"]))
        figure.set_size_inches(
            len(runs) * min(16, max(5.0, 1.5 + 0.5 * tokens)), rows * min(12, 1.2 + 0.38 * tokens)
        )
        return figure


def heat(
    axes: Axes,
    map_TS: Sequence[Sequence[float]] | np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str] | None,
    signed: bool = False,
    top: float | None = None,
) -> None:
    """A heat map; NaN is grey."""
    values = np.asarray(map_TS, float)
    high = top or np.nanmax(np.abs(values)) or 1.0
    colours = (SIGNED if signed else WEIGHTS).with_extremes(bad="#e9ebf0")
    image = axes.imshow(values, cmap=colours, vmin=-high if signed else 0, vmax=high, aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    if columns is None:
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(columns)), columns, rotation=45 if len(columns) > 4 else 0)
        axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_color("#d5dbe5")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, fraction=0.03)


def chosen(walk: Walk, run: Walk, view: View) -> tuple[Walk, list[str], list[str]]:
    """The attention of a view, and the tokens of its queries and keys."""
    side, name = STACKS[view.stack]
    source, inputs = walk["source"]["pieces"], walk["target"]["inputs"]
    part = run[side]["layers"][view.layer][name]
    queries = source if view.stack == "encoder" else inputs
    return part, queries, inputs if view.stack == "decoder" else source


def of_head(maps_HTS: Sequence, head: int | None) -> np.ndarray:
    """One head, or the mean of all."""
    maps = np.asarray(maps_HTS, float)
    return maps.mean(0) if head is None else maps[head]


def embeddings(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """Embedding, position and their sum."""
    side = STACKS[view.stack][0]
    tokens = walk["source"]["pieces"] if side == "encoder" else walk["target"]["inputs"]
    embedding, total = (np.array(run[side][f"{name}_TD"]) for name in ("embedding", "input"))
    titles = ("embedding", "position", "sum")
    for axes, title, map_TD in zip(
        places, titles, (embedding, total - embedding, total), strict=True
    ):
        heat(axes, map_TD, tokens, None, signed=True)
        axes.set_xlabel(title)


def qkv(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """Queries, keys and values of one head (the first for a mean)."""
    part, queries, keys = chosen(walk, run, view)
    head = view.head or 0
    group = head // (walk["model"]["heads"] // walk["model"]["kv_heads"])
    maps = (("Q", part["q_HTK"][head]), ("K", part["k_GSK"][group]), ("V", part["v_GSK"][group]))
    for axes, (title, map_TK) in zip(places, maps, strict=True):
        heat(axes, map_TK, queries if title == "Q" else keys, None, signed=True)
        axes.set_xlabel(f"{title} · head {head + 1}")


def scores(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """Before the mask."""
    part, queries, keys = chosen(walk, run, view)
    heat(places[0], of_head(part["scores_HTS"], view.head), queries, keys, signed=True)


def masked_scores(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """After the mask; what may not be seen is grey."""
    part, queries, keys = chosen(walk, run, view)
    allowed = np.array(part["allowed_TS"], bool)
    map_TS = np.where(allowed, of_head(part["scores_HTS"], view.head), np.nan)
    heat(places[0], map_TS, queries, keys, signed=True)


def weights(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """After softmax."""
    part, queries, keys = chosen(walk, run, view)
    heat(places[0], of_head(part["weights_HTS"], view.head), queries, keys, top=1)


def cross_attention(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """The weights of cross-attention, by the token that each position writes."""
    view = dataclasses.replace(view, stack="cross")
    part, _, keys = chosen(walk, run, view)
    map_TS = of_head(part["weights_HTS"], view.head)
    heat(places[0], map_TS, walk["target"]["outputs"], keys, top=1)


def lines(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """Weights as lines between words."""
    part, queries, keys = chosen(walk, run, view)
    for t, row in enumerate(of_head(part["weights_HTS"], view.head)):
        for s, weight in enumerate(row):
            if weight >= 0.04:
                style = {"color": BLUE, "alpha": 0.1 + 0.6 * weight, "linewidth": 0.5 + 6 * weight}
                places[0].plot([0, 1], [-t, -s], solid_capstyle="round", **style)
    for x, words, side in ((0, queries, "right"), (1, keys, "left")):
        for i, word in enumerate(words):
            places[0].text(x + (-0.03 if x == 0 else 0.03), -i, word, ha=side, va="center")
    places[0].set_xlim(-0.4, 1.4)
    places[0].set_axis_off()


def heads(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """All layers (rows) and heads (columns) as one mosaic."""
    side, name = STACKS[view.stack]
    layers = [np.array(layer[name]["weights_HTS"]) for layer in run[side]["layers"]]
    pad = [np.pad(maps, ((0, 0), (0, 1), (0, 1)), constant_values=np.nan) for maps in layers]
    heat(places[0], np.block([list(maps) for maps in pad]), [], None, top=1)
    _, T, S = pad[0].shape
    places[0].set_yticks([(i + 0.5) * T for i in range(len(pad))], numbered(len(pad)))
    places[0].set_xticks([(i + 0.5) * S for i in range(len(pad[0]))], numbered(len(pad[0])))
    places[0].set_ylabel("layer")
    places[0].set_xlabel("head")


def numbered(count: int) -> list[str]:
    """1, 2, ..., as labels."""
    return [str(i + 1) for i in range(count)]


def norms(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """Lengths of the stream after each sub-layer, and of what each adds."""
    side = STACKS[view.stack][0]
    tokens = walk["source"]["pieces"] if side == "encoder" else walk["target"]["inputs"]
    parts = [
        (f"{i} {SHORT[name]}", layer[name])
        for i, layer in enumerate(run[side]["layers"], 1)
        for name in SHORT
        if name in layer
    ]
    names = [name for name, _ in parts]
    stream = [run[side]["input_norm_T"], *(part["stream_norm_T"] for _, part in parts)]
    heat(places[0], np.array(stream).T, tokens, ["input", *names])
    places[0].set_xlabel("residual stream")
    heat(places[1], np.array([part["added_norm_T"] for _, part in parts]).T, tokens, names)
    places[1].set_xlabel("added")


def candidates(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """The likeliest tokens at one step."""
    step = run["steps"][view.step]
    rows = step["candidates"][::-1]
    colours = [BLUE if row["id"] == step["chosen"]["id"] else "#9db4d3" for row in rows]
    bars = places[0].barh(
        range(len(rows)), [row["probability"] for row in rows], color=colours, height=0.75
    )
    places[0].bar_label(bars, [f" {row['probability']:.3g}" for row in rows])
    places[0].set_yticks(range(len(rows)), [row["piece"] for row in rows])
    places[0].set_xlim(0, 1.15)
    places[0].spines[["top", "right"]].set_visible(False)
    places[0].set_xlabel(" ".join(walk["target"]["inputs"][: view.step + 1][-8:]) + " …")


def lens(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """What each decoder layer would say."""
    best = [[at["candidates"][0] for at in layer] for layer in run["lens"]]
    map_LT = np.array([[one["probability"] for one in layer] for layer in best])
    names = [f"layer {i + 1}" for i in range(len(best))]
    heat(places[0], map_LT, names, walk["target"]["outputs"], top=1)
    for i, layer in enumerate(best):
        for t, one in enumerate(layer):
            ink = "white" if one["probability"] > 0.5 else "black"
            places[0].text(t, i, one["piece"], ha="center", va="center", color=ink, fontsize=9)
    places[0].invert_yaxis()


def beam(places: list[Axes], walk: Walk, run: Walk, view: View) -> None:
    """What the search kept and dropped at one step."""
    fates = {"grows": (BLUE, "kept"), "ends": (GREEN, "ends"), "drops": (GREY, "dropped")}
    rows = run["beam"][min(view.step, len(run["beam"]) - 1)]
    for i, row in enumerate(rows):
        colour, word = fates[row["fate"]]
        places[0].text(0, -i, word, color=colour, weight="bold", va="center")
        places[0].text(0.35, -i, f"{row['log_probability']:.3f}", va="center", ha="right")
        places[0].text(0.4, -i, " ".join(row["pieces"][-9:]), va="center")
    places[0].set_ylim(-len(rows), 1)
    places[0].set_axis_off()


FIGURES: dict[str, Callable[[list[Axes], Walk, Walk, View], None]] = {
    f.__name__: f
    for f in (
        candidates,
        beam,
        cross_attention,
        lines,
        heads,
        qkv,
        scores,
        masked_scores,
        weights,
        embeddings,
        norms,
        lens,
    )
}
"""By name; the page has them too, under the same names."""
