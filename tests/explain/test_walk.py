"""Every number of a page is one of the model's own, recomputed here in float64 NumPy."""

import json
import re

import jax
import numpy as np
import pytest
import reference
from inference_cases import CONFIG, SENTENCES, state, tokenizer
from training_cases import change

from jaxformer import Translator, trees
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.errors import UserError
from jaxformer.explain.ablation import Ablation, ablated, parse
from jaxformer.explain.page import render
from jaxformer.explain.walk import PADS, batch_of, pieces, walk
from jaxformer.inference.decode import log_probabilities
from jaxformer.model import logits, recorded

HEADS = CONFIG.model.num_heads


@pytest.fixture(scope="module")
def translator():
    return Translator(state(2)["params"], tokenizer(), CONFIG, 2)


@pytest.fixture(scope="module")
def page(translator):
    """What the script of the page reads, as JSON out of the HTML."""
    html = render(walk(translator, SENTENCES[0]))
    script = re.search(r'<script type="application/json" id="walk">(.*?)</script>', html, re.S)
    return json.loads(script[1])


def test_every_number_is_the_models(translator, page):
    numbers = {k: np.float64(v) for k, v in trees.flatten(translator.model).items()}
    config, run = translator.config.model, page["runs"][0]
    source = page["source"]["ids"][:-PADS]
    assert source == [*translator.tokenizer.encode([SENTENCES[0]])[0], EOS]
    target = page["target"]["ids"]
    tokens = {"encoder": source, "decoder": [BOS, *target[:-1]]}
    seen, memory = 0, None
    for side in ("encoder", "decoder"):
        n, told = len(tokens[side]), run[side]
        plain = change(CONFIG, model__positions="none").model
        table, places = numbers["embedding_VD"], np.arange(n)
        embedded = reference.embed(table, None, plain, tokens[side], places)
        x = reference.embed(table, None, config, tokens[side], places)
        seen += same(told["embedding_TD"], embedded) + same(told["input_TD"], x)
        seen += same(told["input_norm_T"], np.linalg.norm(x, axis=-1))
        blocks = reference.part(numbers, f"{side}/blocks")
        for layer, sublayers in enumerate(told["layers"]):
            p = {name: value[layer] for name, value in blocks.items()}
            for name, values in sublayers.items():
                part = reference.part(p, name)
                if name == "feed_forward":
                    added = reference.feed_forward(part, config, x)
                else:
                    there = memory if name == "cross_attention" else x
                    causal = side == "decoder" and name == "self_attention"
                    allowed = reference.allowed_pairs(n, len(there), causal=causal)
                    q = reference.heads(part, "query", "H", x)
                    k = reference.heads(part, "key", "G", there)
                    v = reference.heads(part, "value", "G", there)
                    for key, array in (("q_HTK", q), ("k_GSK", k), ("v_GSK", v)):
                        seen += same(values[key], array.swapaxes(0, 1), axis=1)
                    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
                    hidden = np.where(allowed, scores, -np.inf)
                    weights = np.exp(hidden) / np.exp(hidden).sum(-1, keepdims=True)
                    seen += same(values["scores_HTS"], scores, axis=(1, 2))
                    seen += same(values["weights_HTS"], weights, axis=(1, 2))
                    assert not np.array(values["weights_HTS"])[:, :n, len(there) :].any()
                    told_pairs = np.array(values["allowed_TS"])[:n]
                    np.testing.assert_array_equal(told_pairs[:, : len(there)], allowed)
                    assert not told_pairs[:, len(there) :].any()
                    added = reference.multi_head(part, config, x, there, allowed, places)
                x = reference.norm(reference.part(p, f"{name}_norm"), x + added)
                seen += same(values["added_norm_T"], np.linalg.norm(added, axis=-1))
                seen += same(values["stream_norm_T"], np.linalg.norm(x, axis=-1))
            if side == "decoder":  # post-norm: the lens needs no further norm
                seen += candidates(run["lens"][layer], x @ numbers["embedding_VD"].T, target)
        memory = x
    seen += candidates(run["steps"], x @ numbers["embedding_VD"].T, target)
    assert seen > 1000
    told = {key for key in run if key not in ("without", "translation")}
    assert told == {*tokens, "steps", "lens", "hypotheses", "beam"}  # the last two: below


def same(told, expected, axis=0):
    """Compares the places that are not PAD; returns how many numbers there were."""
    told = np.array(told)
    for one in np.atleast_1d(axis):
        told = np.take(told, range(expected.shape[one]), axis=one)
    np.testing.assert_allclose(told, expected, rtol=1e-3, atol=1e-4)
    return told.size


