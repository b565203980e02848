"""LoRA through the engine's own loop: the gradients and updates of peft and torch, and an adapter that peft
loads."""

import importlib
import json
import shutil
import sys

import peft
import pytest
import torch
from peft import import_utils
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from chunkplan.engine import ChunkFT, InputError
from chunkplan.engine.export.model_folder import export_model
from chunkplan.engine.model.adapters import add_adapters, merge_adapters
from chunkplan.engine.spec import LoraSpec, TrainingSpec, parse
from chunkplan.engine.training.checkpoint import resume, save_checkpoint
from chunkplan.engine.worker import run_attempt
from tests.engine.export.test_export import CARD
from tests.support.events import pairs
from tests.support.families import FAMILIES, batch_for, tiny_batch, tiny_model
from tests.support.runs import events_of, exit_code, prepare_run, start_worker, wait_for
from tests.support.tiny import tiny_tokenizer

SPEC = LoraSpec(rank=4, alpha=8.0)


def lora_training(**values):
    return TrainingSpec.model_validate({"method": "lora", "precision": "fp32", **values})


@pytest.fixture
def fresh_peft():
    """What peft has found to be installed is forgotten, before and after."""
    found = (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def adapted(family="llama", dtype=torch.float32, spec=SPEC, **overrides):
    """A tiny model with adapters whose B is not zero, so that every gradient matters."""
    model = tiny_model(family, dtype, **overrides)
    if family == "mamba":  # its other projections are inside of fused kernels
        spec = spec.model_copy(update={"target_modules": ["in_proj", "x_proj"]})
    torch.manual_seed(3)
    add_adapters(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model


def tuner_of(model, **training):
    return ChunkFT.of(lora_training(**training), model, 1e-3)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_models_own_loss_and_only_adapters_have_them(family, checkpointing):
    expected = adapted(family)
    batch = batch_for(expected)
    expected(**batch).loss.backward()
    gradients = {name: p.grad.flatten() for name, p in expected.named_parameters() if p.grad is not None}
    attention = "eager" if family == "gemma2" else "sdpa"
    with tuner_of(adapted(family), activation_checkpointing=checkpointing, attention=attention) as tuner:
        assert all("lora_" in name for name in tuner.stream.names)
        tuner.backward(batch)
        actual = {piece.name: piece.tensor.grad for piece in tuner.active}
        assert {name for name, gradient in actual.items() if gradient is not None} == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)
        assert all(p.grad is None for p in tuner.model.parameters())


def test_twenty_updates_are_those_of_adamw_with_the_rates_of_lora_plus():
    spec = SPEC.model_copy(update={"lr_ratio": 16.0})
    expected, model = adapted(spec=spec), adapted(spec=spec)
    named = [item for item in expected.named_parameters() if item[1].requires_grad]
    groups = [
        {"params": [p for name, p in named if "lora_A" in name], "lr": 1e-3},
        {"params": [p for name, p in named if "lora_B" in name], "lr": 16e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tuner_of(model, loss="standard", max_grad_norm=None, lora=spec.model_dump()) as tuner:
        for step in range(20):
            expected(**tiny_batch(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.backward(tiny_batch(seed=step))
            tuner.step()
    for (name, actual), (_, reference) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(actual, reference), name
        assert torch.equal(actual, before[name]) == ("lora_" not in name)


def test_backpropagation_ends_at_the_lowest_adapter():
    """No gradient is forced onto the embedding's output: with adapters only in layer 1, layer 0 is not
    recomputed."""
    model = adapted(spec=SPEC.model_copy(update={"target_modules": ["layers.1.mlp.down_proj"]}))
    calls = []
    with tuner_of(model, activation_checkpointing="full") as tuner:
        model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(0))
        model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
        tuner.backward(tiny_batch())
    assert calls == [0, 1, 1]


def test_adapters_of_bf16_weights_are_fp32():
    model = adapted(dtype=torch.bfloat16)
    with tuner_of(model, precision="bf16") as tuner:
        assert {parameter.dtype for parameter in tuner.stream.parameters} == {torch.float32}
        assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
        tuner.backward(tiny_batch())
        assert tuner.step() > 0


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    def run(tuner, num_updates):
        for _ in range(num_updates):
            tuner.backward(tiny_batch(seed=tuner.num_updates))
            tuner.step()

    lora = {"lora": {"rank": 4, "dropout": 0.3}}
    spec = LoraSpec.model_validate(lora["lora"])
    tuner = tuner_of(adapted(spec=spec), **lora)
    run(tuner, 3)
    saved = save_checkpoint(tuner, tmp_path, "same", {})
    assert saved.size_bytes < 20 * sum(p.numel() for p in tuner.stream.parameters)  # adapters and their states only
    run(tuner, 3)
    again = tuner_of(adapted(spec=spec), **lora)
    torch.rand(3)
    assert resume(again, tmp_path, "same").step == 3
    run(again, 3)
    for actual, expected in zip(again.stream.parameters, tuner.stream.parameters, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")  # of peft
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_peft_loads_the_exported_adapter_and_computes_the_same(tmp_path, family):
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    model = adapted(family).eval()
    with torch.no_grad():
        expected = model(input_ids=tiny_batch()["input_ids"]).logits
    files = export_model(model, tiny_tokenizer(), tmp_path / "welders", CARD, "acme/tiny")
    names = {file.name for file in files}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "welders" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("acme/tiny", 4, 8)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "welders").eval()
    with torch.no_grad():
        actual = loaded(input_ids=tiny_batch()["input_ids"]).logits
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, tiny_model(family).eval()(input_ids=tiny_batch()["input_ids"]).logits, atol=1e-3)
    merge_adapters(model)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_parameters())
    export_model(model, tiny_tokenizer(), tmp_path / "merged", CARD)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)
    with torch.no_grad():
        merged_logits = merged(input_ids=tiny_batch()["input_ids"]).logits
    torch.testing.assert_close(merged_logits, expected, rtol=1e-4, atol=1e-5)


def test_a_killed_job_leaves_the_adapter_of_an_uninterrupted_one(tmp_path):
    settings = {"method": "lora", "schedule": {"num_chunks": 1}, "lora": {"rank": 2, "dropout": 0.1}, "max_steps": 20}
    run = prepare_run(tmp_path, **settings)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    killed = start_worker(run, 1)
    wait_for(run, 1, killed, "checkpoint")
    killed.kill()
    exit_code(killed)
    for folder, attempt in ((run, 2), (whole, 1)):
        events = []
        assert run_attempt(folder, pairs(events), lambda: False) == 0
        (started,) = [fields for kind, fields in events if kind == "started"]
        assert started["resumed_step"] == (events_of(run, 1, "checkpoint")[-1]["step"] if attempt == 2 else 0)
        assert 0 < started["num_trainable_parameters"] < started["num_parameters"]
        (coverage,) = [fields for kind, fields in events if kind == "coverage"]
        assert coverage == {"num_tensors": 28, "num_tensors_updated": 28, "not_updated": []}
    files = [folder / "artifacts" / "tuned" / "adapter_model.safetensors" for folder in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    card = (whole / "artifacts" / "tuned" / "README.md").read_text()
    assert 'library_name: "peft"' in card
    assert "A LoRA adapter of base, trained with chunkplan." in card
    assert "| rank | 2 |" in card
    assert str(tmp_path) not in card + (whole / "artifacts" / "tuned" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": {"num_chunks": 4}}, "is the schedule with num_chunks 1"),
        ({"schedule": {"expansion": "factored"}}, "use schedule.expansion 'none'"),
        ({"schedule": {"master": "residual"}, "precision": "bf16"}, "use schedule.master 'none' with method 'lora'"),
        ({"method": "chunkft", "lora": {"rank": 4}}, "use method 'lora'"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"target_modules": []}}, "at least 1 item"),
    ],
)
def test_what_lora_cannot_do_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        lora_training(**values)


def test_defaults_are_filled_in_and_survive_a_round_trip():
    training = lora_training().resolved()
    assert (training.lora, training.schedule.num_chunks) == (LoraSpec(), 1)
    assert parse(TrainingSpec, training.model_dump(mode="json")).resolved() == training


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"^training.lora.target_modules: Target modules .*'nowhere'"):
        add_adapters(tiny_model("llama"), LoraSpec(target_modules=["nowhere"]))
    with pytest.raises(InputError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        add_adapters(tiny_model("mamba"), LoraSpec())


def test_what_is_installed_and_not_used_is_not_loaded(tmp_path, monkeypatch, fresh_peft):
    (tmp_path / "bitsandbytes.py").write_text("raise AssertionError('loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    add_adapters(tiny_model("llama"), SPEC)
    with pytest.raises(AssertionError, match="loaded"):
        importlib.import_module("bitsandbytes")  # it is still there for others
