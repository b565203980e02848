"""``chunkplan plan`` as a user types it."""

import json
import pickle
import subprocess
import sys

import pytest


@pytest.fixture
def tiny(models_dir):
    """The beginning of every plan here: a tiny model."""
    return ("plan", "--model", models_dir / "smollm2-135m-instruct", "--seq-len", "64")


def test_a_plan_that_fits(chunkplan, tiny):
    done = chunkplan(*tiny, "--chunks", "8", "--gpu", "rtx-4090")
    assert (done.returncode, done.stderr) == (0, "")
    assert "smollm2-135m-instruct (181,056 parameters) on rtx-4090" in done.stdout
    assert "8 chunks, descending, 1 update each, states kept" in done.stdout
    assert "fits: up to " in done.stdout
    for word in ("weights", "allocated", "reserved", "device", "upper bound", "tokens/s"):
        assert word in done.stdout


def test_json_has_the_whole_plan(in_process, tiny):
    done = in_process(*tiny, "--chunks", "8", "--gpu", "rtx-4090", "--order", "random", "--states", "reset", "--json")
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert sum(plan["peak"]["breakdown"].values()) == plan["peak"]["allocated_bytes"]
    assert len(plan["chunks"]) == 8
    assert plan["request"]["training"]["schedule"]["order"] == "random"


def test_a_plan_that_does_not_fit_says_by_how_much(in_process, tiny):
    done = in_process(*tiny, "--chunks", "8", "--gpu", "rtx-4090", "--memory-limit", "0.1GiB")
    assert done.returncode == 3
    assert "does not fit" in done.stdout
    assert done.stderr.startswith("chunkplan: does not fit: up to ")
    assert done.stderr.count("\n") == 1


def test_auto_names_the_schedule_that_it_chose(in_process, tiny):
    done = in_process(*tiny, "--gpu", "rtx-4090", "--auto")
    assert done.returncode == 0
    assert "all parameters at once" in done.stdout or " chunks, " in done.stdout


def test_auto_shows_what_else_there_is(in_process, tiny):
    done = in_process(*tiny, "--gpu", "rtx-4090", "--auto")
    assert "What auto found" in done.stdout
    assert "fastest that fits with nothing else changed" in done.stdout


def test_the_largest_batch_that_fits(in_process, tiny):
    limit = ("--gpu", "rtx-4090", "--chunks", "2", "--memory-limit", "0.6GiB", "--max", "micro-batch-size")
    done = in_process(*tiny, *limit)
    assert done.returncode == 0, done.stderr
    value = int(done.stdout.partition("Largest micro-batch-size that fits: ")[2].split()[0])
    assert f"Not larger: micro_batch_size {value + 1} lacks " in done.stdout
    found = json.loads(in_process(*tiny, *limit, "--json").stdout)
    assert (found["value"], found["plan"]["fits"]) == (value, True)
    nothing = in_process(*tiny, *limit[:-3], "1MiB", *limit[-2:])
    assert nothing.returncode == 3
    assert nothing.stderr.startswith("chunkplan: no micro-batch-size fits: ")


def test_several_devices_and_methods(in_process, tiny):
    asked = (*tiny, "--chunks", "2", "--compare", "rtx-4090,nosuch:chunkft,full")
    done = in_process(*asked)
    assert done.returncode == 0, done.stderr
    assert "no GPU named 'nosuch'" in done.stdout
    entries = json.loads(in_process(*asked, "--json").stdout)
    assert [entry["plan"] is None for entry in entries] == [False, False, True, True]


def test_what_fits_a_device_and_what_holds_a_model(in_process):
    done = in_process("gpus", "--model", "gpt2", "--seq-len", "16", "--chunks", "1", "--limit", "1", "--json")
    (smallest,) = json.loads(done.stdout)
    assert (smallest["model"], smallest["fits"]) == ("gpt2", True)
    nothing = in_process("models", "--gpu", '{"name": "toy", "memory_bytes": 1000000}')
    assert nothing.returncode == 3
    assert "weights alone are" in nothing.stdout


def test_a_local_folder_and_a_device_of_ones_own(in_process, models_dir):
    device = json.dumps({"name": "bench", "memory_bytes": 8 << 30})
    folder = models_dir / "smollm2-135m-instruct"
    for model in (folder, folder / "config.json"):
        done = in_process("plan", "--model", model, "--gpu", device, "--seq-len", "64", "--chunks", "2")
        assert done.returncode == 0, done.stderr
        assert "on bench" in done.stdout