def candidates(told, logits_TV, target):
    logits_TV = np.array(logits_TV)
    logits_TV[:, :3] = -np.inf  # PAD, UNK and BOS are never written
    for at, logits_V, token in zip(told, logits_TV, target, strict=True):
        p = reference.softmax(logits_V)
        assert at["chosen"]["id"] == token
        assert at["rank"] == (p > p[token]).sum() + 1
        for one in [at["chosen"], *at["candidates"]]:
            assert one["probability"] == pytest.approx(p[one["id"]], rel=1e-3, abs=1e-6)
        best = np.sort(p)[::-1][: len(at["candidates"])]
        found = [one["probability"] for one in at["candidates"]]
        np.testing.assert_allclose(found, best, rtol=1e-3, atol=1e-6)
    return sum(len(at["candidates"]) + 1 for at in told)


def test_the_search_is_that_of_the_translator(translator, page):
    expected = translator.translate([SENTENCES[0]], n_best=CONFIG.decode.beam)[0]
    found = page["runs"][0]["hypotheses"]
    assert [one["text"] for one in found] == [one.text for one in expected]
    np.testing.assert_allclose([h["score"] for h in found], [e.score for e in expected], rtol=1e-3)


def test_the_log_probabilities_of_the_search_are_the_models(translator, page):
    run = page["runs"][0]
    source_BS = np.array([page["source"]["ids"]], np.int32)
    names = pieces(translator.tokenizer, range(translator.tokenizer.vocab_size))
    read = jax.jit(recorded)
    for step in run["beam"]:
        for one in step:
            ids = [names.index(piece) for piece in one["pieces"]]
            batch = batch_of(source_BS, ids, Ablation())
            log_TV = log_probabilities(
                logits(translator.model, read(translator.model, batch)[0])[0]
            )
            expected = sum(float(row[token]) for row, token in zip(log_TV, ids, strict=True))
            assert one["log_probability"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_hypothesis_is_kept_from_step_to_step(page):
    beam = page["runs"][0]["beam"]
    before = [[]]
    for step in beam:
        assert sum(one["fate"] == "grows" for one in step) <= CONFIG.decode.beam
        assert all(one["pieces"][:-1] in before for one in step)
        totals = [one["log_probability"] for one in step]
        assert totals == sorted(totals, reverse=True)
        before = [one["pieces"] for one in step if one["fate"] == "grows"]


def test_a_head_that_is_taken_away_adds_nothing(translator):
    cut = Ablation(heads=tuple(("cross", 0, head) for head in range(HEADS)))
    told = walk(translator, SENTENCES[0], cut)
    whole, without = (run["decoder"]["layers"][0]["cross_attention"] for run in told["runs"])
    assert min(whole["added_norm_T"]) > 0.01
    bias = ablated(translator.model, cut).decoder.blocks.cross_attention.output_bias_D[0]
    np.testing.assert_allclose(without["added_norm_T"], np.linalg.norm(bias), atol=1e-6)
    assert trees.flatten(translator.model)["decoder/blocks/cross_attention/output_HKD"].any()


def test_masks_and_positions_can_be_left_out(translator):
    told = walk(translator, SENTENCES[0], Ablation((), False, False, False))
    whole, without = told["runs"]
    assert without["without"] == ["--no-positions", "--no-causal-mask", "--no-pad-mask"]
    pads = np.array(without["encoder"]["layers"][0]["self_attention"]["weights_HTS"])[..., -PADS:]
    assert pads.max() > 0.1
    own = np.array(without["decoder"]["layers"][0]["self_attention"]["weights_HTS"])
    assert own[:, 0, 1:].max() > 1e-3
    plain = np.array(whole["decoder"]["layers"][0]["self_attention"]["weights_HTS"])
    assert not plain[:, 0, 1:].any()
    assert whole["encoder"]["input_TD"] != whole["encoder"]["embedding_TD"]
    assert without["encoder"]["input_TD"] == without["encoder"]["embedding_TD"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [("head=2.1", "layers 1 to 1"), ("encoder=1.9", "heads 1 to 4"), ("3.5", "LAYER.HEAD")],
)
def test_a_head_that_is_not_there(asked, said):
    with pytest.raises(UserError, match=said):
        parse(CONFIG.model, [asked])


def test_sentences_that_cannot_be_shown(translator):
    with pytest.raises(UserError, match="nothing to explain"):
        walk(translator, "  ")
    with pytest.raises(UserError, match="a page can show 64"):
        walk(translator, "建" * 200)


def test_text_cannot_break_the_page(translator):
    html = render(walk(translator, "</script><b>"))
    assert html.count("</script>") == 4
    assert "<b>" not in html.split("<h1>")[1].split("</h1>")[0]
    assert jax.tree.leaves(json.loads(html.split('id="walk">')[1].split("</script>")[0]))
