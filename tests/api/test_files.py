"""Files, in the shape of the OpenAI API."""

import gzip
import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.support.requests import job_request

CONTENT = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture
def upload(client):
    def upload(name="data.jsonl", content=CONTENT, **form):
        return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"} | form)

    return upload


def test_an_upload_can_be_listed_shown_downloaded_and_deleted(client, upload, settings):
    response = upload()
    assert response.status_code == 201
    file = response.json()
    assert file["object"] == "file"
    assert (file["bytes"], file["filename"], file["purpose"]) == (len(CONTENT), "data.jsonl", "fine-tune")
    assert isinstance(file["created_at"], int)
    assert [row["id"] for row in client.get("/v1/files").json()["data"]] == [file["id"]]
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/content").content == CONTENT
    deleted = client.delete(f"/v1/files/{file['id']}")
    assert deleted.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
    assert client.delete(f"/v1/files/{file['id']}").status_code == 404
    assert list(settings.files_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("data.jsonl", b"", {}),
        ("x" * 300, CONTENT, {}),
        ("data.jsonl", CONTENT, {"purpose": "vision"}),
    ],
)
def test_a_bad_upload_is_422_and_leaves_nothing(client, upload, settings, name, content, form):
    response = upload(name, content, **form)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] in {"file", "purpose"}
    assert client.get("/v1/files").json()["data"] == []
    assert not settings.files_dir.exists() or list(settings.files_dir.iterdir()) == []


def test_a_request_without_a_file_names_the_field(client):
    response = client.post("/v1/files", data={"purpose": "fine-tune"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == "file"


def test_an_upload_that_is_too_long_is_413(client, upload):
    response = upload(content=b"x" * (1 << 21))
    assert response.status_code == 413
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/files").json()["data"] == []


def test_a_name_cannot_lead_out_of_the_folder(upload, settings):
    file = upload(name="../../evil.jsonl").json()
    assert file["filename"] == "evil.jsonl"
    assert [path.name for path in settings.files_dir.iterdir()] == [f"{file['id']}.jsonl"]


def test_a_file_that_a_job_waits_for_cannot_be_deleted(client, upload, dataset):
    file_id = upload(content=dataset.read_bytes()).json()["id"]
    body = job_request(dataset) | {"dataset": {"file_id": file_id}}
    job = client.post("/v1/jobs", json=body).json()
    response = client.delete(f"/v1/files/{file_id}")
    assert response.status_code == 409
    assert job["id"] in response.json()["detail"]
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/files/{file_id}").status_code == 200


def parquet_bytes(rows):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


ROWS = [{"text": f"the title {i} of a metal worker is welder"} for i in range(5)]


@pytest.mark.parametrize(
    ("name", "content", "num_rows"),
    [
        ("rows.json", json.dumps(ROWS).encode(), 5),
        ("rows.CSV", b"text\n" + b"".join(row["text"].encode() + b"\n" for row in ROWS), 5),
        ("rows.tsv.gz", gzip.compress(b"prompt\tcompletion\na\tb\n", mtime=0), 1),
        ("rows.parquet", parquet_bytes(ROWS), 5),
        ("book.txt", b"the title of a metal worker is welder\n" * 20, 1),
    ],
    ids=["json", "csv", "tsv.gz", "parquet", "txt"],
)
def test_a_job_takes_an_upload_of_any_format(client, upload, dataset, name, content, num_rows):
    file_id = upload(name, content).json()["id"]
    body = job_request(dataset) | {"dataset": {"file_id": file_id}}
    response = client.post("/v1/jobs", json=body, params={"dry_run": True})
    assert response.status_code == 200, response.text
    assert response.json()["num_rows"] == num_rows


def test_an_upload_in_another_format_is_refused_when_a_job_wants_it(client, upload, dataset):
    file_id = upload("rows.xlsx", b"PK").json()["id"]
    response = client.post("/v1/jobs", json=job_request(dataset) | {"dataset": {"file_id": file_id}})
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["field"] == "dataset.file_id"
    assert error["message"].startswith("cannot read .xlsx files; give JSONL, JSON, CSV, TSV, Parquet or TXT")
