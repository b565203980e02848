"""Rules of the house that no tool knows."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "planner", "service")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MAX_LINES, MAX_MODULES = 450, 12
COMMAND_LINE = ROOT / "service" / "cli"
"""One module for each verb: it may hold more."""


def docstrings(tree):
    """Every docstring of a module: its own, of classes and functions, and of attributes."""
    for node in ast.walk(tree):
        for item in getattr(node, "body", []) if isinstance(getattr(node, "body", []), list) else []:
            if (
                isinstance(item, ast.Expr)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            ):
                yield item.lineno, item.value.value.strip()


def test_no_class_name_occurs_twice():
    homes = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_can_be_read_without_the_name_above_them(package):
    found = [
        f"{path.relative_to(ROOT)}:{line} {text.splitlines()[0]}"
        for path in MODULES
        if path.is_relative_to(ROOT / package)
        for line, text in docstrings(ast.parse(path.read_text()))
        if text.startswith(("Of ", "The same", "And "))
    ]
    assert found == []


def test_no_file_is_more_than_one_story():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_room_is_too_full():
    rooms = defaultdict(int)
    for path in MODULES:
        if path.name != "__init__.py" and path.parent != COMMAND_LINE:
            rooms[str(path.parent.relative_to(ROOT))] += 1
    assert {room: count for room, count in rooms.items() if count > MAX_MODULES} == {}
