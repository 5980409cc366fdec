"""The table of the study note names only what exists; pages run, and notice broken code."""

import ast
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTE = (ROOT / "docs" / "note.md").read_text(encoding="utf-8")
PAGES = sorted(set(re.findall(r"\]\((tour/[^)]+\.md)\)", NOTE)))
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


def run_page(name: str, code: Path) -> str:
    """Executes a page on the package in `code`; returns the error, "" if there is none."""
    myst = pytest.importorskip("myst_nb.core.read", reason="needs the docs extra: make docs")
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    workdir = Path(os.environ.get("JAXFORMER_WORKDIR") or ROOT / "runs" / "steve").absolute()
    if not (workdir / "checkpoints").is_dir():
        pytest.skip(f"no trained model in {workdir}; `make docs` trains one")
    text = (ROOT / "docs" / "tour" / f"{name}.md").read_text(encoding="utf-8")
    notebook = myst.read_myst_markdown_notebook(text)
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"PYTHONPATH": str(code), "JAXFORMER_WORKDIR": str(workdir)}
    where = {"metadata": {"path": str(ROOT / "docs" / "tour")}}
    try:
        NotebookClient(notebook, timeout=300, resources=where).execute(env=environment)
    except CellExecutionError as error:
        return error.ename
    return ""


@pytest.mark.long
@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "docs/tour").glob("*.md"))])
def test_a_page_runs(name):
    assert run_page(name, ROOT) == ""


@pytest.mark.long
@pytest.mark.parametrize("name", BREAKS)
def test_broken_code_turns_its_page_red(name, tmp_path):
    path, right, wrong = BREAKS[name]
    shutil.copytree(ROOT / "jaxformer", tmp_path / "jaxformer")
    text = (tmp_path / path).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / path).write_text(text.replace(right, wrong), encoding="utf-8")
    assert run_page(name, tmp_path) == "AssertionError"
