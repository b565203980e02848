"""Fine-tune all parameters of a model in a loop of your own, one chunk at a time.

    python examples/own_loop.py MODEL_FOLDER TEXT_FILE

The folder is a Hugging Face model (config.json, safetensors, a tokenizer); the text is what it learns.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import ChunkFT

NUM_UPDATES, SEQ_LEN = 16, 32


def main(model_folder: str, text_file: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    ids = torch.tensor(tokenizer(Path(text_file).read_text())["input_ids"])
    rows = ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)

    with ChunkFT(model, num_chunks=4, lr=1e-3, optimizer="adamw", activation_checkpointing="full") as tuner:
        for update in range(NUM_UPDATES):
            batch = rows[update % len(rows)].unsqueeze(0)
            loss = tuner.backward({"input_ids": batch, "labels": batch})
            chunk = tuner.visit.chunk_index
            tuner.step()  # updates the active chunk, and moves on to the next one
            print(f"update {update + 1:2}  chunk {chunk}  loss {float(loss):.3f}")
    model.save_pretrained("tuned")


if __name__ == "__main__":
    main(*sys.argv[1:])
