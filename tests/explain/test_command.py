"""`jaxformer explain` on a run: what it writes, and what it says of mistakes."""

import json

import pytest
from inference_cases import SENTENCES, write_run
from matplotlib.figure import Figure

from jaxformer.cli import main
from jaxformer.explain import figures


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("explain") / "run")


def explain(workdir, *more):
    main(["explain", SENTENCES[0], "--workdir", str(workdir), *map(str, more)])


def test_page_figure_and_json(workdir, tmp_path, capsys):
    explain(workdir, "-o", tmp_path / "page.html")
    assert SENTENCES[0] in (tmp_path / "page.html").read_text("utf-8")
    figure = ("--figure", "cross_attention", "--layer", 1, "--head", 2)
    explain(workdir, *figure, "-o", tmp_path / "x.png")
    explain(workdir, *figure, "-o", tmp_path / "x.svg")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "x.svg").read_text("utf-8")
    capsys.readouterr()
    explain(workdir, "--json", "--ablate", "head=1.2")
    told = json.loads(capsys.readouterr().out)
    assert [run["without"] for run in told["runs"]] == [[], ["--ablate cross=1.2"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "x.png", "x.svg"]


def test_every_figure_is_drawn(workdir):
    from jaxformer import Translator
    from jaxformer.explain.ablation import Ablation
    from jaxformer.explain.figures import FIGURES, View, draw
    from jaxformer.explain.walk import walk

    told = walk(Translator.load(workdir), SENTENCES[0], Ablation(positions=False))
    for name in FIGURES:
        assert len(draw(told, name, View()).axes) >= 2


@pytest.mark.parametrize("name", ["x.png", "x.svg"])
def test_characters_that_no_font_knows_are_one_sentence(tmp_path, monkeypatch, recwarn, name):
    figure = Figure()
    figure.suptitle("字")
    monkeypatch.setattr(figures, "fonts", lambda: {"svg.fonttype": "none"})
    told = figures.save(figure, tmp_path / name, tmp_path / name)
    assert (told is None) == (name == "x.svg")
    assert told is None or "fonts-noto-cjk" in told
    assert not recwarn.list


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--figure", "weights", "--layer", "9", "-o", "x.png"], "layers 1 to 1"),
        (["--figure", "weights", "--head", "0", "-o", "x.png"], "heads 1 to 4"),
        (["--figure", "weight", "-o", "x.png"], "known: candidates"),
        (["--figure", "weights", "--step", "99", "-o", "x.png"], "has 1 to"),
        (["--figure", "weights", "-o", "x.pdf"], ".png or .svg"),
        (["-o", "nowhere/x.html"], "cannot be written"),
        (["--json", "--figure", "weights"], "leave out"),
        (["--alignments", "-o", "x.png"], "a whole split"),
        ([], "Name the file"),
    ],
)
def test_mistakes(workdir, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        explain(workdir, *flags)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_workdir(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        explain(tmp_path / "none", "-o", tmp_path / "x.html")
    assert stop.value.code == 2
    assert "none" in capsys.readouterr().err
