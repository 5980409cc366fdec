"""`jaxformer translate`: as many lines out as in, or one sentence and exit code 2."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from inference_cases import SENTENCES, write_run

from jaxformer import cli
from jaxformer.inference.decode import Sampling
from jaxformer.inference.translator import Translator

pytestmark = pytest.mark.xdist_group("translator")

INPUT = "".join(f"{line}\n" for line in SENTENCES).encode()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def translate(workdir, monkeypatch, capsys):
    """Runs the command: (exit code, stdout, stderr)."""

    def run(*flags, stdin=INPUT, workdir=workdir):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            cli.main(["translate", "--workdir", str(workdir), *map(str, flags)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def assert_one_sentence(result, words):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def outputs(workdir, lines):
    return "".join(f"{text}\n" for text in Translator.load(workdir)(lines))


def test_a_shell_pipe_translates(workdir):
    command = [Path(sys.executable).with_name("jaxformer"), "translate", "--workdir", workdir]
    # What goes through a pipe is UTF-8, whatever the terminal speaks.
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input=INPUT, capture_output=True, timeout=120, env=env)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert done.stdout.decode() == outputs(workdir, list(SENTENCES))
    assert not done.stdout.isascii()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0.5"], "--temperature, --top_k and --top_p belong to --sample"),
        (["--top_k", "3"], "belong to --sample"),
        (["--beam", "0"], "beam is 0; it must be at least 1."),
        (["--n_best", "0"], "n_best is 0; it must be at least 1."),
        (["--n_best", "9", "--beam", "4"], "n_best=9 needs a beam of at least 9; it is 4."),
        (["--n_best", "3"], "n_best=3 needs a beam of at least 3; it is 2."),
        (["--alpha", "nan"], "alpha is nan; it must be at least 0."),
        (["--alpha", "inf"], "alpha is inf; it must be"),
        (["--alpha", "-1"], "alpha is -1.0; it must be at least 0."),
        (["--sample", "--top_p", "2"], "top_p is 2.0; it must be above 0 and at most 1."),
        (["--sample", "--top_p", "0"], "top_p is 0.0"),
        (["--sample", "--top_k", "-1"], "top_k is -1; it must be 0 (all tokens) or more."),
        (["--sample", "--temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["--sample", "--temperature", "nan"], "temperature is nan"),
        (["--sample", "--n_best", "2"], "n_best must be 1"),
        (["--sample", "--beam", "2"], "leave out --beam"),
        (["--sample", "--alpha", "1"], "leave out --alpha"),
        (["--sample", "--seed", str(2**70)], "seed is 1180591620717411303424"),
        (["--average", "0"], "average=0 checkpoints cannot be averaged"),
        (["--average", "9"], "holds 2 usable checkpoints, too few to average 9"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be_met_are_one_sentence(translate, flags, words):
    assert_one_sentence(translate(*flags), words)


def test_flags_are_refused_before_anything_is_read(translate, monkeypatch):
    monkeypatch.setattr(Translator, "load", None)  # would fail if it were called
    assert_one_sentence(translate("--beam", "0", "--input", "absent"), "beam is 0")


@pytest.mark.parametrize("left", ["", "checkpoints", "checkpoints/1.partial"])
def test_a_workdir_without_a_checkpoint_is_one_sentence(translate, tmp_path, left):
    (tmp_path / "run" / left).mkdir(parents=True)
    for workdir in (tmp_path / "run", tmp_path / "absent"):
        assert_one_sentence(translate(workdir=workdir), f"{workdir} holds no checkpoint; train")


def test_an_input_that_cannot_be_read_is_one_sentence(translate, tmp_path):
    for path, words in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        assert_one_sentence(translate("--input", path), f"--input={path} cannot be read: {words}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "is not a file"),
        (".", "is not a file"),
        ("pipe", "is not a file"),
        ("absent/out.txt", "cannot be written"),
        ("kept.txt/out.txt", "cannot be written"),
        ("x" * 250, "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_known_before_work_begins(
    translate, tmp_path, monkeypatch, name, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "kept.txt").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Translator, "load", None)  # would fail if it were called
    assert_one_sentence(translate("--output", name), f"--output={name} {words}")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_an_output_is_replaced_when_all_is_written_and_not_before(
    translate, workdir, tmp_path, monkeypatch
):
    source, target = tmp_path / "in.txt", tmp_path / "[bold].txt"
    source.write_bytes(INPUT)
    target.write_text("before")
    flags = ("--input", source, "--output", target)
    for cause in (("--average", "9"), ("--beam", "0")):
        assert translate(*flags, *cause)[0] == 2
        assert target.read_text() == "before"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
        assert_one_sentence(translate(*flags), f"--output={target} cannot be written: full")
    assert target.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}

    code, out, err = translate(*flags)
    assert (code, out, err) == (0, "", f"3 lines translated, written to {target}\n")
    assert target.read_text(encoding="utf-8") == outputs(workdir, list(SENTENCES))
    assert {path.name for path in tmp_path.iterdir()} == {source.name, target.name}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_one_sentence(translate, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=full))
        assert_one_sentence(translate(), "stdout cannot be written: No space left on device.")


def test_no_lines_give_no_lines(translate, tmp_path, monkeypatch):
    monkeypatch.setattr(Translator, "load", None)  # would fail if it were called
    assert translate(stdin=b"") == (0, "", "")
    (tmp_path / "empty").touch()
    code, out, _ = translate("--input", tmp_path / "empty", "--output", tmp_path / "out")
    assert (code, out, (tmp_path / "out").read_bytes()) == (0, "", b"")


@pytest.mark.parametrize(
    ("stdin", "lines", "warnings"),
    [
        ("你在\n\n 他\n".encode(), ["你在", "", "他"], []),
        ("你在\n他".encode(), ["你在", "他"], []),
        ("\ufeff你在\r\n他\r\n".encode(), ["你在", "他"], []),
        ("他\n你\0在\0\n".encode(), ["他", "你在"], ["line 2: a NUL byte at byte 4 was left out"]),
        (b"a\n\n\xffb\n", ["a", "", "�b"], ["line 3: not UTF-8 at byte 1, read as �"]),
        ("你在".encode()[:-1], ["你�"], ["line 1: not UTF-8 at byte 4, read as �"]),
        (
            ("你\n" + "史蒂夫" * 30 + "\n").encode(),
            ["你", "史蒂夫" * 30],
            ["line 2: too long for the model; translated in "],
        ),
    ],
    ids=["blank", "no_end", "bom_crlf", "nul", "not_utf8", "cut_off", "long"],
)
def test_odd_lines_are_kept_and_named(translate, workdir, stdin, lines, warnings):
    code, out, err = translate(stdin=stdin)
    assert (code, out) == (0, outputs(workdir, lines))
    said = err.splitlines()
    assert len(said) == len(warnings)
    for got, want in zip(said, warnings, strict=True):
        assert got.startswith(f"warning: {want}")


def test_many_lines_show_no_progress_where_nobody_looks(translate, workdir):
    code, out, err = translate(stdin=INPUT * 30)
    assert (code, err) == (0, "")
    assert out == outputs(workdir, list(SENTENCES)) * 30


def test_n_best_is_number_score_text(translate, workdir):
    code, out, _ = translate("--n_best", 2, stdin=INPUT + b"\n")
    found = Translator.load(workdir).translate([*SENTENCES, ""], n_best=2)
    wanted = [
        [str(number), f"{hypothesis.score:.4f}", hypothesis.text]
        for number, hypotheses in enumerate(found, 1)
        for hypothesis in hypotheses
    ]
    assert (code, [row.split("\t") for row in out.splitlines()]) == (0, wanted)
    assert wanted[-1] == ["4", "0.0000", ""]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--beam 1", {"beam": 1}),
        ("--alpha 0", {"alpha": 0.0}),
        ("--sample --temperature 3 --seed 1", {"sampling": Sampling(3.0), "seed": 1}),
        ("--sample --temperature 3 --seed 2", {"sampling": Sampling(3.0), "seed": 2}),
        ("--sample --top_k 1", {"sampling": Sampling(top_k=1)}),
        ("--sample --top_p 0.01", {"sampling": Sampling(top_p=0.01)}),
    ],
)
def test_flags_are_the_settings_of_translate(translate, workdir, monkeypatch, flags, settings):
    seen = {}
    whole = Translator.translate

    def spy(translator, lines, **given):
        seen.update(given)
        return whole(translator, lines, **given)

    monkeypatch.setattr(Translator, "translate", spy)
    code, out, _ = translate(*flags.split())
    assert (code, out.count("\n")) == (0, len(SENTENCES))
    unset = {"beam": None, "alpha": None, "n_best": 1, "sampling": None, "seed": 0}
    assert {name: seen[name] for name in unset} == unset | settings


def test_a_damaged_newest_checkpoint_is_said_and_passed_over(translate, workdir, tmp_path, caplog):
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "checkpoints" / "2" / "meta.json").write_text("{}")
    code, out, _ = translate(workdir=copy)
    assert code == 0
    assert "2 is damaged (meta.json has changed" in caplog.text
    assert out == outputs(copy, list(SENTENCES)) != outputs(workdir, list(SENTENCES))
