"""What a person can get wrong on the command line of `train.py`, in one process."""

import sys
from pathlib import Path

import pytest

from jaxformer.command_line import load_config
from jaxformer.errors import UserError

STEVE = str(Path(__file__).parent.parent / "configs" / "steve.py")

FILES = {
    "def get_config(:\n": "is no Python at line 1: invalid syntax",
    "import nothere\n": r"fails at line 1 \(ModuleNotFoundError: No module named 'nothere'\)",
    "\ndef get_config():\n    return 1 / 0\n": r"fails at line 3 \(ZeroDivisionError: ",
    "\ndef get_config():\n    return int('x')\n": r"fails at line 3 \(ValueError: invalid literal",
    "def get_config(preset):\n    return {}\n": "needs a preset",
    "x = 1\n": "has no function get_config",
}


@pytest.fixture(autouse=True)
def _fresh_config_module(monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)


@pytest.mark.parametrize("text", FILES)
def test_a_config_file_that_fails_is_told_with_its_line(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--config={path} {FILES[text]}") as told:
        load_config(str(path), [])
    assert "\n" not in str(told.value)
    assert "Traceback" not in str(told.value)


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("configs/gone.py", [], "--config=configs/gone.py: there is no such file"),
        (str(Path(STEVE).parent), [], "there is no such file"),
        ("", [], "there is no such file"),
        (f"{STEVE}:huge", [], "steve.py:huge has no presets; leave out :huge"),
        (STEVE.replace("steve.py", "zh_en.py:huge"), [], "choose one of laptop, full"),
        (STEVE, ["--config.model.d_modle=8"], "did you mean 'd_model'"),
        (STEVE, ["--config.modle.d_model=8"], "did you mean 'model'"),
        (STEVE, ["--config.model.d_model=abc"], "--config.model.d_model=abc"),
        (STEVE, ["--config.model.remat=maybe"], "--config.model.remat=maybe"),
        (STEVE, ["workdir=runs/x"], "'workdir=runs/x' is no flag; write --NAME=VALUE"),
    ],
)
def test_what_cannot_be_is_one_sentence(config, overrides, words):
    with pytest.raises(UserError, match=words) as told:
        load_config(config, overrides)
    assert "\n" not in str(told.value)
    assert "Traceback" not in str(told.value)


def test_a_mistake_inside_a_library_is_no_mistake_of_the_config_file(monkeypatch):
    def broken(self, argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr("absl.flags.FlagValues.__call__", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        load_config(STEVE, [])
