"""The catalogs: every name that a user may type, every fact against its published figure, every absurdity
refused."""

import json
import math
import re
import stat
import subprocess
import sys
import time

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import ModelConfig, ModelPath
from chunkplan.planner.catalog import ModelEntry, detect_gpu, detect_gpus, find_gpu, find_model, gpus, models
from chunkplan.planner.spec import GpuSpec

CONTRACT_GPUS = {"rtx-4090", "rtx-3090", "rtx-3060-12gb", "a100-80gb", "h100-80gb", "h800-80gb", "h200"}
CONTRACT_MODELS = {"llama-2-7b", "llama-3-8b", "llama-3-70b", "qwen2.5-7b", "gpt2", "smollm2-135m-instruct"}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


# GPUs


def test_gpu_rows_are_plausible_and_unique():
    rows = gpus()
    names = [gpu.name for gpu in rows]
    assert len(names) == len(set(names)) >= 45
    assert set(names) >= CONTRACT_GPUS
    for gpu in rows:
        assert gpu.source
        assert 4e9 < gpu.memory_bytes < 450e9
        assert 1e11 < gpu.memory_bandwidth < 1e13
        assert gpu.fp32_flops <= gpu.bf16_flops <= 200 * gpu.fp32_flops
        assert gpu.fp16_flops is None or gpu.fp16_flops > gpu.bf16_flops, "only before Ampere"
        assert 1e10 <= gpu.link_bandwidth < 6.4e10 or gpu.kind == "mps"
        assert 50 < gpu.power_watts < 2000
        assert (gpu.price_usd is None) == (gpu.price_source is None)
        assert (gpu.rent_usd_per_hour is None) == (gpu.rent_source is None)


def test_every_market_is_in_the_catalog():
    rows = gpus()
    assert {gpu.kind for gpu in rows} == {"cuda", "rocm", "mps"}
    assert {gpu.vendor for gpu in rows} == {"nvidia", "amd", "apple"}
    dated = [gpu.price_source or gpu.rent_source for gpu in rows if gpu.price_usd or gpu.rent_usd_per_hour]
    assert len(dated) >= 45
    assert all(re.search(r"20\d\d-\d\d", text) for text in dated), "a price without a month is worth nothing"


def test_apples_memory_is_what_a_process_may_use():
    """recommendedMaxWorkingSetSize of llama.cpp's logs, in MB: 22906.50 of 32 GB, 51539.61 of 64 GB."""
    assert find_gpu("apple-m1-max-32gb").memory_bytes == pytest.approx(22906.50e6, rel=1e-4)
    assert find_gpu("M1 Max 64GB").memory_bytes == pytest.approx(51539.61e6, rel=1e-4)


