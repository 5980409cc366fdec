"""Word alignments read from cross-attention."""

import jax.numpy as jnp
import numpy as np
from inference_cases import CONFIG, SENTENCES, state, tokenizer

from jaxformer import Translator, trees
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.explain.alignment import (
    Aligned,
    batch_of,
    best_readout,
    error_rate,
    links,
    shares,
    votes,
    word_votes,
)
from jaxformer.model import recorded


def test_error_rate_and_shares():
    assert error_rate([frozenset({(0, 0), (1, 2)})], [frozenset({(0, 0), (1, 1), (2, 2)})]) == 0.6
    assert error_rate([frozenset({(0, 0)})], [frozenset({(0, 0)})]) == 0
    pieces = ["▁史蒂", "夫建", "<0xE9>", "<0x80>", "<0xA0>", "▁"]
    found = shares(pieces, ["史蒂夫", "建造"])
    assert found.tolist() == [[1, 0], [0.5, 0.5], [0, 1], [0, 1], [0, 1], [0, 0]]


def test_votes_are_what_a_head_brings_from_a_token_to_the_logit():
    model = state(2)["params"]
    said = [7, 9, EOS]
    batch = batch_of([[5, 6, 8, EOS]], [[BOS, *said[:-1]]])
    _, record = recorded(model, batch)
    cross = {k: np.float64(v) for k, v in record["decoder"]["cross_attention"].items()}
    numbers = {k: np.float64(v) for k, v in trees.flatten(model).items()}
    output_LHKD = numbers["decoder/blocks/cross_attention/output_HKD"]
    table_VD = numbers["embedding_VD"]
    last_TD = np.float64(record["decoder"]["feed_forward"]["stream_BTD"][-1, 0])
    found = np.asarray(votes(model, batch, jnp.array([said])))
    L, _, H, T, S = found.shape
    assert (T, S) == (3, 4)
    for layer, h, t, s in np.ndindex(L, H, T, S):
        group = h * cross["v_BSGK"].shape[3] // H
        brought_D = cross["weights_BHTS"][layer, 0, h, t, s] * (
            cross["v_BSGK"][layer, 0, s, group] @ output_LHKD[layer, h]
        )
        if "decoder/norm/scale_D" in numbers:
            size = np.sqrt((last_TD[t] ** 2).mean())
            brought_D = brought_D * numbers["decoder/norm/scale_D"] / size
        logits_V = table_VD @ brought_D
        np.testing.assert_allclose(
            found[layer, 0, h, t, s], logits_V[said[t]] - logits_V.mean(), rtol=1e-4, atol=1e-5
        )


def test_words_have_the_votes_of_their_pieces():
    zh, en = SENTENCES[0], "Steve builds"
    translator = Translator(state(2)["params"], tokenizer(), CONFIG, 2)
    sentence = Aligned(
        (SENTENCES[0],), ("Steve", "builds"), frozenset(), SENTENCES[0], "Steve builds"
    )
    (found,) = word_votes(translator, [sentence])
    source, target = (translator.tokenizer.encode([text])[0] for text in (zh, en))
    batch = batch_of([[*source, EOS]], [[BOS, *target]])
    by_piece = np.asarray(votes(translator.model, batch, jnp.array([[*target, EOS]])))[:, 0]
    letters = [piece != "▁" for piece in translator.tokenizer.pieces(source)]
    to_sentence_LHT = by_piece[:, :, : len(target), : len(source)][..., letters].sum(-1)
    in_word = shares(translator.tokenizer.pieces(target), ("Steve", "builds")) > 0
    for word in range(2):
        mean_LH = to_sentence_LHT[:, :, in_word[:, word]].mean(-1)
        np.testing.assert_allclose(found[:, :, word, 0], mean_LH, rtol=1e-3, atol=1e-4)


def test_a_readout_finds_the_heads_that_align():
    rng = np.random.default_rng(0)
    right = [frozenset(enumerate(rng.permutation(size).tolist())) for size in (3, 4, 5) * 5]
    told = []
    for linked in right:
        one = rng.normal(0, 1, (2, 2, len(linked), len(linked)))
        one[:, 1] *= 0.01
        for c, e in linked:  # heads 1.2 and 2.2 know each a part
            one[c % 2, 1, e, c] = 2.0
        told.append(one)
    readout = best_readout(told, right)
    assert set(readout.heads) == {(0, 1), (1, 1)}
    assert [links(one, readout) for one in told] == right
