"""One translation with all that was computed on the way, as plain data for page and programs.

Every number comes from `model.recorded`, `model.lens` and `decode.beam_search`: production code.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxformer.data.tokenizer import BOS, EOS, PAD, Tokenizer
from jaxformer.errors import UserError
from jaxformer.explain.ablation import Ablation, ablated
from jaxformer.inference.decode import Decoded, beam_search, log_probabilities
from jaxformer.inference.translator import BUCKETS, Translator
from jaxformer.model import Transformer, lens, logits, recorded
from jaxformer.model.layers import Record

LONGEST = 64
"""Source tokens that a page can show."""

PADS = 2
"""PAD tokens behind the source, so that the PAD mask has something to do."""

CANDIDATES = 8
LENS_CANDIDATES = 3
DIGITS = 5
"""Significant digits of the numbers of a walk."""

SPECIAL = {PAD: "<pad>", BOS: "<sos>", EOS: "<eos>"}

Walk = dict[str, Any]
NOTHING_TAKEN = Ablation()


def walk(translator: Translator, sentence: str, ablation: Ablation = NOTHING_TAKEN) -> Walk:
    """Translates a sentence and tells how.

    Both runs of an ablation read the original's translation (teacher forcing), so that they can be
    compared position by position; what the ablated model writes by itself is its `translation`.

    Args:
      translator: the model.
      sentence: of at most `LONGEST` tokens.
      ablation: what a second run is to do without.

    Returns:
      {"sentence", "model", "source", "target", "runs"}; `run` says what is in each of the runs:
      the original, and with an ablation the one without.

    Raises:
      UserError: the sentence is empty or too long.
    """
    tokenizer, config = translator.tokenizer, translator.config
    ids = tokenizer.encode([sentence.strip()])[0]
    if not ids:
        raise UserError("There is nothing to explain; give a sentence.")
    if len(ids) > LONGEST:
        raise UserError(
            f"The sentence has {len(ids)} tokens; a page can show {LONGEST}: give a shorter one."
        )
    source = [*ids, EOS]
    source_BS = np.array([source + [PAD] * PADS], np.int32)
    model = translator.model
    plain = search(translator, model, source_BS, Ablation())
    target = until_end(plain.tokens_BNT[0, 0])
    runs = [run(translator, model, source_BS, target, plain, Ablation())]
    if ablation:
        less = ablated(model, ablation)
        found = search(translator, less, source_BS, ablation)
        runs.append(run(translator, less, source_BS, target, found, ablation))
    shape = config.model
    return {
        "sentence": sentence.strip(),
        "model": {
            "step": int(translator.step),
            "data": config.data.name,
            "source": config.data.source,
            "target": config.data.target,
            "encoder_layers": shape.encoder_layers,
            "decoder_layers": shape.decoder_layers,
            "heads": shape.num_heads,
            "kv_heads": shape.num_kv_heads or shape.num_heads,
            "d_model": shape.d_model,
            "d_ff": shape.d_ff,
            "vocab_size": tokenizer.vocab_size,
            "positions": shape.positions,
            "norm": f"{shape.norm_position}-{shape.norm}",
            "beam": config.decode.beam,
            "alpha": config.decode.alpha,
        },
        "source": {"ids": source_BS[0].tolist(), "pieces": pieces(tokenizer, source_BS[0])},
        "target": {
            "inputs": pieces(tokenizer, [BOS, *target[:-1]]),
            "outputs": pieces(tokenizer, target),
            "ids": [int(token) for token in target],
        },
        "runs": runs,
    }


def search(
    translator: Translator, model: Transformer, source_BS: np.ndarray, ablation: Ablation
) -> Decoded:
    """The beam search of the Translator, with its steps."""
    decode = translator.config.decode
    segments_BS = segments(source_BS, ablation)
    bucket = next(size for size in BUCKETS if size >= source_BS.shape[1] - PADS)
    return jax.device_get(
        beam_search(
            model,
            source_BS,
            segments_BS,
            beam=decode.beam,
            alpha=decode.alpha,
            max_length=min(decode.max_length, 2 * bucket + 16),
            n_best=decode.beam,
            record=True,
        )
    )


def segments(source_BS: np.ndarray, ablation: Ablation) -> np.ndarray:
    """Segment 0 is not attended to; without the PAD mask everything is segment 1."""
    real = source_BS != PAD if ablation.pad_mask else np.ones_like(source_BS)
    return real.astype(np.int32)


def run(
    translator: Translator,
    model: Transformer,
    source_BS: np.ndarray,
    target: list[int],
    found: Decoded,
    ablation: Ablation,
) -> Walk:
    """What one model computes, forced to read `target`.

    Returns:
      "without" (flags of the ablation), "translation", "hypotheses", "encoder" and "decoder" (see
      `side`), "steps" (per output position the chosen token and the likeliest), "lens" (the same
      for each layer), "beam" (see `searched`).
    """
    tokenizer = translator.tokenizer
    x_BTD, record = recorded(
        model, batch_of(source_BS, target, ablation), causal=ablation.causal_mask
    )
    log_TV = log_probabilities(logits(model, x_BTD)[0])
    stream_LBTD = record["decoder"]["feed_forward"]["stream_BTD"]
    lens_LTV = jax.vmap(log_probabilities)(lens(model, stream_LBTD)[:, 0])
    told = jax.device_get(record)
    hypotheses = [
        {
            "text": tokenizer.decode([tokens])[0],
            "pieces": pieces(tokenizer, until_end(tokens)),
            "score": number(score),
        }
        for tokens, score in zip(found.tokens_BNT[0], found.scores_BN[0], strict=True)
    ]
    return {
        "without": ablation.names(),
        "translation": hypotheses[0]["text"],
        "hypotheses": hypotheses,
        "encoder": side(told["encoder"]),
        "decoder": side(told["decoder"]),
        "steps": likeliest(tokenizer, log_TV, target, CANDIDATES),
        "lens": [likeliest(tokenizer, row, target, LENS_CANDIDATES) for row in lens_LTV],
        "beam": searched(tokenizer, found),
    }


def batch_of(source_BS: np.ndarray, target: list[int], ablation: Ablation) -> dict[str, Any]:
    """The batch of `model.forward`: the source, and the target shifted right."""
    inputs_BT = np.array([[BOS, *target[:-1]]], np.int32)
    return {
        "source_BS": source_BS,
        "source_segments_BS": segments(source_BS, ablation),
        "source_positions_BS": np.arange(source_BS.shape[1], dtype=np.int32)[None],
        "inputs_BT": inputs_BT,
        "target_segments_BT": np.ones_like(inputs_BT),
        "target_positions_BT": np.arange(len(target), dtype=np.int32)[None],
    }


def side(record: Record) -> Walk:
    """The record of encoder or decoder for one sentence, B taken away.

    "embedding_TD", "input_TD", and "layers": for each a dict of its sub-layers. Attention has
    q_HTK, k_GSK, v_GSK, scores_HTS, allowed_TS and weights_HTS; every sub-layer has added_norm_T
    and stream_norm_T, the lengths of what it adds and of the stream after it.
    """

    def layer_of(name: str, layer: int) -> Walk:
        return sublayer(jax.tree.map(lambda x: x[layer, 0], record[name]))

    depth = len(record["feed_forward"]["stream_BTD"])
    names = [name for name in STACK_ORDER if name in record]
    return {
        "embedding_TD": numbers(record["embedding_BTD"][0]),
        "input_TD": numbers(record["input_BTD"][0]),
        "input_norm_T": numbers(np.linalg.norm(record["input_BTD"][0], axis=-1)),
        "layers": [{name: layer_of(name, layer) for name in names} for layer in range(depth)],
    }


STACK_ORDER = ("self_attention", "cross_attention", "feed_forward")


def sublayer(record: Record) -> Walk:
    """One sub-layer of one sentence, see `side`."""
    told: Walk = {
        f"{name}_norm_T": numbers(np.linalg.norm(record[f"{name}_BTD"], axis=-1))
        for name in ("added", "stream")
    }
    if "scores_BHTS" in record:
        told["q_HTK"] = numbers(record["q_BTHK"].swapaxes(0, 1))
        told["k_GSK"] = numbers(record["k_BSGK"].swapaxes(0, 1))
        told["v_GSK"] = numbers(record["v_BSGK"].swapaxes(0, 1))
        told["scores_HTS"] = numbers(record["scores_BHTS"])
        told["allowed_TS"] = record["allowed_BTS"].astype(int).tolist()
        told["weights_HTS"] = numbers(record["weights_BHTS"])
    return told


def likeliest(tokenizer: Tokenizer, log_TV: Any, target: list[int], count: int) -> list[Walk]:
    """For each position the token that was chosen, and the likeliest ones, with probabilities."""
    log_TV = np.array(log_TV)
    top_TC = np.argsort(-log_TV, axis=-1, kind="stable")[:, :count]
    return [
        {
            "chosen": told(tokenizer, token, row),
            "rank": int((row > row[token]).sum()) + 1,
            "candidates": [told(tokenizer, other, row) for other in top],
        }
        for token, row, top in zip(target, log_TV, top_TC, strict=True)
    ]


def told(tokenizer: Tokenizer, token: int, log_V: np.ndarray) -> Walk:
    """A token, and its probability."""
    piece = pieces(tokenizer, [token])[0]
    return {"id": int(token), "piece": piece, "probability": number(np.exp(log_V[token]))}


def searched(tokenizer: Tokenizer, found: Decoded) -> list[list[Walk]]:
    """For each step of beam search its candidates, best first, and what became of them.

    "fate" is "grows" (kept), "ends" (reached <eos>) or "drops". "parent" is the row among those
    that grew before.
    """
    steps = found.steps
    assert steps is not None
    N = found.tokens_BNT.shape[1]
    growing: list[list[int]] = [[] for _ in range(N)]
    told = []
    for t in range(int(steps.taken)):
        grow = [int(place) for place in steps.places_TBN[t, 0]]
        rows, candidates = [], []
        columns = (steps.totals_TBC, steps.parents_TBC, steps.tokens_TBC)
        for c, (total, parent, token) in enumerate(zip(*(a[t, 0] for a in columns), strict=True)):
            rows.append([*growing[parent], int(token)])
            if total < BARRED:  # the start has one hypothesis; the others are barred
                continue
            fate = "ends" if token == EOS else "grows" if c in grow else "drops"
            candidates.append(
                {
                    "parent": int(parent),
                    "piece": pieces(tokenizer, [token])[0],
                    "pieces": pieces(tokenizer, rows[-1]),
                    "log_probability": number(total),
                    "fate": fate,
                }
            )
        growing = [rows[place] for place in grow]
        told.append(candidates)
    return told


BARRED = -1e8


def until_end(tokens: Any) -> list[int]:
    """The tokens up to EOS, with it; one that was cut off has none."""
    row = [int(token) for token in tokens]
    if EOS in row:
        return row[: row.index(EOS) + 1]
    return [token for token in row if token != PAD]


def pieces(tokenizer: Tokenizer, ids: Any) -> list[str]:
    """The pieces as people read them: ▁ for a space, and names for special tokens."""
    named = zip(ids, tokenizer.pieces(ids), strict=True)
    return [SPECIAL.get(int(token), piece) for token, piece in named]


def number(x: Any) -> float:
    """Rounded to `DIGITS` significant digits."""
    return float(f"{float(x):.{DIGITS}g}")


def numbers(x: Any) -> Any:
    """Nested lists of rounded numbers."""
    x = np.asarray(x, np.float32)
    rounded = np.array([number(value) for value in x.ravel().tolist()])
    return rounded.reshape(x.shape).tolist()
