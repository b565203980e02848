"""The matrix: every family × every number of chunks × every chunk × every option against the dense gradient.

Bit for bit where no tensor of the chunk is cut, within 1e-6 (fp32) or one unit in the last place (bf16) where
one is.
"""

import pytest
import torch

from chunkplan.engine import ParameterStream, activate
from chunkplan.engine.model.tasks import num_counted_tokens, task_of
from chunkplan.engine.training.step import Unobserved, forward_backward, prepared
from tests.support.families import FAMILIES, UNLISTED, batch_for, relative_error, tiny_model
from tests.support.steps import step_options

COUNTS = (1, 2, 7, 16, 33)
BF16_ULP = 2**-8
REORDERS = ("falcon-mamba",)
"""torch.matmul folds dimensions by what requires a gradient: in these families' products, sums change their
order."""


def passes(model, options, num_micro_batches=1):
    """The step's forward and backward passes, whatever is active."""
    batches = [batch_for(model, seed=seed) for seed in range(1, 1 + num_micro_batches)]
    counted = float(sum(num_counted_tokens(batch["labels"], task_of(model)) for batch in batches))
    for batch in batches:
        forward_backward(model, batch, counted, options, Unobserved())


def dense(model, options, num_micro_batches=1):
    """Dense gradients by name, flat, of the plain model; zeros where there is none."""
    passes(model, options, num_micro_batches)
    gradients = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for name, p in model.named_parameters()
    }
    model.zero_grad()
    return gradients


def places(values):
    """Each bf16 value's place among all of them: neighbours, one unit in the last place apart,
    differ by one.
    """
    bits = values.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_exact(model, options, reference, num_micro_batches=1, tolerance=1e-6, counts=COUNTS, reorders=False):
    """Every chunk of every partition, under ``options``."""
    stream = ParameterStream(model)
    for count in counts:
        seen = 0
        for chunk in stream.partition(count):
            with prepared(model, options), activate(model, chunk, stream) as active:
                passes(model, options, num_micro_batches)
                is_cut = any(s.stop - s.start < s.parameter.numel() for s in active)
                for s in active:
                    expected = reference[s.name][s.start : s.stop]
                    actual = torch.zeros_like(expected) if s.tensor.grad is None else s.tensor.grad
                    if not is_cut and not reorders:
                        assert torch.equal(actual, expected), (count, s.name)
                    assert relative_error(actual, expected) <= tolerance, (count, s.name, s.start, s.stop)
                    if expected.dtype == torch.bfloat16:
                        assert int((places(actual) - places(expected)).abs().max()) <= 1, (count, s.name)
                    seen += s.stop - s.start
        assert seen == stream.num_parameters


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_every_chunk_of_every_family(family):
    model, options = tiny_model(family), step_options("standard")
    assert_exact(model, options, dense(model, options), reorders=family in REORDERS)


def test_t5_with_sdpa_takes_another_kernel_where_its_position_bias_is_frozen():
    # The bias is the attention mask. torch's fused attention has no gradient of a mask, so that a mask that
    # needs one goes through the plain products: same mathematics, sums in another order. With 'eager' the
    # matrix is exact.
    model, options = tiny_model("t5", attn="sdpa"), step_options("standard")
    reference = dense(model, options)
    assert_exact(model, options, reference, tolerance=3e-6, reorders=True)
    biases = [p for name, p in model.named_parameters() if "relative_attention_bias" in name]
    for bias in biases:
        bias.requires_grad_(False)
    frozen = dense(model, options)
    errors = [relative_error(frozen[name], reference[name]) for name in frozen if "relative" not in name]
    assert 1e-7 < max(errors) < 3e-6  # by freezing alone: no chunk is active here


@pytest.mark.parametrize("family", FAMILIES)
def test_with_checkpointing_accumulation_and_the_fused_loss(family):
    model = tiny_model(family)
    reference = dense(model, step_options("fused"), num_micro_batches=2)
    assert_exact(model, step_options("fused", "full"), reference, num_micro_batches=2)


@pytest.mark.parametrize("loss", ["fused", "standard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family, loss):
    model, options = tiny_model(family), step_options(loss, "full", "bf16")
    counts = COUNTS if loss == "fused" else (2, 16)
    assert_exact(model, options, dense(model, step_options(loss, "none", "bf16")), tolerance=BF16_ULP, counts=counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_weights(family):
    model, options = tiny_model(family, torch.bfloat16), step_options("fused")
    assert_exact(model, options, dense(model, options), tolerance=BF16_ULP)