def test_contract_memory_sizes_are_the_drivers():
    assert find_gpu("rtx-4090").memory_bytes == 25_757_220_864
    assert find_gpu("h100-80gb").memory_bytes == 81_559 * 2**20
    assert find_gpu("h200").memory_bytes == 143_771 * 2**20


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("RTX3060Ti", "rtx-3060-ti"),
        ("rtx 4070 TI SUPER", "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("RTX 3060", "rtx-3060-12gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("H100", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-80gb-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("A6000", "rtx-a6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("Radeon PRO W7900", "radeon-pro-w7900"),
        ("Apple M4 Max 128GB", "apple-m4-max-128gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000-blackwell"),
    ],
)
def test_common_names_resolve(name, identity):
    assert find_gpu(name).name == identity


@pytest.mark.parametrize("name", [gpu.name for gpu in gpus()])
def test_every_id_resolves_to_itself_in_any_case(name):
    assert find_gpu(name.upper()).name == name


@pytest.mark.parametrize(("name", "near"), [("rtx-4091", "rtx-4090"), ("a100", "a100-80gb"), ("h10", "h100-80gb")])
def test_unknown_gpus_name_near_matches(name, near):
    with pytest.raises(InputError) as failure:
        find_gpu(name)
    assert failure.value.field == "gpu"
    assert near in failure.value.message


def test_a_nonsense_gpu_says_where_the_list_is():
    with pytest.raises(InputError, match="chunkplan gpus"):
        find_gpu("?!")


def test_a_given_gpu_is_taken_as_it_is():
    gpu = GpuSpec(name="my card", memory_bytes=10**10)
    assert find_gpu(gpu) is gpu


def test_cpu_is_this_machine():
    cpu = find_gpu("CPU")
    assert cpu.kind == "cpu"
    assert cpu.source == "this machine"
    with open("/proc/meminfo") as file:  # noqa: PTH123
        physical_bytes = int(file.readline().split()[1]) * 1024
    assert 2**28 < cpu.memory_bytes <= physical_bytes
    assert 1e9 < cpu.fp32_flops < 1e14


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts a fake nvidia-smi first on the path, printing the given text."""

    def install(text, exit_code=0):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {exit_code}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


@pytest.mark.parametrize(
    ("line", "identity"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 8.9", "rtx-4090"),
        ("NVIDIA GeForce RTX 3080, 12288, 8.6", "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 3080, 10240, 8.6", "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 4060 Ti, 16380, 8.9", "rtx-4060-ti-16gb"),
        ("NVIDIA H100 80GB HBM3, 81559, 9.0", "h100-80gb"),
        ("NVIDIA A10G, 22731, 8.6", "a10g"),
    ],
)
def test_the_drivers_gpu_is_matched_by_name_and_memory(driver, line, identity):
    driver(f"0, GPU-1, {line}")
    gpu = detect_gpu()
    assert gpu.name == identity
    assert gpu.memory_bytes == int(line.split(",")[1]) * 2**20
    assert "driver" in gpu.source


def test_an_unlisted_gpu_keeps_the_drivers_facts(driver):
    driver("0, GPU-1, NVIDIA Quantum 9000, 50000, 13.0")
    gpu = detect_gpu()
    assert (gpu.name, gpu.compute_capability, gpu.memory_bytes) == ("NVIDIA Quantum 9000", "13.0", 50000 * 2**20)


def test_every_device_is_found_and_visible_ones_in_their_order(driver, monkeypatch):
    driver(
        "0, GPU-aa11, NVIDIA L4, 23034, 8.9\n1, GPU-bb22, NVIDIA A10G, 22731, 8.6\n2, GPU-bb33, NVIDIA L40S, 46068, 8.9"
    )
    assert [gpu.name for gpu in detect_gpus()] == ["l4", "a10g", "l40s"]
    for visible, names in {
        "2,0": ["l40s", "l4"],
        "GPU-bb3, 1": ["l40s", "a10g"],
        "1,7,0": ["a10g"],  # as CUDA does: what comes after an unknown one is not seen
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.name for gpu in detect_gpus()] == names
        assert detect_gpu().name == names[0]


def test_no_visible_device_means_cpu(driver, monkeypatch):
    driver("0, GPU-aa11, NVIDIA L4, 23034, 8.9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_gpu().kind == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-c7384736-a75d-5afc-978f-d2f1294409fd")
    with pytest.raises(InputError, match="MIG") as failure:
        detect_gpu()
    assert failure.value.field == "gpu"


@pytest.mark.parametrize(
    ("text", "code"), [("No devices were found", 0), ("NVIDIA-SMI has failed", 9), ("0, GPU-1, x, [N/A], 1", 0)]
)
def test_a_driver_without_devices_means_cpu(driver, text, code):
    driver(text, code)
    assert detect_gpu().kind == "cpu"


# Models


def test_model_rows_are_complete_and_unique():
    rows = models()
    identities = [entry.id for entry in rows]
    assert len(identities) == len(set(identities)) >= 45
    assert set(identities) >= CONTRACT_MODELS
    for entry in rows:
        assert entry.source
        assert entry.licence
        assert entry.config["architectures"] == [entry.architecture]
        assert find_model(entry.id) is entry
        assert find_model(str(entry.hf_name)) is entry


def test_every_model_builds_offline_with_its_published_parameter_count():
    from chunkplan.engine.model.loading import meta_model
    from chunkplan.engine.spec import Precision

    started = time.perf_counter()
    wrong = {}
    for entry in models():
        model = meta_model(entry.config, Precision.BF16, "eager")
        count = sum(parameter.numel() for parameter in model.parameters())
        if count != entry.num_parameters or type(model).__name__ != entry.architecture:
            wrong[entry.id] = (count, entry.num_parameters, type(model).__name__)
    assert not wrong
    assert time.perf_counter() - started < 60


def test_every_task_and_mixtures_of_experts_are_in_the_catalog():
    endings = {entry.architecture.rpartition("For")[2] for entry in models()}
    assert endings >= {"CausalLM", "MaskedLM", "ConditionalGeneration"}
    assert sum("num_experts_per_tok" in entry.config for entry in models()) >= 6


def test_built_configs_have_the_published_positions():
    """Rotary settings, windows and layer patterns survive the way through transformers."""
    from transformers import AutoConfig

    def built(name):
        return AutoConfig.for_model(**find_model(name).config)

    assert built("llama-3-8b").rope_parameters["rope_theta"] == 500_000
    assert built("llama-3.1-8b").rope_parameters["rope_type"] == "llama3"
    assert built("llama-3.2-1b").rope_parameters["factor"] == 32
    assert built("pythia-1b").rope_parameters["partial_rotary_factor"] == 0.25
    assert built("gemma-2-2b").layer_types[:2] == ["sliding_attention", "full_attention"]
    assert built("gemma-3-1b").layer_types.count("full_attention") == 4
    assert built("mistral-7b").sliding_window == 4096
    assert built("qwen2.5-7b").layer_types == ["full_attention"] * 28
    assert built("qwen3-4b").head_dim == 128


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("META-LLAMA/meta-llama-3-8b", "llama-3-8b"),
        ("Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("LLAMA-2-7B", "llama-2-7b"),
        (" gpt2 ", "gpt2"),
    ],
)
def test_model_names_resolve(name, identity):
    assert find_model(name).id == identity


def test_unknown_models_name_near_matches():
    with pytest.raises(InputError) as failure:
        find_model("lama-3-8b")
    assert failure.value.field == "model"
    assert "llama-3-8b" in failure.value.message


def test_a_local_folder_is_read(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    entry = find_model(ModelPath(path=str(folder)))
    assert entry == ModelEntry(
        id="my-model",
        hf_name=None,
        architecture="LlamaForCausalLM",
        num_parameters=None,
        config=TINY,
        licence=None,
        source="config.json of my-model",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"{not json", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (5 * 2**20), "larger than"),
    ],
)
def test_an_unusable_folder_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as failure:
        find_model(ModelPath(path=str(tmp_path)))
    assert failure.value.field == "model.path"


def test_an_inline_config_is_taken():
    entry = find_model(ModelConfig(config=TINY))
    assert (entry.id, entry.architecture, entry.num_parameters) == ("config", "LlamaForCausalLM", None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": "llamma"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "x" * 10**6}, "model_type"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 2001}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"hidden_size": 65}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 10**5000}, "hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"intermediate_size": [128, 10**9]}, "intermediate_size"),
        ({"vocab_size": 10**8}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_scaling": {"factor": math.inf}}, "rope_scaling.factor"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "text_config.num_hidden_layers"),
        ({"audio_config": {"text_config": {"n_embd": -1}}}, "audio_config.text_config.n_embd"),
        ({"num_experts": 10**7}, "num_experts"),
    ],
)
def test_absurd_configs_are_refused_in_milliseconds(change, field):
    find_model(ModelConfig(config=TINY))
    started = time.perf_counter()
    with pytest.raises(InputError) as failure:
        find_model(ModelConfig(config={**TINY, **change}))
    assert time.perf_counter() - started < 0.05
    assert failure.value.field == f"model.config.{field}"
    assert len(str(failure.value)) < 400


def test_nested_and_endless_configs_are_refused():
    nested = value = {}
    for _ in range(500):
        value["a"] = {}
        value = value["a"]
    for config in ({**TINY, "a": nested}, {**TINY, "a": [0] * 300_000}):
        with pytest.raises(InputError) as failure:
            find_model(ModelConfig(config=config))
        assert failure.value.field == "model.config"


def test_heads_need_not_divide_when_the_head_size_is_given():
    assert (
        find_model(ModelConfig(config={**TINY, "hidden_size": 70, "head_dim": 16})).architecture == "LlamaForCausalLM"
    )


def test_other_spellings_are_checked_too():
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 0, "n_head": 12}
    with pytest.raises(InputError) as failure:
        find_model(ModelConfig(config=gpt2))
    assert failure.value.field == "model.config.n_layer"


def test_known_model_types_are_those_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        entry = find_model(ModelConfig(config={"model_type": model_type}))
        assert entry.architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def test_the_catalog_loads_fast_and_without_torch():
    program = (
        "import sys, time\n"
        "import chunkplan.planner.spec\n"
        "started = time.process_time()\n"
        "from chunkplan.planner.catalog import find_gpu, find_model, gpus, models\n"
        "imported = time.process_time()\n"
        "gpus(), models(), find_gpu('rtx 4090'), find_model('llama-3-8b')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(time.process_time() - imported)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(answer) < 0.03
