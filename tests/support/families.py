"""Tiny random models of many transformers families, batches for them, and their dense gradients."""

from functools import cache

import torch
import transformers
from torch import nn

from chunkplan.engine.model.tasks import Task, task_of, task_of_config

VOCAB_SIZE = 97
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILIES = {
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 4, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 4, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"tie_word_embeddings": False}),
    "phi": ("Phi", {"hidden_dropout": 0.0, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4, "attn": "eager"}),
    "granite": ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "tie_word_embeddings": True}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "gpt-neox": ("GPTNeoX", {"hidden_dropout": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": False}),
    "opt": ("OPT", {"dropout": 0.0, "ffn_dim": 24, "word_embed_proj_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"n_inner": 24, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "qwen3-moe": ("Qwen3Moe", {
        "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "tie_word_embeddings": False,
    }),
    "mamba": ("Mamba", {"state_size": 4, "time_step_rank": 4, "tie_word_embeddings": True, "attn": "eager"}),
    "bert": ("Bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "t5": ("T5", {
        "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "attn": "eager",
    }),
}  # fmt: skip
UNLISTED = {
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4, "attn": "eager", "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon": ("Falcon", {"n_head_kv": 2, "new_decoder_architecture": True, "ffn_hidden_size": 24}),
    "stablelm": ("StableLm", {"tie_word_embeddings": False}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "roberta": ("Roberta", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "bart": ("Bart", {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
        "attention_dropout": 0.0, "decoder_start_token_id": 2,
    }),
    "falcon-mamba": ("FalconMamba", {
        "state_size": 4, "time_step_rank": 4, "tie_word_embeddings": False, "attn": "eager",
    }),
    "rwkv": ("Rwkv", {"attention_hidden_size": 16, "context_length": 32, "attn": "eager"}),
}  # fmt: skip
"""Families whose names occur nowhere in the engine, and which it was not built with."""
FAMILIES = list(_FAMILIES)
"""llama and qwen2 with tied and untied heads, and the other twelve that are promised, and a few more."""


def tiny_model(family, dtype=torch.float32, seed=0, **overrides):
    """A random model of a family, in training mode, with weights large enough for gradients to matter
    everywhere."""
    prefix, values = {**_FAMILIES, **UNLISTED}[family]
    attention = overrides.pop("attn", values.get("attn", "sdpa"))
    values = {**_COMMON, **{key: value for key, value in values.items() if key != "attn"}, **overrides}
    config = getattr(transformers, f"{prefix}Config")(**values)
    torch.manual_seed(seed)
    model = task_of_config(config).auto_class.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at zero and norms at one: move them, or wrong formulas would go unnoticed.
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if "norm" in name else 0.1)
    return model.to(dtype).train()


@cache
def tiny_batch(num_rows=2, num_tokens=11, seed=1):
    """Random ids with padding's id among them; labels with ignored positions."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (num_rows, num_tokens), generator=generator)
    input_ids[0, :2] = 0
    labels = input_ids.clone()
    labels[0, :3] = -100
    return {"input_ids": input_ids, "labels": labels}


def batch_for(model, **sizes):
    """A batch of the model's task: hidden tokens and padding for masked models, a short answer for
    encoder-decoders."""
    batch, task = tiny_batch(**sizes), task_of(model)
    if task is Task.CAUSAL:
        return batch
    mask = torch.ones_like(batch["input_ids"])
    mask[-1, -3:] = 0
    labels = batch["labels"].masked_fill(mask == 0, -100)
    if task is Task.MASKED:
        labels[:, ::2] = -100
        return {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": mask}
    return {"input_ids": batch["input_ids"], "labels": labels[:, :7].contiguous(), "attention_mask": mask}


def dense_gradients(model: nn.Module, loss_of):
    """Every unique parameter's dense gradient, flat, by name; the model is left without gradients."""
    model.zero_grad()
    loss_of(model).backward()
    gradients = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return gradients


def own_loss(model):
    """The model's own loss of the batch, as any training loop computes it."""
    return model(**batch_for(model)).loss


def relative_error(actual, expected):
    """‖actual − expected‖ / ‖expected‖, 0 where both are zero."""
    difference = torch.linalg.vector_norm((actual - expected).double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30)) if difference else 0.0
