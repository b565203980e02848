"""Routes of files."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, UploadFile
from starlette.responses import FileResponse

from chunkplan.engine.errors import InputError
from chunkplan.service.errors import NotFound
from chunkplan.service.files.repository import FileRepository
from chunkplan.service.files.schemas import FileDeleted, FileView
from chunkplan.service.files.service import FileService
from chunkplan.service.http.dependencies import CONTENT, CallerDep, ReadSession, part
from chunkplan.service.kit.paging import OptionalText, Page, WidestWindowDep

router = APIRouter(prefix="/v1/files", tags=["files"])
FilesDep = Annotated[FileService, part("files")]


@router.post("", status_code=201)
def upload_file(
    file: Annotated[UploadFile, File()],
    files: FilesDep,
    caller: CallerDep,
    purpose: Annotated[Literal["fine-tune"], Form()] = "fine-tune",
    expiry: Annotated[str | None, Form(alias="expires_after[seconds]", include_in_schema=False)] = None,
) -> FileView:
    """Upload training data. It is checked row by row when a job is submitted on it."""
    if expiry is not None:
        raise InputError("expires_after", "files are kept until they are deleted: leave it out")
    return FileView.of(files.upload(caller.project, file.filename, file.file))


@router.get("")
def list_files(
    session: ReadSession, window: WidestWindowDep, purpose: OptionalText = None, order: Literal["asc", "desc"] = "desc"
) -> Page[FileView]:
    """Uploaded files, newest first, or oldest first with ``order=asc``."""
    rows, has_more = FileRepository(session).page(window, purpose=purpose, oldest_first=order == "asc")
    return Page.of([FileView.of(row) for row in rows], has_more=has_more)


@router.get("/{file_id}")
def show_file(file_id: str, session: ReadSession) -> FileView:
    """One file."""
    return FileView.of(FileRepository(session).get(file_id))


@router.get("/{file_id}/content", response_class=FileResponse, responses=CONTENT)
def download_file(file_id: str, session: ReadSession, files: FilesDep) -> FileResponse:
    """The content of a file."""
    row = FileRepository(session).get(file_id)
    path = files.path(row)
    if not path.is_file():
        raise NotFound("content of file", file_id)
    headers = {"ETag": f'"{row.sha256}"'}
    return FileResponse(path, filename=row.filename, media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}")
def delete_file(file_id: str, files: FilesDep, caller: CallerDep) -> FileDeleted:
    """Delete a file; refused while an unfinished job trains on it."""
    files.delete(caller.project, file_id)
    return FileDeleted(id=file_id)
