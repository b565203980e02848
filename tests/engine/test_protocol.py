"""The worker's protocol as its page tells it, against the module that both sides use."""

import re
from pathlib import Path

from chunkplan.engine import protocol
from chunkplan.engine.protocol import EVENTS, Event
from tests.support.runs import events_of, exit_code, prepare_run, start_worker

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()


def rows(head):
    """Cells of the rows of the table whose first line begins so."""
    table = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_page_lists_the_exit_codes():
    codes = {value for name, value in vars(protocol).items() if name.startswith("EXIT_")}
    assert {int(row[0]) for row in rows("| exit code | meaning |")} == codes


def test_the_page_lists_every_event_with_its_fields():
    table = {row[0].strip("`"): row[1] for row in rows("| `type` | fields")}
    assert set(table) == set(EVENTS)
    for kind, model in EVENTS.items():
        named = set(re.findall(r"`(\w+)`", table[kind]))
        assert set(model.model_fields) - set(Event.model_fields) <= named, kind


def test_a_run_writes_nothing_that_the_models_do_not_know(tmp_path):
    run = prepare_run(tmp_path, max_steps=6, eval_every=3, checkpoint_every=3)
    assert exit_code(start_worker(run)) == 0
    events = events_of(run)
    assert {event["type"] for event in events} >= {"loading", "started", "step", "eval", "checkpoint", "finished"}
    for event in events:
        assert set(event) == set(EVENTS[event["type"]].model_fields)
