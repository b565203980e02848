"""Masked and encoder-decoder models: what a row becomes, and real runs from a folder to an exported model."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from chunkplan.engine import ChunkFT, InputError, ParameterStream, activate
from chunkplan.engine.model.loading import load_model
from chunkplan.engine.model.parts import decoder_layers
from chunkplan.engine.model.tasks import BatchPreparation, Task, task_of, task_of_config
from chunkplan.engine.spec import Precision
from chunkplan.engine.training.coverage import parameter_digests, updated_share
from chunkplan.engine.training.step import Unobserved, forward_backward, prepared
from chunkplan.engine.worker import EXIT_COMPLETED, run_attempt
from tests.support.events import pairs
from tests.support.families import FAMILIES, UNLISTED, batch_for, tiny_batch, tiny_model
from tests.support.runs import write_job
from tests.support.steps import step_options

WORDS = ["a", "the", "title", "of", "metal", "worker", "is", "welder", "carver", "caster", "smith", "turner"]
BERT_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
T5_VOCAB = ["<pad>", "</s>", "<unk>", *WORDS]


def word_tokenizer(vocabulary, template, **special):
    """A word-level tokenizer; ``template`` is where its special tokens stand."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, ids[word]) for word in template.split() if word != "$A"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bert_folder(folder):
    """A tiny random BERT with its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(BERT_VOCAB), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer = word_tokenizer(
        BERT_VOCAB, "[CLS] $A [SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def t5_folder(folder):
    """A tiny random T5 with its tokenizer."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(T5_VOCAB), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = word_tokenizer(T5_VOCAB, "$A </s>", pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def rows(kind):
    """Rows that can be learned: who works how is named by the first word."""
    found = []
    for i in range(16):
        trade = ("welder", "carver", "caster", "smith")[i % 4]
        if kind == "bert":
            found.append({"text": f"{trade} is the title of a metal worker" + " the" * (i % 3)})
        else:
            found.append({"prompt": "the title of a metal worker" + " metal" * (i % 4), "completion": f" is {trade}"})
    return found


