"""What surrounds the steps of a run, against real runs of the worker: loading, evaluations, checkpoints."""

import json

import pytest

from benchmarks.accuracy_cases import CONFIGS, case
from chunkplan.planner import PlanRequest, plan
from tests.support.runs import events_of, exit_code, start_worker, write_job
from tests.support.tiny import tiny_llama, tiny_tokenizer

SHAPE = {
    "vocab_size": 8003,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TRAINING = {"seq_len": 128, "micro_batch_size": 4, "activation_checkpointing": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with more weights than anything else of a run takes, and rows that fill their sequences."""
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("phases")
    tiny_llama(**SHAPE).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    row = json.dumps({"text": "the title of a metal worker is welder " * 60})
    (folder / "rows.jsonl").write_text((row + "\n") * 60)
    return folder


RUNS = {
    "fp32, two updates per visit": {"precision": "fp32", "schedule": {"num_chunks": 3, "switch_every": 2}},
    "bf16, states reset": {"precision": "bf16", "schedule": {"num_chunks": 3, "states": "reset"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_phases_around_the_steps_are_what_a_run_measures(folder, tmp_path, name):
    training = TRAINING | RUNS[name]
    run = write_job(
        tmp_path / "run", folder / "base", folder / "rows.jsonl",
        max_steps=4, eval_every=1, checkpoint_every=1, **training,
    )  # fmt: skip
    assert exit_code(start_worker(run)) == 0, (run / "attempts" / "1" / "log.txt").read_text()
    request = {"model": {"path": str(folder / "base")}, "gpu": "cpu", "training": training}
    answer = plan(PlanRequest.model_validate(request))
    predicted = {phase.phase: phase.allocated_bytes for phase in answer.phases}
    measured = {
        kind: max(event["samples"][0]["allocated_bytes"] for event in events_of(run, kind=kind)[1:])
        for kind in ("eval", "checkpoint")
    }
    assert len(events_of(run, kind="eval")) == 5
    assert measured["eval"] == pytest.approx(predicted["evaluation"], rel=0.01)
    assert measured["checkpoint"] == pytest.approx(predicted["checkpoint"], rel=0.01)
    load = events_of(run, kind="step")[0]["samples"][0]
    assert load["phase"] == "load"
    assert load["allocated_bytes"] == pytest.approx(predicted["load"], rel=0.005)
    steps = [sample for event in events_of(run, kind="step") for sample in event["samples"]]
    highest = max(sample["allocated_bytes"] for sample in steps)
    assert max(measured.values()) < highest, "the peak is a step's"
    everything = [s for kind in ("eval", "checkpoint") for event in events_of(run, kind=kind) for s in event["samples"]]
    assert max(sample["host_bytes"] for sample in steps + everything) <= answer.peak.upper_bytes


EVALUATED = [
    case("llama-tied", loss="standard"),
    case("gpt2", activation_checkpointing="none", precision="bf16"),
    case("gemma2", micro_batch_size=1),
    case("mixtral", num_chunks=9),
    case("bert", num_chunks=3),
    case("t5", num_chunks=3),
    case("llama", num_chunks=3, packing=True),
    case("llama", num_chunks=1, method="lora"),
]


@pytest.mark.parametrize("gpu", ["rtx-4090", "cpu"])
@pytest.mark.parametrize("item", EVALUATED, ids=lambda item: item.name)
def test_only_steps_can_be_the_peak(item, gpu):
    request = {"model": {"config": CONFIGS[item.model]}, "gpu": gpu, "training": item.training}
    answer = plan(PlanRequest.model_validate(request))
    phases = {phase.phase: phase.allocated_bytes for phase in answer.phases}
    steps = {"forward", "backward", "optimizer"}
    assert set(phases) == steps | {"load", "loss", "switch", "evaluation", "checkpoint", "export"}
    assert max(phases.values()) == answer.peak.allocated_bytes
    assert max(phases, key=lambda phase: phases[phase]) in steps
    assert phases["evaluation"] <= phases["forward"]
    assert phases["load"] <= phases["switch"] <= phases["checkpoint"] <= phases["evaluation"]


def test_a_gpus_host_must_hold_files_states_and_copies():
    training = {"precision": "bf16", "schedule": {"num_chunks": 4}}
    request = {"model": {"config": CONFIGS["llama"]}, "gpu": "rtx-4090", "training": training}
    answer = plan(PlanRequest.model_validate(request))
    host = {phase.phase: phase.host_bytes for phase in answer.phases}
    num_parameters = answer.model.num_parameters
    process = host["load"] - 2 * num_parameters
    assert host["forward"] - process == pytest.approx(8 * num_parameters, rel=0.01), "AdamW's fp32 moments"
    assert host["export"] - host["forward"] == 2 * num_parameters
    assert host["checkpoint"] - host["forward"] == 2 * max(chunk.num_parameters for chunk in answer.chunks)
    assert answer.peak.host_bytes == max(host.values())
    assert all(phase.host_bytes is None for phase in plan(PlanRequest.model_validate(request | {"gpu": "cpu"})).phases)
