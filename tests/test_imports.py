"""The house: which folder imports which, and what makes the imports of a script work."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # folder: what it may import of this project
    "norms": {"norms"},
    "models": {"models", "norms"},
    "data": {"data"},
    "training": {"training", "data", "models", "norms"},
    "reporting": {"reporting", "training"},
    "hydra_plugins": {"data", "training", "hydra_plugins"},
    "scripts": {"data", "models", "norms", "reporting", "training"},
}
LIGHT = {"training.config", "training.files"}
LINE = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"


def imported(file):
    """Modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in {*ALLOWED, "benchmarks", "tests"}}


FILES = {folder: sorted((ROOT / folder).glob("*.py")) for folder in ALLOWED}


@pytest.mark.parametrize("folder", ALLOWED)
def test_arrows_go_one_way(folder):
    for file in FILES[folder]:
        assert {name.split(".")[0] for name in imported(file)} <= ALLOWED[folder], file


def test_reporting_takes_only_light_modules_of_training():
    for file in FILES["reporting"]:
        of_training = {name for name in imported(file) if name.startswith("training")}
        assert of_training <= LIGHT, file


@pytest.mark.parametrize("folder", ["reporting", "training"])
def test_no_circle(folder):
    """Within a folder: whatever a module imports is not made of it."""
    arrows = {
        f"{folder}.{file.stem}": {name for name in imported(file) if name.startswith(f"{folder}.")}
        for file in FILES[folder]
    }
    left = dict(arrows)
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle in {sorted(left)}"
        for name in free:
            del left[name]


def test_one_line_makes_the_imports_of_a_script_work():
    for file in FILES["scripts"]:
        text = file.read_text()
        assert text.count("sys.path") == text.count(LINE), file
        assert bool(imported(file)) == (LINE in text), file
    for folder in set(ALLOWED) - {"scripts"}:
        assert not any("sys.path" in file.read_text() for file in FILES[folder])
