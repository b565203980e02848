"""The chaos run, short: see `benchmarks.chaos`."""

import shutil

import pytest

from benchmarks.chaos import chaos

CASES = {"sqlite": (2, ["server", "trainer"]), "postgres": (1, ["both"])}


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_when_everything_is_killed(empty_database_url, tmp_path, trace_cache):
    num_jobs, deck = CASES["sqlite" if empty_database_url.startswith("sqlite") else "postgres"]
    shutil.copytree(trace_cache, tmp_path / "traces")
    result = chaos(tmp_path, empty_database_url, num_jobs, deck, seed=1)
    assert result["violations"] == []
    assert sum(result["kills"].values()) == len(deck)
    assert result["jobs"] >= num_jobs
    assert result["checked"]["jobs succeeded"] > 0
