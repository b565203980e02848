"""Rows that share a sequence do not see each other: not in the loss, not in any gradient."""

import pytest
import torch

from chunkplan.engine import ChunkFT, ParameterStream, activate
from chunkplan.engine.data import collate, joined
from chunkplan.engine.data.tokens import IGNORE_INDEX, Tokens
from chunkplan.engine.errors import InputError
from chunkplan.engine.model.packed_rows import check_isolation
from chunkplan.engine.training.step import (
    Unobserved,
    check_packing,
    compute_loss,
    evaluate,
    forward_backward,
    num_counted_tokens,
    prepared,
)
from tests.support.families import FAMILIES, VOCAB_SIZE, relative_error, tiny_model
from tests.support.steps import step_options

REFUSED = {
    "opt": "lets rows of one sequence see each other",
    "mamba": "lets rows of one sequence see each other",
    "bert": "is not a causal model, and only those can be packed",
    "t5": "is not a causal model, and only those can be packed",
    "bloom": "lets rows of one sequence see each other",
    "falcon-mamba": "lets rows of one sequence see each other",
    "rwkv": "lets rows of one sequence see each other",
    "bart": "is not a causal model, and only those can be packed",
}
PACKED = [family for family in FAMILIES if family not in REFUSED] + ["stablelm", "olmo2", "smollm3"]
LENGTHS = [(7, 4, 3), (9, 2), (12,)]


def rows(lengths, seed=0):
    """Random rows, the first tokens of which are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        found.append(Tokens(ids, [IGNORE_INDEX] * (length // 4) + ids[length // 4 :]))
    return found


def packed_batch():
    """Three sequences of one to three rows, with padding behind the shorter ones."""
    sequences = [joined(rows(lengths, seed)) for seed, lengths in enumerate(LENGTHS)]
    return collate(sequences, 0, 16, packing=True)


def alone():
    """The same rows, each in a batch of its own."""
    for seed, lengths in enumerate(LENGTHS):
        for row in rows(lengths, seed):
            yield {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])}


def test_a_packed_batch_says_where_rows_start_and_trains_no_first_token():
    batch = packed_batch()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (3, 16)
    assert batch["position_ids"][0].tolist() == [*range(7), *range(4), *range(3), 0, 1]
    assert batch["position_ids"][2].tolist() == [*range(12), *range(4)]
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == IGNORE_INDEX).all()
    assert (batch["labels"][0, 14:] == IGNORE_INDEX).all()
    assert num_counted_tokens(batch["labels"]) == sum(num_counted_tokens(row["labels"]) for row in alone())


def gradients_alone(model, options, denominator):
    """Dense gradients by name of the rows' summed losses, each row in a batch of its own."""
    for row in alone():
        forward_backward(model, row, denominator, options, Unobserved())
    found = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", ["fused", "standard"])
@pytest.mark.parametrize("family", PACKED)
def test_every_chunks_packed_gradient_is_the_sum_of_the_rows_gradients(family, loss):
    """With checkpointing, and the sequences in two micro-batches."""
    model, whole = tiny_model(family), packed_batch()
    denominator = float(num_counted_tokens(whole["labels"]))
    reference = gradients_alone(model, step_options(loss), denominator)
    batches = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 1), slice(1, 3))]
    stream, options = ParameterStream(model), step_options(loss, "full")
    for num_chunks in (1, 2, 7, 16, 33) if loss == "fused" else (2,):
        for chunk in stream.partition(num_chunks):
            with prepared(model, options), activate(model, chunk, stream) as active:
                for batch in batches:
                    forward_backward(model, batch, denominator, options, Unobserved())
                found = [torch.zeros_like(s.tensor) if s.tensor.grad is None else s.tensor.grad for s in active]
            expected = torch.cat([reference[s.name][s.start : s.stop] for s in active])
            assert relative_error(torch.cat([gradient.flatten() for gradient in found]), expected) <= 1e-6