@pytest.mark.parametrize(
    ("kind", "build", "auto"),
    [("bert", bert_folder, AutoModelForMaskedLM), ("t5", t5_folder, AutoModelForSeq2SeqLM)],
)
@pytest.mark.parametrize("loss", ["fused", "standard"])
def test_a_run_learns_updates_everything_and_exports_what_loads_again(kind, build, auto, loss, tmp_path):
    build(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    run = write_job(
        tmp_path / "run", tmp_path / "base", data, loss=loss, max_steps=24, seq_len=32, learning_rate=2e-2,
        micro_batch_size=8, gradient_accumulation_steps=2, activation_checkpointing="full", checkpoint_every=100,
    )  # fmt: skip
    events = []
    assert run_attempt(run, pairs(events), lambda: False) == EXIT_COMPLETED
    evaluations = [fields for kind, fields in events if kind == "eval"]
    assert evaluations[-1]["loss"] < 0.75 * evaluations[0]["loss"]
    (coverage,) = [fields for kind, fields in events if kind == "coverage"]
    assert coverage["num_tensors_updated"] == coverage["num_tensors"]
    loaded, information = auto.from_pretrained(
        run / "artifacts" / "tuned", local_files_only=True, output_loading_info=True
    )
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert task_of(loaded) is {"bert": Task.MASKED, "t5": Task.SEQ2SEQ}[kind]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return load_folder(folder, bert_folder(folder))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    return load_folder(folder, t5_folder(folder))


def load_folder(folder, tokenizer):
    return load_model(folder, Precision.FP32, "sdpa", "cpu"), tokenizer


def words_batch(tokenizer, texts, width=24, prompt_words=0):
    """Rows as the data path collates them, and their lengths."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    input_ids = torch.full((len(ids), width), tokenizer.pad_token_id)
    labels = torch.full((len(ids), width), -100)
    for i, row in enumerate(ids):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, prompt_words : len(row)] = torch.tensor(row[prompt_words:])
    return {"input_ids": input_ids, "labels": labels}, [len(row) for row in ids]


def test_a_masked_batch_hides_fifteen_percent_as_bert_does(bert):
    model, tokenizer = bert
    text = " ".join(WORDS * 20)[:900]
    batch, lengths = words_batch(tokenizer, [text] * 200, width=256)
    prepared_batch = BatchPreparation(model, tokenizer, 256, seed=0)(batch, lengths, 0)
    is_real = torch.arange(256) < torch.tensor(lengths).unsqueeze(1)
    chosen = prepared_batch["labels"] != -100
    assert torch.equal(prepared_batch["attention_mask"], is_real.long())
    assert torch.equal(prepared_batch["labels"][chosen], batch["input_ids"][chosen])
    # Neither padding nor [CLS] nor [SEP] is predicted; of the others, the same share in every row.
    is_word = is_real & (batch["input_ids"] > 4)
    assert not (chosen & ~is_word).any()
    assert (chosen.sum(1) == (0.15 * is_word.sum(1)).round()).all()
    changed, hidden = prepared_batch["input_ids"] != batch["input_ids"], prepared_batch["input_ids"] == 4
    assert not (changed & ~chosen).any()
    num_chosen = int(chosen.sum())
    assert int(hidden.sum()) / num_chosen == pytest.approx(0.8, abs=0.02)
    # A tenth is replaced by a token of the vocabulary, now and then by itself or by the mask.
    assert int((changed & ~hidden).sum()) / num_chosen == pytest.approx(0.1 * 15 / 17, abs=0.02)


def test_masks_depend_on_seed_and_micro_batch_alone_and_never_leave_a_row_without(bert):
    model, tokenizer = bert
    batch, lengths = words_batch(tokenizer, ["the welder", "a metal worker is the title of"])
    first, again, later = (BatchPreparation(model, tokenizer, 24, seed=3)(batch, lengths, i) for i in (5, 5, 6))
    other = BatchPreparation(model, tokenizer, 24, seed=4)(batch, lengths, 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], later["labels"]) or not torch.equal(first["labels"], other["labels"])
    assert all(((result["labels"] != -100).sum(1) == 1).all() for result in (first, later, other))


def test_only_trained_tokens_are_hidden(bert):
    model, tokenizer = bert
    batch, lengths = words_batch(tokenizer, ["the title of a metal worker is welder"] * 8, prompt_words=7)
    for index in range(20):
        labels = BatchPreparation(model, tokenizer, 24, seed=0)(batch, lengths, index)["labels"]
        assert ((labels != -100).sum(1) == 1).all()
        assert (labels[:, :7] == -100).all()


def test_an_encoder_gets_the_prompt_and_a_decoder_the_completion(t5):
    model, tokenizer = t5
    rows_, lengths = words_batch(tokenizer, ["the title of a metal worker is welder", "the title is smith"])
    rows_["labels"][0, :6] = rows_["labels"][1, :2] = -100
    rows_["labels"][0, 7] = -100  # a turn within the answer that is not trained
    result = BatchPreparation(model, tokenizer, 24, seed=0)(rows_, lengths, 0)
    decode = lambda ids: tokenizer.decode(ids).split()  # noqa: E731
    pad = "<pad>"
    assert [decode(row) for row in result["input_ids"]] == [
        ["the", "title", "of", "a", "metal", "worker", "</s>", *[pad] * 17],
        ["the", "title", "</s>", *[pad] * 21],
    ]
    assert result["attention_mask"].sum(1).tolist() == [7, 3]
    assert decode(result["decoder_input_ids"][0])[:4] == [pad, "is", "welder", "</s>"]
    assert tokenizer.convert_ids_to_tokens(result["labels"][0][[0, 2]]) == ["is", "</s>"]
    assert result["labels"][0].tolist()[1] == -100
    assert (result["labels"] != -100).sum(1).tolist() == [2, 3]


def test_a_row_without_a_prompt_is_refused(t5):
    model, tokenizer = t5
    batch, lengths = words_batch(tokenizer, ["the welder"])
    with pytest.raises(InputError, match=r"dataset\.path: .* a prompt and a completion"):
        BatchPreparation(model, tokenizer, 24, seed=0)(batch, lengths, 0)


def test_a_masked_model_without_a_mask_token_is_refused(bert):
    tokenizer = word_tokenizer(T5_VOCAB, "$A </s>", pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    with pytest.raises(InputError, match="model: its tokenizer has no mask token"):
        BatchPreparation(bert[0], tokenizer, 24, seed=0)


def test_padding_is_invisible_to_a_masked_model():
    model = tiny_model("bert")
    batch = batch_for(model)
    longer = {
        name: torch.nn.functional.pad(tensor, (0, 5), value={"labels": -100}.get(name, 0))
        for name, tensor in batch.items()
    }
    with ChunkFT(model, num_chunks=3) as tuner:
        assert float(tuner.backward(longer)) == pytest.approx(float(tuner.backward(batch)), rel=1e-6)


def test_a_model_whose_weights_lack_a_part_is_refused(tmp_path):
    bert_folder(tmp_path)
    BertModel(BertConfig.from_pretrained(tmp_path), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model: its weights lack cls\.predictions\..* of BertForMaskedLM"):
        load_model(tmp_path, Precision.FP32, "sdpa", "cpu")


def test_the_task_follows_the_architecture_and_then_the_family():
    assert task_of_config(BertConfig()) is Task.MASKED
    assert task_of_config(BertConfig(architectures=["BertLMHeadModel"])) is Task.CAUSAL
    assert task_of_config(BertConfig(is_decoder=True)) is Task.CAUSAL
    assert task_of_config(T5Config()) is Task.SEQ2SEQ


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_after_one_cycle_every_parameter_that_the_loss_depends_on_is_updated(family):
    model = tiny_model(family)
    batch = batch_for(model)
    before = parameter_digests(model)
    with ChunkFT(model, num_chunks=7, lr=1e-2) as tuner:
        for _ in range(7):
            tuner.backward(batch)
            tuner.step()
    num_updated, unchanged = updated_share(model, before)
    assert (num_updated, unchanged) == (len(before), [])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_chunk_leaves_the_encoder_alone_and_an_encoder_chunk_recomputes_from_itself_up(family):
    model = tiny_model(family)
    layers = decoder_layers(model)
    names = {module: name for name, module in model.named_modules()}
    prefixes = [names[layer] + "." for layer in layers]
    assert len(layers) == 4
    assert prefixes[0].split(".").index("encoder") >= 0
    assert "decoder" in prefixes[3]
    runs = [0] * 4

    def count(index):
        return lambda *_: runs.__setitem__(index, runs[index] + 1)

    for i, layer in enumerate(layers):
        next(module for module in layer.modules() if not list(module.children())).register_forward_hook(count(i))
    options, stream = step_options("fused", "full"), ParameterStream(model)
    seen = set()
    for chunk in stream.partition(33):
        runs[:] = [0] * 4
        with prepared(model, options), activate(model, chunk, stream) as active:
            forward_backward(model, batch_for(model), 10.0, options, Unobserved())
        inside = {i for s in active for i, prefix in enumerate(prefixes) if s.name.startswith(prefix)}
        if len(inside) == 1 and all(s.name.startswith(tuple(prefixes)) for s in active):
            (lowest,) = inside
            assert runs == [1] * lowest + [2] * (4 - lowest), (lowest, runs)
            seen.add(lowest)
    assert seen == {0, 1, 2, 3}


def test_batches_hold_what_the_task_knows():
    for family, key in (("llama", "decoder_input_ids"), ("bert", "decoder_input_ids"), ("t5", "token_type_ids")):
        model = tiny_model(family)
        with ChunkFT(model, 2) as tuner, pytest.raises(InputError, match=f"batch.{key}: is not used"):
            tuner.backward({**tiny_batch(), key: tiny_batch()["input_ids"]})