def test_updates_in_backward_turn_clipping_off(in_process, tiny):
    done = in_process(*tiny, "--chunks", "8", "--gpu", "rtx-4090", "--update-in-backward", "--json")
    training = json.loads(done.stdout)["request"]["training"]
    assert (training["update_in_backward"], training["max_grad_norm"]) == (True, None)


def test_a_picture(in_process, tiny, tmp_path):
    path = tmp_path / "footprint.png"
    done = in_process(*tiny, "--chunks", "8", "--gpu", "rtx-4090", "--plot", path)
    assert done.returncode == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["t.json", "t.perfetto.json", "t.pickle"])
def test_a_timeline(in_process, tiny, tmp_path, name):
    path = tmp_path / name
    done = in_process(*tiny, "--chunks", "8", "--gpu", "rtx-4090", "--timeline", path)
    assert done.returncode == 0
    assert f"timeline written to {path}" in done.stdout
    content = path.read_bytes()
    if name == "t.pickle":
        assert set(pickle.loads(content)) >= {"segments", "device_traces"}
        other = in_process(*tiny, "--chunks", "8", "--gpu", "rtx-4090", "--timeline", path, "--chunk", "5")
        assert other.returncode == 0
        assert path.read_bytes() != content
    else:
        assert ("traceEvents" in json.loads(content)) == (name == "t.perfetto.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nosuch", "--gpu", "cpu"), "model: no model named 'nosuch'"),
        (("--model", "gpt2", "--gpu", "nosuch"), "gpu: no GPU named 'nosuch'"),
        (("--model", "gpt2", "--gpu", "{"), "gpu: not valid JSON"),
        (("--model", "gpt2", "--gpu", '{"name": "x"}'), "gpu.memory_bytes: Field required"),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--chunks", "0"), "training.schedule.num_chunks: "),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--chunks", "999999"), "training.schedule.num_chunks: "),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--optimizer", "magic"), "training.optimizer: "),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--memory-limit", "lots"), "memory_limit_bytes: must be a size"),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--auto", "--chunks", "4"), "training.schedule: --auto chooses"),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--max", "speed"), "max: must be seq-len or micro-batch-size"),
        (("--model", "gpt2", "--compare", "nosuch"), "gpu: no GPU named 'nosuch'"),
        (("--model", "gpt2", "--compare", "h200:magic"), "training.method: "),
        (("--model", "./nowhere", "--gpu", "rtx-4090"), "model.path: cannot read"),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--plot", "a.bmp"), "plot: must end in .png"),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--timeline", "a.csv"), "timeline: must end in .perfetto.json"),
        (("--model", "gpt2", "--gpu", "rtx-4090", "--chunk", "0"), "chunk: says of whose step"),
        (("--model", "gpt2", "--seq-len", "many"), "Invalid value for '--seq-len'"),
        (("--model", "gpt2", "--colour", "red"), "No such option: --colour"),
        ((), "Missing option '--model'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(in_process, arguments, message):
    done = in_process("plan", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"chunkplan: {message}")
    assert done.stderr.count("\n") == 1


HEAVY = ("torch", "transformers", "fastapi", "sqlalchemy", "uvicorn", "matplotlib")


def test_a_cached_plan_imports_nothing_heavy(chunkplan, in_process, tiny):
    arguments = [*map(str, tiny), "--chunks", "8", "--gpu", "rtx-4090"]
    assert in_process(*arguments).returncode == 0
    code = (
        "import sys; from chunkplan.service.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=chunkplan.environment, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_help_without_a_verb(in_process):
    done = in_process()
    assert done.returncode == 2
    assert in_process("--help").returncode == 0
    for verb in ("plan", "train", "serve", "submit", "jobs", "profiles", "models", "gpus", "db"):
        assert verb in done.stdout + done.stderr
        assert in_process(verb, "--help").returncode == 0


def test_catalogs(in_process):
    models = json.loads(in_process("models", "--json").stdout)
    gpus = json.loads(in_process("gpus", "--json").stdout)
    assert "llama-3-8b" in {model["id"] for model in models}
    assert "rtx-4090" in {gpu["name"] for gpu in gpus}
    assert "llama-3-8b" in in_process("models").stdout
    assert "rtx-4090" in in_process("gpus").stdout


def test_a_reader_that_has_seen_enough(chunkplan):
    process = chunkplan.start("gpus")
    process.stdout.close()
    assert process.wait(timeout=60) in (0, 1)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
