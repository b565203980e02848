"""What the documents name exists, and can be read in a terminal."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
MAX_COLUMNS = 110
_CODE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_PLACES = "engine|planner|service|tests|benchmarks|docs|migrations|deploy|examples|src|crash"
_PATH = re.compile(rf"`((?:{_PLACES})/[\w./-]*)`")
_NAME = re.compile(r"`(chunkplan\.(?:engine|planner|service)(?:\.\w+)+)(?:\(|`)")
_MADE = re.compile(r"^ *New file `([^`]+)`:$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!http|#)([^)#]+)")


def prose(text):
    """(line number, line) of what is neither code nor a table."""
    for number, line in enumerate(_CODE.sub(lambda found: "\n" * found[0].count("\n"), text).splitlines(), 1):
        if not line.startswith(("    ", "|")) and "](" not in line:
            yield number, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_ends_at_the_column(path):
    assert [number for number, line in prose(path.read_text()) if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_exists(path):
    text = path.read_text()
    if "decisions" in path.parts or path.name == "CHANGELOG.md":  # of their time
        return
    bases = (ROOT, ROOT / "tests", path.parent)
    names = {*_PATH.findall(text), *_LINK.findall(text)} - {*_MADE.findall(text)}
    assert [name for name in names if not any((base / name).exists() for base in bases)] == []
    assert [name for name in _NAME.findall(text) if not is_importable(name)] == []


def is_importable(name):
    """A module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_outsiders_see_what_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert any(step.get("run") == "bash .ci/run" for step in job["steps"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(path.read_text()).keys()


def test_examples_in_docstrings_hold():
    modules = [
        ".".join(["chunkplan", *path.relative_to(ROOT).with_suffix("").parts])
        for package in ("engine", "planner", "service")
        for path in (ROOT / package).rglob("*.py")
        if ">>> " in path.read_text()
    ]
    assert modules
    results = [doctest.testmod(importlib.import_module(name)) for name in modules]
    assert sum(result.failed for result in results) == 0


def test_the_glossary_is_short_and_of_words_in_use():
    words = re.findall(r"^\| \*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert 20 <= len(words) <= 30
    code = "".join(
        path.read_text() for package in ("engine", "planner", "service") for path in (ROOT / package).rglob("*.py")
    )
    assert [word for word in words if not re.search(rf"\b{re.escape(word.split(',')[0])}", code, re.IGNORECASE)] == []
