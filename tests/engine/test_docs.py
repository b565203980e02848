"""Every code block of docs/engine.md runs, in the order of the page."""

import re
from pathlib import Path

import torch

from tests.support.families import tiny_batch, tiny_model
from tests.support.tiny import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_page_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    model = tiny_model("llama-tied", vocab_size=400, max_position_embeddings=64)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a metal worker is welder"}\n' * 12)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {
        "torch": torch,
        "model": model,
        "loader": [tiny_batch(seed=seed) for seed in range(8)],
        "folder": tmp_path,
        "path": path,
        "tokenizer": tiny_tokenizer(),
    }
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["saved"].step == 8
    assert len(names["active"]) > 0
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