def test_a_tuner_trains_packed_rows_as_it_trains_them_alone():
    models = tiny_model("llama"), tiny_model("llama")
    denominator = num_counted_tokens(packed_batch()["labels"])
    for model, batches in zip(models, ([packed_batch()], list(alone())), strict=True):
        with ChunkFT(model, num_chunks=3, lr=1e-2, optimizer="sgd", packing=len(batches) == 1) as tuner:
            for _ in range(6):
                for batch in batches:
                    tuner.backward(batch, denominator)
                tuner.step()
    for packed, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(packed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("gemma2", torch.float32),
        ("gpt2", torch.float32),
        ("mixtral", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma2", torch.bfloat16),
    ],
)
def test_no_gradient_flows_from_one_row_into_another(family, dtype):
    model = tiny_model(family, dtype)
    first, second = rows((6, 6)), rows((6, 6), seed=9)
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.detach().requires_grad_()) or seen[-1]
    )

    def gradient_of_the_second_row(before):
        example = joined([before, second[1]])
        batch = collate([example], 0, 12, packing=True)
        batch["labels"][:, :7] = IGNORE_INDEX
        loss = compute_loss(model, batch, 1.0, step_options())
        return torch.autograd.grad(loss, seen[-1])[0]

    one, other = gradient_of_the_second_row(first[0]), gradient_of_the_second_row(second[0])
    assert not one[:, :6].any()
    assert one[:, 6:].any()
    # Experts multiply more or fewer rows at once, which rounds differently.
    assert relative_error(one, other) <= (1e-6 if family == "mixtral" else 0.0)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_in_which_rows_would_meet_is_refused_by_name(family):
    model = tiny_model(family)
    with pytest.raises(InputError) as caught:
        ChunkFT(model, num_chunks=2, packing=True)
    assert caught.value.field == "training.packing"
    assert caught.value.message == f"{type(model).__name__} {REFUSED[family]}; use packing false"
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_a_model_that_mixes_up_positions_is_refused():
    model = tiny_model("gpt2")
    inner = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda position_ids: inner(torch.arange(position_ids.shape[1])[None])
    with pytest.raises(InputError, match="does not start each row at its own position 0"):
        check_packing(model, step_options())


def test_a_model_that_takes_no_positions_is_refused():
    model = tiny_model("llama")

    def loss_of(batch):
        if "position_ids" in batch:
            raise TypeError("unexpected keyword")
        return compute_loss(model, batch, 1.0, step_options())

    with pytest.raises(InputError, match="takes no position ids"):
        check_isolation(model, loss_of)


def test_a_model_that_cannot_be_checked_is_refused():
    model, embedding = tiny_model("llama"), tiny_model("llama").get_input_embeddings()
    model.get_input_embeddings = lambda: embedding  # not the one that it calls
    with pytest.raises(InputError, match="does not call its input embedding"):
        check_packing(model, step_options())


def test_positions_come_with_packing_and_only_with_it():
    batch = packed_batch()
    with (
        ChunkFT(tiny_model("llama"), num_chunks=2) as tuner,
        pytest.raises(InputError, match=r"batch\.position_ids: needs the option packing"),
    ):
        tuner.backward(batch)
    with ChunkFT(tiny_model("llama"), num_chunks=2, packing=True) as tuner:
        with pytest.raises(InputError, match=r"batch\.position_ids: is missing"):
            tuner.backward({name: batch[name] for name in ("input_ids", "labels")})
        with pytest.raises(InputError, match=r"batch\.attention_mask: cannot come with packing"):
            tuner.backward({**batch, "attention_mask": torch.ones_like(batch["input_ids"])})


def test_held_out_loss_is_the_same_packed_and_not():
    model = tiny_model("qwen3")
    packed, num_packed = evaluate(model, [packed_batch()], step_options())
    plain, num_plain = evaluate(model, list(alone()), step_options())
    assert num_packed == num_plain
    assert packed == pytest.approx(plain, rel=1e-6)
