"""Scores against sacrebleu itself, what is shown, and the page that holds it."""

import re

import pytest
import sacrebleu
from rich.console import Console

from jaxformer import evaluate, report
from jaxformer.config import Config
from jaxformer.data.pairs import Pair
from jaxformer.errors import UserError
from jaxformer.evaluate import Domain, Evaluation, Sample, Scores
from jaxformer.inference.translator import Translation

TRAIN = [
    Pair("我看见房子", "I see the house", "home"),
    Pair("你建造桥", "you build a bridge", "work"),
]
TEST = [
    Pair("我看见桥", "I see the bridge now", "home"),
    Pair("你建造房子", "you build a new house", "work"),
    Pair("他看见房子", "he sees the old house", "home"),
]


class Echo:
    """A translator that has learned one sentence."""

    step = 7

    def __init__(self, **data):
        self.config = Config.of({"data": {"target": "en", **data}})

    def translate(self, lines, **_):
        learned = {"我看见桥": "I see the bridge now"}
        return [[Translation(learned.get(line, "a house"), -1.0, (5,))] for line in lines]


@pytest.fixture
def evaluated(monkeypatch):
    texts = {"train": TRAIN, "test": TEST, "valid": []}
    monkeypatch.setattr(evaluate, "load", lambda data, split: texts[split])
    return lambda split="test", **options: evaluate.evaluate(Echo(), split, **options)


def test_each_domain_is_scored_as_sacrebleu_scores_it(evaluated):
    found = evaluated(beam=2)
    assert [(d.name, d.pairs) for d in found.domains] == [("home", 2), ("work", 1), ("all", 3)]
    references = ["I see the bridge now", "he sees the old house"]
    for outputs, scores in (
        (["I see the bridge now", "a house"], found.domains[0].model),
        (["I see the house", "I see the house"], found.domains[0].floor),
    ):
        bleu = sacrebleu.corpus_bleu(outputs, [references]).score
        chrf = sacrebleu.corpus_chrf(outputs, [references]).score
        assert (scores.bleu, scores.chrf) == (round(bleu, 2), round(chrf, 2))
    assert found.domains[0].model.bleu > found.domains[0].floor.bleu
    assert (found.step, found.beam, found.alpha, found.floor_pairs) == (7, 2, 0.6, 2)
    assert all(re.search(r"nrefs:1\|.*version:2", line) for line in found.signatures)


@pytest.mark.parametrize(
    ("language", "tokenizer"), [("zh", "zh"), ("zh_cn", "zh"), ("ja", "char"), ("de", "13a")]
)
def test_words_are_counted_as_the_language_writes_them(language, tokenizer):
    bleu, chrf = evaluate._metrics(language)
    evaluate.score((bleu, chrf), ["a"], ["a"])
    assert f"tok:{tokenizer}|" in str(bleu.get_signature())


def test_a_split_without_pairs_is_one_sentence(evaluated):
    with pytest.raises(UserError, match=r"config\.data\.valid holds no sentence pairs"):
        evaluated("valid")


def test_samples_are_short_and_from_all_domains_and_always_the_same():
    pairs = [
        Pair(f"{domain}{i}" + "长" * i, "", domain) for domain in "abc" for i in range(0, 99, 3)
    ]
    chosen = evaluate.sample_indices(pairs)
    assert len(chosen) == len(set(chosen)) == 10
    assert [pairs[i].domain for i in chosen] == [*"abcabcabca"]
    assert all(len(pairs[i].source) <= 60 for i in chosen)
    again = evaluate.sample_indices(list(reversed(pairs)))
    assert {pairs[i] for i in chosen[:3]} == {pairs[len(pairs) - 1 - i] for i in again[:3]}


def test_an_evaluation_is_read_back_as_it_was_saved(evaluated, tmp_path):
    found = evaluated()
    assert Evaluation.read(tmp_path, "test") is None
    assert found.save(tmp_path).name == "evaluation.test.json"
    assert Evaluation.read(tmp_path, "test") == found
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.test.json"]


RECORDS = [
    {"step": s, "loss": 3.0, "nll": 2.5 - s / 100, "learning_rate": 1e-3, "seconds": 2.0}
    | {"tokens_per_second": 100.0, "share_of_peak": 0.5}
    for s in range(10, 60, 10)
] + [{"step": 50, "valid_nll": 2.4, "valid_accuracy": 0.5}]


def test_the_page_needs_no_network_and_escapes_what_the_model_says(evaluated, tmp_path):
    found = evaluated()
    sample = Sample("home", "<script>x</script>", "a & b", "")
    domain = Domain("<b>", 1, Scores(1.0, 9.0), Scores(2.0, 8.0))
    values = {**vars(found), "samples": (sample,), "domains": (domain,)}
    lines = "".join(f"{record}\n".replace("'", '"') for record in RECORDS)
    (tmp_path / "metrics.jsonl").write_text(lines)
    path = report.write(tmp_path, Config(), Evaluation(**values))
    page = path.read_text(encoding="utf-8")
    assert "&lt;script&gt;x" in page
    assert "<script" not in page
    assert "a &amp; b" in page
    assert not re.search(r"(src|href)=.https?:|url\(http|@import", page)
    assert '<td class="bad">1.0</td>' in page
    assert '<td class="good">9.0</td>' in page
    assert dict(report.facts(RECORDS, Config()))["time in steps 训练用时"] == "0.2 min"


def test_the_curves_are_those_of_the_log():
    loss, rate, speed = report.curves(RECORDS).axes
    train, valid = loss.lines
    assert train.get_xydata().tolist() == [[s, 2.5 - s / 100] for s in range(10, 60, 10)]
    assert valid.get_xydata().tolist() == [[50, 2.4]]
    assert rate.lines[0].get_ydata().tolist() == [1e-3] * 5
    assert speed.lines[0].get_ydata().tolist() == [100.0] * 5


def test_a_run_without_log_or_scores_still_has_a_page(tmp_path):
    page = report.write(tmp_path, Config(), None).read_text(encoding="utf-8")
    assert "<svg" not in page
    assert "BLEU" not in page


def test_the_table_shows_scores_beside_the_floor(evaluated, capsys):
    evaluate.show(evaluated(), Console(width=100))
    shown = capsys.readouterr().out
    assert re.search(r"home +│ +2 │", shown)
    assert "output     I see the bridge now" in shown
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in shown
