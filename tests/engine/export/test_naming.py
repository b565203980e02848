"""Names of exported models say what they are, and never collide."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkplan.engine.export.names import output_name, output_prefix, size_name
from chunkplan.engine.spec import OutputSpec


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (134_515_008, "135m"),
        (1_100_048_384, "1.1b"),
        (8_030_261_248, "8b"),
        (70_553_706_496, "71b"),
        (999_900_000, "1b"),
        (96_000, "96k"),
        (12, "1k"),
        (9_960_000, "10m"),
    ],
)
def test_sizes_are_written_as_in_model_names(count, name):
    assert size_name(count) == name


@pytest.mark.parametrize(
    ("base", "dataset", "prefix"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "soc_codes.jsonl", "smollm2-135m-instruct-chunkft-soc_codes-v"),
        ("gpt2", "/data/Titles (new).csv.gz", "gpt2-124m-chunkft-titles-new-v"),
        ("/home/me/my model/", "chats", "my-model-124m-chunkft-chats-v"),
        ("llama-3.2-1b", "a.parquet", "llama-3.2-1b-chunkft-a-v"),
        ("qwen2.5-b", "v1.2-final.txt", "qwen2.5-b-124m-chunkft-v1-v"),
        ("模型", "数据.jsonl", "model-124m-chunkft-data-v"),
    ],
)
def test_names_follow_the_pattern(base, dataset, prefix):
    assert output_prefix(base, 124_439_808, "chunkft", dataset) == prefix


def test_a_suffix_stands_for_the_data():
    assert output_prefix("gpt2", 124_439_808, "full", "rows.csv", "V1.5 of mine") == "gpt2-124m-full-v1.5-of-mine-v"


def test_the_number_is_the_next_free_one():
    assert output_name("a-v", []) == "a-v1"
    assert output_name("a-v", ["a-v1", "a-v10", "a-v2", "a-vx", "b-v99"]) == "a-v11"


@given(st.text(max_size=300), st.text(max_size=300), st.integers(0, 10**13))
def test_whatever_the_parts_are_the_name_is_valid(base, dataset, count):
    name = output_name(output_prefix(base, count, "lora", dataset), [])
    assert OutputSpec(name=name).name == name
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*-lora-[a-z0-9._-]+-v1", name)
