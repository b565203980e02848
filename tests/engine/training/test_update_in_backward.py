"""Updates within backward: the same weights as updates after it, with no two gradients of a chunk at once."""

import pytest
import torch

from benchmarks.accuracy_cases import CONFIGS, case
from benchmarks.planner_accuracy import measure
from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.spec import TrainingSpec, parse
from chunkplan.engine.training.checkpoint import resume, save_checkpoint
from tests.support.families import FAMILIES, batch_for, tiny_batch, tiny_model


def trained(family, num_updates, dtype=torch.float32, num_chunks=4, **options):
    model = tiny_model(family, dtype)
    with ChunkFT(model, num_chunks, 1e-3, max_grad_norm=None, **options) as tuner:
        for seed in range(num_updates):
            tuner.backward(batch_for(model, seed=seed))
            tuner.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [(family, "full") for family in FAMILIES]
    + [(family, "none") for family in ("llama-tied", "gpt2", "mixtral", "t5")],
)
def test_weights_are_those_of_updates_after_backward(family, checkpointing):
    # Recomputation must not read weights that were updated already, and a tied weight's gradient has two
    # parts.
    for num_chunks, num_updates in ((1, 2), (5, 5)):
        options = {"num_chunks": num_chunks, "activation_checkpointing": checkpointing}
        within = trained(family, num_updates, **options, update_in_backward=True)
        assert torch.equal(within, trained(family, num_updates, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"switch_every": 3},
        {"switch_every": 2, "states": "reset", "master": "fp32"},
        {"master": "residual", "state_dtype": "bf16"},
        {"optimizer": "adamw8bit", "order": "random"},
        {"optimizer": "adafactor", "loss": "standard"},
        {"expansion": "factored", "order": "ascending"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_every_option_gives_the_weights_of_updates_after_backward(family, options):
    # bf16: what stochastic rounding draws must not depend on the order in which gradients are complete.
    within = trained(family, 12, torch.bfloat16, **options, update_in_backward=True)
    assert torch.equal(within, trained(family, 12, torch.bfloat16, **options))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_no_two_gradients_of_a_chunk_exist_together(family, monkeypatch):
    with ChunkFT(tiny_model(family), 2, 1e-3, max_grad_norm=None, update_in_backward=True) as tuner:
        at_once = []
        update_slice = tuner.optimizer.update_slice

        def counted(ordinal, piece):
            at_once.append(sum(other.tensor.grad is not None for other in tuner.active))
            update_slice(ordinal, piece)

        monkeypatch.setattr(tuner.optimizer, "update_slice", counted)
        for seed in range(2):
            before = [piece.tensor.detach().clone() for piece in tuner.active]
            tuner.backward(tiny_batch(seed=seed))
            assert all(not torch.equal(a, piece.tensor) for a, piece in zip(before, tuner.active, strict=True))
            tuner.step()
    assert at_once == [1] * sum(len(chunk.slices) for chunk in tuner.chunks)


def test_a_dense_run_needs_less_memory_by_most_of_its_gradients():
    options = {"num_chunks": 1, "max_grad_norm": None, "states": "reset"}
    peaks = [
        max(sample.allocated_bytes for sample in measure(CONFIGS["llama"], case("llama", **options, **more).training))
        for more in ({}, {"update_in_backward": True})
    ]
    weights = 4 * 7_800_000
    assert peaks[0] - peaks[1] > 0.6 * weights


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def tuned(model):
        return ChunkFT(model, 3, 1e-3, switch_every=2, max_grad_norm=None, update_in_backward=True)

    def updated(tuner, first, last):
        for seed in range(first, last):
            tuner.backward(tiny_batch(seed=seed))
            tuner.step()

    whole, cut, resumed = (tiny_model("llama") for _ in range(3))
    with tuned(whole) as tuner:
        updated(tuner, 0, 9)
    with tuned(cut) as tuner:
        updated(tuner, 0, 5)
        save_checkpoint(tuner, tmp_path, "same", {})
    with tuned(resumed) as tuner:
        assert resume(tuner, tmp_path, "same").step == 5
        updated(tuner, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_second_backward_pass_before_the_step_is_refused():
    with ChunkFT(tiny_model("llama"), 3, max_grad_norm=None, update_in_backward=True) as tuner:
        tuner.backward(tiny_batch())
        with pytest.raises(InputError, match="update_in_backward"):
            tuner.backward(tiny_batch())
        tuner.step()
        tuner.backward(tiny_batch())


@pytest.mark.parametrize(
    ("training", "fix"),
    [
        ({}, "max_grad_norm to null"),
        ({"max_grad_norm": None, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(training, fix):
    with pytest.raises(InputError, match=fix):
        parse(TrainingSpec, {"update_in_backward": True, **training})
    parse(TrainingSpec, {"update_in_backward": True, "max_grad_norm": None})
    with pytest.raises(InputError, match="max_grad_norm"):
        ChunkFT(tiny_model("llama"), update_in_backward=True)
