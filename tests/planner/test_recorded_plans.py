"""Plans say what they said before: a part of the recorded requests, of every kind. All of them take six
minutes.
"""

import json

import pytest

from benchmarks.recorded_plans import FILE, answered

ROWS = json.loads(FILE.read_text())
_PER_MODEL = 3


def chosen():
    """Every refusal, and a few requests for each model that is given inline: tiny ones, with all options in
    turn.
    """
    seen = {}
    for row in ROWS:
        model = row["request"]["model"]
        name = model["config"]["model_type"] if isinstance(model, dict) else None
        seen[name] = seen.get(name, 0) + 1
        if "field" in row["answer"] or (name is not None and seen[name] % _PER_MODEL == 1):
            yield row


@pytest.mark.parametrize("row", list(chosen()), ids=lambda row: str(ROWS.index(row)))
def test_a_recorded_request_is_answered_as_before(row, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # decides what kernels of the CPU take
    assert answered(row["request"]) == row["answer"]


def test_the_record_has_every_kind():
    answers = [row["answer"] for row in ROWS]
    asked = [row["request"]["training"] for row in ROWS]
    assert len(ROWS) >= 300
    assert sum("field" in answer for answer in answers) >= 20
    assert {training.get("method", "chunkft") for training in asked} == {"chunkft", "full", "lora"}
    assert {training.get("optimizer", "adamw") for training in asked} >= {"adamw8bit", "adafactor", "lion", "sgd"}
