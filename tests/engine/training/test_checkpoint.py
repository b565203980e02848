"""Checkpoints: resumed is uninterrupted, damage is passed over and said, what did not change is not
rewritten."""

import json

import pytest
import torch

from chunkplan.engine import ChunkFT
from chunkplan.engine.training.checkpoint import CheckpointError, _digest, resume, save_checkpoint
from tests.support.families import tiny_batch, tiny_model

OPTIONS = {"num_chunks": 4, "lr": 1e-3, "weight_decay": 0.01}


def advance(tuner, num_updates):
    for _ in range(num_updates):
        tuner.backward(tiny_batch(seed=tuner.num_updates))
        tuner.step()


def final_weights(tuner):
    tuner.close()
    return {name: parameter.detach().clone() for name, parameter in tuner.model.named_parameters()}


def new_tuner(family="llama-tied", dtype=torch.float32, **options):
    return ChunkFT(tiny_model(family, dtype), **{**OPTIONS, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"states": "reset"}, {"switch_every": 3}, {"switch_every": 3, "states": "reset"}, {"order": "random"}],
    ids=str,
)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, dtype, options):
    tuner = new_tuner(dtype=dtype, **options)
    advance(tuner, 7)
    save_checkpoint(tuner, tmp_path, "same", {"seen": 7})
    advance(tuner, 7)
    expected = final_weights(tuner)
    torch.manual_seed(99)  # stochastic rounding must go on from the saved random state
    again = new_tuner(dtype=dtype, **options)
    torch.rand(5)
    resumed = resume(again, tmp_path, "same")
    assert (resumed.step, resumed.notes, resumed.passed_over) == (7, {"seen": 7}, [])
    advance(again, 7)
    actual = final_weights(again)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def saved_run(folder, at=(4, 8), last=12):
    """Final weights of a run that saved checkpoints on its way."""
    tuner = new_tuner()
    for step in at:
        advance(tuner, step - tuner.num_updates)
        save_checkpoint(tuner, folder, "same", {})
    advance(tuner, last - tuner.num_updates)
    return final_weights(tuner)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def count_on(path):
    path.write_text(path.read_text().replace('"num_updates": 8', '"num_updates": 9'))


DAMAGES = [
    ("chunk-00002.safetensors", cut_short, "chunk-00002.safetensors is damaged or missing"),
    ("chunk-00002.safetensors", flip_a_bit, "chunk-00002.safetensors is damaged or missing"),
    ("chunk-00002.safetensors", lambda path: path.unlink(), "chunk-00002.safetensors is damaged or missing"),
    ("manifest.json", cut_short, "its manifest cannot be read"),
    ("manifest.json", count_on, "its manifest is damaged"),
    ("manifest.json", lambda path: path.unlink(), "its manifest cannot be read"),
]


@pytest.mark.parametrize(("file", "damage", "sentence"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, file, damage, sentence):
    expected = saved_run(tmp_path)
    damage(tmp_path / "step-00000008" / file)
    tuner = new_tuner()
    resumed = resume(tuner, tmp_path, "same")
    assert (resumed.step, resumed.passed_over) == (4, [f"step-00000008: {sentence}"])
    # Later checkpoints neither link to the damaged files nor count them as kept.
    advance(tuner, 2)
    save_checkpoint(tuner, tmp_path, "same", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    again = new_tuner()
    assert resume(again, tmp_path, "same").step == 6
    advance(again, 6)
    actual = final_weights(again)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_only_chunks_that_changed_are_written_again(tmp_path):
    tuner = new_tuner()
    inodes, names = {}, [f"chunk-{index:05d}.safetensors" for index in range(4)]
    for step in (4, 5, 6):
        advance(tuner, step - tuner.num_updates)
        saved = save_checkpoint(tuner, tmp_path, "same", {}, keep=2)
        inodes[step] = [(saved.path / name).stat().st_ino for name in names]
        assert saved.size_bytes == sum((saved.path / name).stat().st_size for name in names)
    # Updates 5 and 6 changed chunks 3 and 2; the others are the files of the checkpoint that was removed.
    assert [new == old for new, old in zip(inodes[6], inodes[4], strict=True)] == [True, True, False, False]
    expected = final_weights(tuner)
    again = new_tuner()
    assert resume(again, tmp_path, "same").step == 6
    actual = final_weights(again)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_no_two_checkpoints_share_a_file_so_damage_hits_one(tmp_path, keep):
    tuner = new_tuner()
    for _ in range(8):
        advance(tuner, 1)
        save_checkpoint(tuner, tmp_path, "same", {}, keep)
        assert all(file.stat().st_nlink == 1 for file in tmp_path.glob("step-*/*"))
    assert len(list(tmp_path.iterdir())) == keep
    for file in (tmp_path / "step-00000008").iterdir():
        flip_a_bit(file)
    assert resume(new_tuner(), tmp_path, "same").step == (0 if keep == 1 else 7)


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(95, "Operation not supported", str(target))

    monkeypatch.setattr("os.link", refuse)
    expected = saved_run(tmp_path, at=(4, 5, 6), last=6)
    again = new_tuner()
    assert resume(again, tmp_path, "same").step == 6
    actual = final_weights(again)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("switch_every", [1, 3])
def test_a_checkpoint_written_on_a_gpu_resumes_on_the_cpu(tmp_path, switch_every):
    """Its manifest holds the GPU's random state too; everything goes to where the weights are now."""
    tuner = new_tuner(switch_every=switch_every)
    advance(tuner, 7)
    saved = save_checkpoint(tuner, tmp_path, "same", {})
    manifest = json.loads((saved.path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["random_states"]["cuda"] = "00" * 16
    (saved.path / "manifest.json").write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))
    advance(tuner, 7)
    again = new_tuner(switch_every=switch_every)
    assert resume(again, tmp_path, "same").step == 7
    kept = [block for chunk in again.optimizer.chunks.values() for block in chunk.host.values()]
    assert {(t.device.type, t.dtype) for block in kept for t in block.values()} == {("cpu", torch.float32)}
    advance(again, 7)
    actual, expected = final_weights(again), final_weights(tuner)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_older_checkpoints_are_removed_and_chunks_never_updated_are_not_written(tmp_path):
    tuner = new_tuner()
    for step in range(1, 5):
        advance(tuner, 1)
        saved = save_checkpoint(tuner, tmp_path, "same", {}, keep=2)
        assert len(list(saved.path.glob("chunk-*"))) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    saved_run(tmp_path)
    with pytest.raises(
        CheckpointError, match="step-00000008 was written with another model, data set or training spec"
    ):
        resume(new_tuner(), tmp_path, "other")


def test_without_checkpoints_a_run_starts_at_zero(tmp_path):
    resumed = resume(new_tuner(), tmp_path / "missing", "same")
    assert (resumed.step, resumed.notes, resumed.passed_over) == (0, {}, [])


def test_the_manifest_holds_the_position(tmp_path):
    tuner = new_tuner(switch_every=2)
    advance(tuner, 5)
    saved = save_checkpoint(tuner, tmp_path, "same", {})
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert manifest["num_updates"] == 5
    counts = {entry["chunk_index"]: entry["num_updates"] for entry in manifest["files"].values()}
    assert counts == {3: 2, 2: 2, 1: 1}
    again = new_tuner(switch_every=2)
    resume(again, tmp_path, "same")
    assert (again.visit.chunk_index, again.visit.is_first) == (1, False)
