"""A run that is killed again and again, or whose newest checkpoint is damaged, ends where an undisturbed run
ends."""

import os
import random
import shutil
import subprocess
import sys

import psutil
import pytest

from tests.engine.training.test_checkpoint import cut_short, flip_a_bit
from tests.support.runs import ROOT, events_of, prepare_run, worker_env

NUM_KILLS = 10
NUM_STEPS = 80
EVERY = 4
SETTINGS = {
    "max_steps": NUM_STEPS,
    "checkpoint_every": EVERY,
    "eval_every": 20,
    "schedule": {"num_chunks": 4, "switch_every": 2, "order": "random"},
}
_FORKS = """
import os, sys
# Imported once; every attempt is a process of its own.
import chunkplan.engine.training.trainer, chunkplan.engine.worker
for line in sys.stdin:
    run_dir, number = line.split()
    child = os.fork()
    if child == 0:
        with open(os.path.join(run_dir, "attempts", number, "log.txt"), "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        sys.argv = ["chunkplan.engine.worker", "--run-dir", run_dir, "--attempt", number]
        os._exit(chunkplan.engine.worker.main())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Worker:
    """One attempt, a real process that can be killed."""

    def __init__(self, forks, run, number):
        self._events = run / "attempts" / str(number) / "events.jsonl"
        self._events.parent.mkdir(parents=True)
        self._forks = forks
        forks.stdin.write(f"{run} {number}\n")
        forks.stdin.flush()
        self.pid = int(forks.stdout.readline())

    def until(self, num_checkpoints, num_steps=0):
        """Return when the attempt has reported that many checkpoints, and then that many updates more."""
        log, mark = b"", 0
        while log[mark:].count(b'"type": "step"') < num_steps or not mark:
            assert psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE, self._events.with_name("log.txt")
            os.sched_yield()
            log = self._events.read_bytes() if self._events.exists() else b""
            if log.count(b'"type": "checkpoint"') >= num_checkpoints:
                mark = mark or len(log)

    def wait(self):
        """Its exit code."""
        return int(self._forks.stdout.readline())


@pytest.fixture(scope="module")
def forks():
    """Starts workers without importing torch every time."""
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKS],
        cwd=ROOT,
        env=worker_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    with process:
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    run = prepare_run(tmp_path_factory.mktemp("undisturbed"), **SETTINGS)
    assert Worker(forks, run, 1).wait() == 0
    return run


def losses_of(run, attempts):
    """Loss by update: what was taken again must be what was taken before."""
    losses = {}
    for attempt in attempts:
        for event in events_of(run, attempt, "step"):
            assert losses.setdefault(event["step"], event["loss"]) == event["loss"]
    return losses


def assert_same_result(run, undisturbed, attempts):
    assert losses_of(run, attempts) == losses_of(undisturbed, [1])
    expected = (undisturbed / "artifacts" / "tuned" / "model.safetensors").read_bytes()
    assert (run / "artifacts" / "tuned" / "model.safetensors").read_bytes() == expected
    evaluations = {event["step"]: event["loss"] for n in attempts for event in events_of(run, n, "eval")}
    assert evaluations == {event["step"]: event["loss"] for event in events_of(undisturbed, 1, "eval")}


def test_ten_kills_at_random_updates_change_nothing(forks, undisturbed, tmp_path):
    run = prepare_run(tmp_path, **SETTINGS)
    chance, died_at = random.Random(17), []
    for attempt in range(1, NUM_KILLS + 1):
        worker = Worker(forks, run, attempt)
        worker.until(num_checkpoints=1, num_steps=chance.randint(0, 3))
        os.kill(worker.pid, 9)
        assert worker.wait() == -9
        died_at.append(events_of(run, attempt, "step")[-1]["step"])
    print("died after updates", died_at)
    assert died_at == sorted(died_at)
    assert died_at[-1] < NUM_STEPS
    assert len({update % EVERY for update in died_at}) > 1, "not always at the same distance from a checkpoint"
    assert Worker(forks, run, NUM_KILLS + 1).wait() == 0
    resumed = [event["resumed_step"] for n in range(2, NUM_KILLS + 2) for event in events_of(run, n, "started")]
    assert all(
        step > 0 and step % EVERY == 0 and died - step < 2 * EVERY for step, died in zip(resumed, died_at, strict=True)
    )
    assert_same_result(run, undisturbed, range(1, NUM_KILLS + 2))
    # The time left is judged by this attempt's own updates.
    steps = events_of(run, NUM_KILLS + 1, "step")
    for i in (0, 1):
        mean = sum(step["seconds"] for step in steps[: i + 1]) / (i + 1)
        assert steps[i]["eta_seconds"] == pytest.approx((NUM_STEPS - steps[i]["step"]) * mean)
    assert steps[-1]["eta_seconds"] == 0.0


@pytest.fixture(scope="module")
def stopped(forks, tmp_path_factory):
    """A run that was killed when it had two checkpoints."""
    run = prepare_run(tmp_path_factory.mktemp("stopped"), **SETTINGS)
    worker = Worker(forks, run, 1)
    worker.until(num_checkpoints=3)
    os.kill(worker.pid, 9)
    worker.wait()
    return run


def edit_manifest(path):
    path.write_text(path.read_text().replace('"num_updates": ', '"num_updates": 1', 1))


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        ("chunk-00001.safetensors", cut_short, "chunk-00001.safetensors is damaged or missing"),
        ("chunk-00002.safetensors", flip_a_bit, "chunk-00002.safetensors is damaged or missing"),
        ("manifest.json", edit_manifest, "its manifest is damaged"),
    ],
)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    forks, undisturbed, stopped, tmp_path, file, damage, sentence
):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    older, newest = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    damage(run / "checkpoints" / newest / file)
    assert Worker(forks, run, 2).wait() == 0
    (warning,) = [event["detail"] for event in events_of(run, 2, "warning")]
    assert warning == f"checkpoint passed over: {newest}: {sentence}"
    assert events_of(run, 2, "started")[0]["resumed_step"] == int(older.removeprefix("step-"))
    assert_same_result(run, undisturbed, [1, 2])
