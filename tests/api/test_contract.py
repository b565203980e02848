"""The service keeps to its own description: the short form of ``make contract``."""

import pytest

from benchmarks.contract import check

pytestmark = pytest.mark.slow


def test_made_up_requests_are_answered_as_described(tmp_path):
    found = check(tmp_path, ["--phases", "examples,fuzzing", "--max-examples", "3", "--seed", "1"])
    for given, run in found.items():
        assert run["failures"] == [], given
        assert run["exit_code"] == 0, given
        assert run["cases"] > 100, given
