"""What does not go together is refused with one field and one sentence, wherever it is asked for."""

from pathlib import Path

import pytest
import torch

from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.spec import REFUSALS, TrainingSpec, parse
from chunkplan.planner import PlanRequest
from tests.support.families import tiny_model

PAGE = Path(__file__).parents[3] / "docs" / "engine.md"
FP32, BF16, FP16 = "fp32", "bf16", "fp16"
IN_BACKWARD = {"update_in_backward": True, "max_grad_norm": None}
ASKED = [
    {"schedule": {"master": "residual", "expansion": "factored"}},
    {"update_in_backward": True},
    {**IN_BACKWARD, "gradient_accumulation_steps": 2},
    {"optimizer": "adamw8bit", "schedule": {"state_dtype": "bf16"}},
    {"optimizer": "adafactor", "schedule": {"state_dtype": "int8"}},
    {"autocast": "bf16"},
    {**IN_BACKWARD, "precision": FP16},
    {"precision": FP16, "schedule": {"expansion": "factored"}},
    {"precision": FP16, "schedule": {"master": "residual"}},
    {"precision": FP32, "schedule": {"master": "fp32"}},
    {"method": "full", "schedule": {"num_chunks": 2}},
    {"lora": {"rank": 4}},
    {"method": "lora", "schedule": {"num_chunks": 1, "master": "fp32"}},
    {"method": "lora", "schedule": {"expansion": "factored"}},
]
"""One request for each row of the table, in its order; bf16 where nothing is said."""
OF_A_JOB = {"method", "lora", "gradient_accumulation_steps"}


@pytest.mark.parametrize(("asked", "refusal"), list(zip(ASKED, REFUSALS, strict=True)))
def test_a_spec_is_refused_by_the_table(asked, refusal):
    with pytest.raises(InputError) as refused:
        parse(TrainingSpec, asked)
    assert (refused.value.field, refused.value.message) == (refusal.field, refusal.message)
    request = {"model": "gpt2", "gpu": "rtx-4090", "training": asked}
    with pytest.raises(InputError) as refused:
        parse(PlanRequest, request)
    assert (refused.value.field, refused.value.message) == (f"training.{refusal.field}", refusal.message)


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [pair for pair in zip(ASKED, REFUSALS, strict=True) if not OF_A_JOB & set(pair[0])],
)
def test_a_loop_of_ones_own_is_refused_with_the_same_words(asked, refusal):
    options = {**asked, **asked.get("schedule", {})}
    options.pop("schedule", None)
    dtype = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}[options.pop("precision", BF16)]
    with pytest.raises(InputError) as refused:
        ChunkFT(tiny_model("llama", dtype), 2, **options)
    assert (refused.value.field, refused.value.message) == (f"training.{refusal.field}", refusal.message)


def test_what_the_issue_found_is_refused():
    """It trained for eight updates, where the spec refused it."""
    with pytest.raises(InputError, match="would leave residual masters behind"):
        ChunkFT(tiny_model("llama", torch.bfloat16), master="residual", expansion="factored")


def test_the_page_lists_every_refusal():
    page = " ".join(PAGE.read_text().split())
    for refusal in REFUSALS:
        assert f"| `{refusal.field}` | {refusal.message} |" in page


def test_an_unknown_option_is_named_with_its_neighbour():
    with pytest.raises(TypeError, match="no option 'optimiser'; did you mean 'optimizer'"):
        ChunkFT(tiny_model("llama"), optimiser="lion")
