"""The house: imports point down, and each foreign library has one door."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jaxformer").rglob("*.py"))


def documented_floors(text: str) -> dict[str, int]:
    """{house: floor} from a Markdown table with the columns "module" and "floor"."""
    floors = {}
    columns = None
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        lower = [cell.lower() for cell in cells]
        if {"module", "floor"} <= set(lower):
            columns = lower.index("module"), lower.index("floor")
        elif columns and len(cells) > max(columns) and cells[columns[1]].isdigit():
            for module in re.findall(r"[\w./]+", cells[columns[0]]):
                house = module.removeprefix("jaxformer.").removesuffix("/").removesuffix(".py")
                floors[house] = int(cells[columns[1]])
        elif columns and not line.lstrip().startswith("|"):
            columns = None
    return floors


# A module may import from lower floors and from its own package.
FLOORS = documented_floors((ROOT / "docs" / "architecture.md").read_text("utf-8"))

# Everything may read the config, its own floor included; so it stands on floor 0 alone.
GROUND = "config"

ONLY_IMPORTERS = {"flax": "model", "orbax": "checkpoint"}


def imports(path: Path) -> set[str]:
    """All that a file imports, inside functions too: "jaxformer.trees.flatten", "jax.numpy"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def house_of(path: Path) -> str:
    """The package or module directly below jaxformer/ that a file belongs to."""
    return path.relative_to(ROOT / "jaxformer").parts[0].removesuffix(".py")


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_down(path):
    house = house_of(path)
    used = {n.split(".")[1] for n in imports(path) if n.startswith("jaxformer.")}
    if house == "__init__":  # the names that the project shows to its users
        return
    assert house in FLOORS, f"{house} has no floor in docs/architecture.md"
    for other in used - {house}:
        assert other in FLOORS, f"{other} has no floor in docs/architecture.md"
        low_enough = FLOORS[other] < FLOORS[house] or (other == GROUND and FLOORS[house] > 0)
        assert low_enough, f"{name(path)} (floor {FLOORS[house]}) imports {other} ({FLOORS[other]})"


@pytest.mark.parametrize(("library", "house"), ONLY_IMPORTERS.items())
def test_a_library_has_one_door(library, house):
    importers = {house_of(path) for path in FILES if library in libraries(path)}
    assert importers == {house}


def test_attention_needs_jax_alone():
    for path in FILES:
        if house_of(path) == "attention":
            foreign = libraries(path) - sys.stdlib_module_names - {"jax"}
            inside = {n for n in imports(path) if n.startswith("jaxformer")}
            assert foreign <= {"jaxformer"}, name(path)
            assert all(n.startswith("jaxformer.attention") for n in inside), name(path)


def test_nothing_imports_tensorflow():
    project = [*FILES, *(ROOT / "configs").glob("*.py"), ROOT / "train.py"]
    assert not [name(path) for path in project if "tensorflow" in libraries(path)]


def test_configs_are_data_only():
    for path in (ROOT / "configs").glob("*.py"):
        assert libraries(path) <= {"ml_collections", "jaxformer", "configs"}, name(path)
        inside = {n.split(".")[1] for n in imports(path) if n.startswith("jaxformer.")}
        assert inside <= {"config"}, name(path)


def test_a_file_does_one_thing():
    lines = {name(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {path for path, count in lines.items() if count > 350}


def test_the_table_is_read_from_markdown():
    text = (
        "| module | what | floor |\n|---|---|---|\n| `serve/`, `a/` | x | 4 |\n| `b.py` | | 1 |\n"
    )
    assert documented_floors(text) == {"serve": 4, "a": 4, "b": 1}
    assert documented_floors("| module | size |\n|---|---|\n| a | 3 |\n") == {}
