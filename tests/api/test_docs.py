"""Every curl of the service's pages is run as it stands there, in the order of the pages."""

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def commands(page):
    """The words of every curl command in a page's code blocks."""
    code = "\n".join(line[4:] for line in (DOCS / page).read_text().splitlines() if line.startswith("    "))
    found = re.findall(r"""^curl (?:[^'"\\\n]|\\\n|'[^']*'|"[^"]*")*""", code, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " "))[1:] for command in found]


def run(client, words):
    """What the service answers to a curl command."""
    method, url, headers, content, files, form = None, None, {}, None, {}, {}
    words = iter(words)
    for word in words:
        if word == "-X":
            method = next(words)
        elif word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value
        elif word == "-d":
            content = next(words)
        elif word == "-F":
            name, _, value = next(words).partition("=")
            if value.startswith("@"):
                files[name] = (value[1:], Path(value[1:]).read_bytes())
            else:
                form[name] = value
        elif word != "-N":
            assert url is None, word
            url = f"http://{word}"
    method = method or ("POST" if content or files else "GET")
    return client.request(method, url, headers=headers, content=content, files=files or None, data=form or None)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_examples_work_one_after_the_other(client, services, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_bytes(dataset.read_bytes())
    known, num_commands = {}, 0

    def run_page(page):
        nonlocal num_commands
        for words in commands(page):
            expanded = [re.sub(r"\$([A-Z_]+)", lambda name: known[name[1]], word) for word in words]
            answer = run(client, expanded)
            assert answer.status_code < 300, (words, answer.text)
            num_commands += 1
            if answer.headers["content-type"] == "application/json":
                body = answer.json()
                kind = "plan" if "planner_version" in body else body.get("object", "timeline")
                known[kind.upper()] = body.get("id")

    run_page("service.md")
    access = services.access
    known["CHUNKPLAN_API_KEY"] = access.create(
        name="docs", project="default", scopes=["submit", "admin"], expires_at=None
    )[1]
    run_page("security.md")
    assert num_commands == 17
