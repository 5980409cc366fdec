"""The study note names only what exists; pages run, open in a browser and notice broken code."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTE = (ROOT / "docs" / "note.md").read_text(encoding="utf-8")
PAGES = sorted(set(re.findall(r"\]\((tour/[^)]+\.md)\)", NOTE)))
SITE = sorted(
    path.relative_to(ROOT / "docs").with_suffix("").as_posix()
    for folder in ("docs", "docs/tour")
    for path in (ROOT / folder).glob("*.md")
)
NAMES = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", NOTE)))


def test_every_row_names_page_function_and_test():
    rows = [line for line in NOTE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 25
    for row in rows:
        assert re.search(r"tour/\w+\.md.*`jaxformer/\S+::\w+`.*`tests/\S+::test_\w+`", row), row


@pytest.mark.parametrize("page", PAGES)
def test_the_page_exists(page):
    assert (ROOT / "docs" / page).is_file()


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_the_function_or_test_exists(path, name):
    module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    assert name in {node.name for node in module.body if isinstance(node, kinds)}


BREAKS = {
    "04_self_attention": (
        "jaxformer/attention/reference.py",
        "jnp.asarray(K**-0.5, q_BTHK.dtype)",
        "jnp.asarray(1.0, q_BTHK.dtype)",
    ),
    "05_encoder": (
        "jaxformer/model/transformer.py",
        "mask = Mask(segments_BS, segments_BS)",
        "mask = Mask()",
    ),
    "06_decoder": (
        "jaxformer/model/transformer.py",
        "Mask(segments_BT, segments_BT, causal=causal)",
        "Mask(segments_BT, segments_BT)",
    ),
    "07_loss": (
        "jaxformer/data/batches.py",
        '"targets_BT": target.ending_with(EOS)',
        '"targets_BT": target.beginning_with(BOS)',
    ),
    "08_norms": (
        "jaxformer/model/layers.py",
        "jnp.square(x32).mean(-1, keepdims=True)",
        "jnp.square(x32).mean((0, 1), keepdims=True)",
    ),
}
"""For each page, what of the code it is to notice: the root of d_k, masks, the shift, the norm."""


def needed() -> Path:
    """The trained model that pages look into; skips where it or the docs extra is missing."""
    pytest.importorskip("myst_nb", reason="needs the docs extra: make docs")
    workdir = Path(os.environ.get("JAXFORMER_WORKDIR") or ROOT / "runs" / "steve").absolute()
    if not (workdir / "checkpoints").is_dir():
        pytest.skip(f"no trained model in {workdir}; `make docs` trains one")
    return workdir


def surroundings(code: Path, workdir: Path) -> dict[str, str]:
    """The environment of a reader, not that of the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return kept | {"PYTHONPATH": str(code), "JAXFORMER_WORKDIR": str(workdir)}


def run_page(name: str, code: Path) -> str:
    """Executes a page on the package in `code`; returns the error, "" if there is none."""
    workdir = needed()
    from myst_nb.core.read import read_myst_markdown_notebook
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    text = (ROOT / "docs" / "tour" / f"{name}.md").read_text(encoding="utf-8")
    notebook = read_myst_markdown_notebook(text)
    environment = surroundings(code, workdir)
    where = {"metadata": {"path": str(ROOT / "docs" / "tour")}}
    try:
        NotebookClient(notebook, timeout=300, resources=where).execute(env=environment)
    except CellExecutionError as error:
        return error.ename
    return ""


@pytest.mark.long
@pytest.mark.parametrize("name", BREAKS)
def test_broken_code_turns_its_page_red(name, tmp_path):
    path, right, wrong = BREAKS[name]
    shutil.copytree(ROOT / "jaxformer", tmp_path / "jaxformer")
    text = (tmp_path / path).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / path).write_text(text.replace(right, wrong), encoding="utf-8")
    assert run_page(name, tmp_path) == "AssertionError"


@pytest.fixture(scope="module")
def site():
    """The site, built as `make docs` does, which runs all pages that did not run before."""
    environment = surroundings(ROOT, needed())
    built = ROOT / "docs" / "_build" / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(built)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return built


# Building runs every page, so no test does it a second time.
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SITE)
def test_a_page_opens_in_both_languages(site, tab, name):
    tab.goto((site / f"{name}.html").as_uri())
    width = tab.viewport_size["width"]
    for language, other in (("zh", "en"), ("en", "zh")):
        tab.locator(f"#languages button[value={language}]").click()
        assert tab.evaluate("document.documentElement.dataset.language") == language
        assert not tab.locator(f".{other}:visible").count()
        shown = tab.locator(f".{language}:visible").count()
        assert shown == tab.locator(f".{language}").count()
        assert shown or not (name.startswith("tour/") or name in ("index", "note"))
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    cut = tab.evaluate(
        """[...document.querySelectorAll(".cell_output img, .cell_output svg")].filter(
            e => e.getBoundingClientRect().right > innerWidth).length"""
    )
    assert not cut
    assert tab.evaluate("[...document.images].every(e => e.complete && e.naturalWidth)")
