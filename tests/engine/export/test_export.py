"""An exported folder is what transformers loads, with the same weights and nothing of this machine in it."""

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkplan.engine.export.model_card import ModelCard, base_license
from chunkplan.engine.export.model_folder import export_model
from tests.support.tiny import tiny_llama, tiny_tokenizer

CARD = ModelCard(
    name="welders",
    base_model="smollm2-135m-instruct",
    method="chunkft",
    schedule={"num_chunks": 8, "order": "descending"},
    hyper_parameters={"learning_rate": 3e-4, "max_steps": 24, "epochs": None},
    dataset_sha256="ab" * 32,
    num_train_rows=1898,
    num_parameters=134_515_008,
    peak_allocated_bytes=700 << 20,
    loss_before=5.5166,
    loss_after=2.25,
    license="apache-2.0",
)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_it_and_computes_the_same(tmp_path, tied):
    model, tokenizer = tiny_llama(tie_word_embeddings=tied), tiny_tokenizer()
    model.config.use_cache = False  # as in training
    export_model(model, tokenizer, tmp_path / "welders", CARD)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "welders", local_files_only=True)
    text = AutoTokenizer.from_pretrained(tmp_path / "welders", local_files_only=True)
    chat = [{"role": "user", "content": "the welder 🎉"}]
    inputs = text.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    assert (
        inputs["input_ids"].tolist() == tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"].tolist()
    )
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.config.use_cache is True
    assert model.config.use_cache is False


def test_the_files_are_listed_with_their_digests(tmp_path):
    files = export_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out" / "welders", CARD)
    assert [file.name for file in files] == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in files:
        content = (tmp_path / "out" / "welders" / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["welders"]
    texts = [file.path.read_text() for file in files if file.path.suffix in {".json", ".md"}]
    assert not any(str(tmp_path) in text for text in texts)


def test_an_older_export_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "welders"
    folder.mkdir()
    (folder / "stale.bin").write_bytes(b"x")
    export_model(tiny_llama(), tiny_tokenizer(), folder, CARD)
    assert not (folder / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["welders"]


def test_generation_settings_that_transformers_refuses_to_write_are_repaired(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.9  # as Llama 2 was published: a temperature, but no sampling
    export_model(model, tiny_tokenizer(), tmp_path / "welders", CARD)
    written = json.loads((tmp_path / "welders" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.9, True)
    assert model.generation_config.do_sample is not True


def test_the_card_tells_the_run(tmp_path):
    export_model(tiny_llama(), tiny_tokenizer(), tmp_path / "welders", CARD)
    card = (tmp_path / "welders" / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\nbase_model: "smollm2-135m-instruct"\n')
    for line in (
        "| held-out loss before | 5.5166 |",
        "| held-out loss after | 2.2500 |",
        "| measured peak memory | 700.0 MiB allocated |",
        f"| dataset (SHA-256) | `{'ab' * 32}` |",
        "| num_chunks | 8 |",
        "| learning_rate | 0.0003 |",
    ):
        assert line in card
    assert "epochs" not in card
    assert base_license(tmp_path / "welders") == "apache-2.0"


def test_the_card_tells_how_the_loss_went_what_was_planned_and_with_what(tmp_path):
    held_out = [(update, 5.0 - update / 100) for update in range(0, 301, 5)]
    card = replace(
        CARD,
        dataset_name="titles.jsonl",
        predicted_peak_bytes=701 << 20,
        held_out_losses=held_out,
        training_losses=[(30, 4.5), (60, 3.25)],
    ).render()
    for line in (
        "| data file | titles.jsonl |",
        "| trained parameters | 134,515,008 |",
        "| predicted peak memory | 701.0 MiB allocated |",
        "## Held-out loss",
        "| 0 | 5.0000 |",
        "| 300 | 2.0000 |",
        "## Training loss",
        "| 60 | 3.2500 |",
        f"| torch | {version('torch')} |",
        f"| transformers | {version('transformers')} |",
        "All parameters of smollm2-135m-instruct, fine-tuned with chunkplan.",
    ):
        assert line in card
    section = card.split("## Held-out loss")[1].split("## ")[0]
    assert len([line for line in section.splitlines() if line.startswith("| ")]) == 1 + 20  # of 61, evenly


def test_the_card_of_an_adapter_says_so():
    adapter = replace(CARD, method="lora", is_adapter=True, adapter={"rank": 8}, num_trainable_parameters=4_884_480)
    card = adapter.render()
    assert 'library_name: "peft"' in card
    assert "A LoRA adapter of smollm2-135m-instruct, trained with chunkplan." in card
    assert "| trained parameters | 4,884,480 |" in card
    assert "## Adapter" in card
    assert "| rank | 8 |" in card
    merged = replace(adapter, is_adapter=False).render()
    assert 'library_name: "transformers"' in merged
    assert "smollm2-135m-instruct with a LoRA adapter merged into its weights" in merged


def test_a_base_without_a_card_has_no_known_license(tmp_path):
    assert base_license(tmp_path) == "other"
    (tmp_path / "README.md").write_text("# a model\nlicense: mit\n")
    assert base_license(tmp_path) == "other"
