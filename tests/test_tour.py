"""The table of the study note names only what exists."""

import ast
import re
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
