"""One translation for every line, in order, whatever the lines are."""

import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_cases import CHARACTERS, CONFIG, SENTENCES, state, tokenizer, write_run
from training_cases import change

from jaxformer.errors import UserError
from jaxformer.inference import translator as module
from jaxformer.inference.decode import Sampling, beam_search
from jaxformer.inference.translator import Translator

pytestmark = pytest.mark.xdist_group("translator")

HOT = Sampling(temperature=3.0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def translator(workdir):
    return Translator.load(workdir)


def some_lines(count, longest, seed=0):
    """Lines of 1 to `longest` characters, which is about as many tokens."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(CHARACTERS, n)) for n in rng.integers(1, longest + 1, count)]


def assert_weights(translator, *steps):
    """The weights are the mean of those of the steps."""
    states = [state(step)["params"] for step in steps]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *states)
    for got, want in zip(jax.tree.leaves(translator.model), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_a_moved_workdir_is_all_that_load_needs(workdir, translator, tmp_path):
    moved = Translator.load(shutil.copytree(workdir, tmp_path / "elsewhere"))
    assert (moved.step, moved.config) == (2, CONFIG)
    assert moved.tokenizer.to_bytes() == tokenizer().to_bytes()
    assert_weights(moved, 2)
    lines = list(SENTENCES)
    assert moved(lines) == translator(lines)


def test_average_is_the_mean_of_the_last_checkpoints(workdir):
    averaged = Translator.load(workdir, average=2)
    assert averaged.step == 2
    assert_weights(averaged, 1, 2)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(workdir, tmp_path, caplog):
    copy = shutil.copytree(workdir, tmp_path / "run")
    for path in (copy / "checkpoints" / "2" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    fallen_back = Translator.load(copy)
    assert fallen_back.step == 1
    assert_weights(fallen_back, 1)
    assert "2 is damaged" in caplog.text


@pytest.mark.parametrize("left", [(), ("checkpoints",), ("checkpoints/2.partial",)])
def test_a_workdir_without_a_whole_checkpoint_says_how_to_make_one(tmp_path, left):
    for part in left:
        (tmp_path / part).mkdir(parents=True)
    for workdir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"holds no checkpoint; train it first with python"):
            Translator.load(workdir)


@pytest.mark.parametrize("average", [0, -1, 3])
def test_an_average_of_checkpoints_that_are_not_there_is_refused(workdir, average):
    with pytest.raises(UserError, match=rf"average={average} |too few to average {average}"):
        Translator.load(workdir, average=average)


anything = st.one_of(
    st.text(max_size=60),
    st.text(" \t\r\n\0\x0b\u2028\u3000\ufeff▁", max_size=5),
    st.sampled_from(["", "😀👩‍👩‍👧", "史" * 500, "a" * 500, "。！？" * 30, "\ud800", *SENTENCES]),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(anything, max_size=8))
def test_every_line_gets_one_line(translator, lines):
    translations = translator.translate(lines, beam=1)
    assert len(translations) == len(lines)
    for line, hypotheses in zip(lines, translations, strict=True):
        (best,) = hypotheses
        assert best.text == " ".join(best.text.split())
        assert np.isfinite(best.score)
        if not line.strip():
            assert (best.text, best.tokens, best.warning) == ("", (), "")


def test_a_line_break_that_the_model_spells_is_a_space(translator):
    drawn = translator.translate(some_lines(40, 14), sampling=HOT)
    raw = tokenizer().decode([hypotheses[0].tokens for hypotheses in drawn])
    assert any(len(text.splitlines()) > 1 for text in raw)  # or this test shows nothing
    for (best,), text in zip(drawn, raw, strict=True):
        assert best.text == " ".join(text.split())


@pytest.mark.parametrize("beam", [1, 2], ids=["greedy", "beam"])
def test_order_and_neighbours_change_no_translation(translator, beam):
    lines = ["", *some_lines(40, 28), " ", "史蒂夫" * 30, *SENTENCES]
    together = translator.translate(lines, beam=beam, n_best=beam)
    for line, hypotheses in zip(lines, together, strict=True):
        (alone,) = translator.translate([line], beam=beam, n_best=beam)
        assert [h.text for h in hypotheses] == [h.text for h in alone]
        np.testing.assert_allclose([h.score for h in hypotheses], [h.score for h in alone], 1e-3)
    assert len({hypotheses[0].text for hypotheses in together}) > len(lines) / 2


def test_padding_changes_no_translation(translator, monkeypatch):
    lines = some_lines(8, 14)
    wanted = translator.translate(lines, beam=1)
    monkeypatch.setattr(module, "BUCKETS", (32,))
    for (padded,), (close,) in zip(translator.translate(lines, beam=1), wanted, strict=True):
        assert padded.text == close.text
        assert padded.score == pytest.approx(close.score, rel=1e-3)


def test_a_line_too_long_for_the_model_is_translated_sentence_by_sentence(translator):
    parts = [part.strip() for _ in range(4) for part in SENTENCES]
    (whole,) = translator.translate(["".join(parts)], n_best=2)
    ranks = zip(*translator.translate(parts, n_best=2), strict=True)
    for hypothesis, each in zip(whole, ranks, strict=True):
        assert hypothesis.text == " ".join(part.text for part in each if part.text)
        assert hypothesis.tokens == tuple(token for part in each for token in part.tokens)
        assert hypothesis.score == pytest.approx(sum(part.score for part in each), rel=1e-5)
        assert hypothesis.warning == f"too long for the model; translated in {len(parts)} pieces"


def test_fifty_thousand_characters_without_an_end_are_one_line(translator):
    before = beam_search._cache_size()
    ((best,), (after,)) = translator.translate(["史" * 50_000, SENTENCES[0]])
    tokens = len(tokenizer().encode(["史" * 50_000])[0])
    assert f"translated in {-(-tokens // 31)} pieces" in best.warning
    assert best.text
    assert not after.warning
    assert beam_search._cache_size() - before <= 2


def test_files_of_mixed_lengths_share_a_handful_of_programs(translator):
    config = change(CONFIG, model__max_length=1024, decode__tokens_per_batch=1024)
    roomy = Translator(translator.model, translator.tokenizer, config)
    sizes = [beam_search._cache_size()]
    for seed in (1, 2):
        lines = some_lines(300, 200, seed)
        longest = max(map(len, tokenizer().encode(lines)))
        assert 128 < longest < 256
        assert not any(h[0].warning for h in roomy.translate(lines))
        sizes.append(beam_search._cache_size())
    assert 1 < sizes[1] - sizes[0] <= 6
    assert sizes[2] == sizes[1]


def test_n_best_are_different_and_sorted(translator):
    lines = ["", *some_lines(6, 14)]
    found = translator.translate(lines, n_best=2)
    assert [h.text for h in found[0]] == ["", ""]
    for first, second in found[1:]:
        assert first.score > second.score
        assert first.tokens != second.tokens
    best = translator.translate(lines)
    assert [[h.tokens for h in row] for row in best] == [[row[0].tokens] for row in found]


def test_alpha_divides_scores_by_a_power_of_the_length(translator):
    lines = some_lines(6, 14)
    plain, penalised = (translator.translate(lines, n_best=2, alpha=alpha) for alpha in (0.0, 0.6))
    shared = 0
    for before, after in zip(plain, penalised, strict=True):
        score = {h.tokens: h.score for h in before}
        for h in after:
            if h.tokens in score:
                length = min(len(h.tokens) + 1, CONFIG.decode.max_length)  # with EOS, if it came
                assert h.score == pytest.approx(score[h.tokens] * (6 / (5 + length)) ** 0.6, 1e-4)
                shared += 1
    assert shared


def test_a_beam_of_one_is_greedy(translator):
    lines = some_lines(6, 14)
    greedy = translator.translate(lines, beam=1)
    assert greedy == translator.translate(lines, sampling=Sampling(top_k=1))
    assert greedy != translator.translate(lines, beam=2)


def test_a_line_is_drawn_by_seed_and_place_alone(translator):
    def draw(*lines, seed=5):
        drawn = translator.translate([*lines, "你", "你"], sampling=HOT, seed=seed)
        return [hypotheses[0].text for hypotheses in drawn[: len(lines)]]

    line = SENTENCES[0]
    first, second = draw(line, line)
    assert first != second
    assert draw(line, line) == [first, second]
    assert draw(line, line, seed=6) != [first, second]
    # Lines before it that stay empty, or are taken in pieces, do not move it.
    for other in ("", line * 9):
        assert draw(other, line)[1] == second
    (pieces,) = draw(line * 999)
    assert pieces == " ".join(pieces.split())  # though some pieces come out empty
    assert pieces.startswith(first)
    assert first not in pieces.removeprefix(first)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_best": 3}, "n_best=3 needs a beam of at least 3; it is 2"),
        ({"n_best": 2, "sampling": HOT}, "n_best must be 1"),
        ({"n_best": 0}, "n_best is 0"),
        ({"beam": 0}, "beam is 0"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature is 0.0"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
        ({"sampling": Sampling(temperature=float("inf"))}, "temperature is inf"),
        ({"sampling": Sampling(top_p=2.0)}, "top_p is 2.0"),
        ({"sampling": Sampling(top_k=-1)}, "top_k is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(translator, settings, words):
    with pytest.raises(UserError, match=words):
        translator.translate(["你"], **settings)
