"""The catalogs over HTTP."""

from tests.conftest import TINY_MODEL


def test_models_have_the_list_envelope_and_say_which_can_be_trained(client):
    page = client.get("/v1/models").json()
    assert page["object"] == "list"
    assert not page["has_more"]
    assert page["first_id"] == page["data"][0]["id"]
    assert page["last_id"] == page["data"][-1]["id"]
    models = {model["id"]: model for model in page["data"]}
    assert len(models) >= 15
    assert models["llama-3-8b"]["num_parameters"] == 8_030_261_248
    assert [name for name, model in models.items() if model["trainable"]] == [TINY_MODEL]


def test_gpus_have_memory_and_a_source(client):
    gpus = {gpu["id"]: gpu for gpu in client.get("/v1/gpus").json()["data"]}
    assert len(gpus) >= 20
    assert gpus["rtx-4090"]["memory_bytes"] > 23 * 2**30
    assert all(gpu["source"] for gpu in gpus.values())
