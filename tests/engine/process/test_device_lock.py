"""Who may be on a device: one alone, or several whose shares fit together, for as long as they live."""

import subprocess
import sys

import pytest

from chunkplan.engine.process.device_lock import Share, lock_device


@pytest.fixture
def path(tmp_path):
    return tmp_path / "locks" / "cuda-0.lock"


def share(num_bytes, max_holders=3):
    return Share(num_bytes, device_bytes=100, max_holders=max_holders)


@pytest.fixture
def hold(path):
    """Locks the device; what is still held at the end is released."""
    everything = []

    def hold(share=None):
        held = lock_device(path, share)
        everything.extend(held or [])
        return held

    yield hold
    release(everything)


def release(held):
    for file in held:
        file.close()


def test_shares_fit_together_or_wait(path, hold):
    first, second = hold(share(60)), hold(share(40))
    assert None not in (first, second)
    assert hold(share(1)) is None
    release(first)
    assert hold(share(61)) is None
    assert hold(share(60)) is not None
    assert len(list(path.with_suffix(".shares").glob("*.share"))) == 2, "what a holder left behind is removed"


def test_no_more_holders_than_allowed(hold):
    assert [hold(share(1, max_holders=2)) is None for _ in range(3)] == [False, False, True]


def test_the_whole_device_and_shares_of_it_shut_each_other_out(hold):
    whole = hold()
    assert whole is not None
    assert hold(share(1)) is None
    assert hold() is None
    release(whole)
    part = hold(share(1))
    assert part is not None
    assert hold() is None
    release(part)
    assert hold() is not None


def test_a_share_goes_with_its_process(path, hold):
    program = (
        "import sys; from pathlib import Path; from chunkplan.engine.process.device_lock import Share, lock_device;"
        "held = lock_device(Path(sys.argv[1]), Share(100, 100, 2)); print(bool(held), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        assert hold(share(1)) is None
        holder.kill()
    assert hold(share(100)) is not None
