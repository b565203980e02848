"""Traces of these tests live in a folder of their own."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def trace_cache(tmp_path_factory):
    """An empty trace cache, shared by the tests of one worker."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("traces")
        patch.setenv("CHUNKPLAN_CACHE_DIR", str(folder))
        yield folder
