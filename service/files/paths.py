"""Paths that users name must lie, with every symbolic link followed, below a configured root, and must not be
another project's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from chunkplan.engine.errors import InputError
from chunkplan.service.db import Database
from chunkplan.service.db.database import normalise_url
from chunkplan.service.db.tables import ArtifactRow, FileRow, JobRow
from chunkplan.service.errors import NotFound
from chunkplan.service.settings import Settings

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

IsAllowed = Callable[[Path], bool]
"""Whether a real path may be read."""


class Paths:
    """What a project may name on this machine.

    Of the service's own folders that is what the project has uploaded and what its jobs have made; the
    database and the locks are nobody's.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def dataset(self, project: str, field: str, given: str) -> Path:
        """The real path of a data file.

        Raises:
            InputError: see `resolve_below`.
        """
        settings = self._settings
        return resolve_below(field, given, self._allowed(project, [*settings.dataset_roots, settings.data_dir]))

    def model_folder(self, project: str, field: str, given: str) -> Path:
        """The real path of a model folder.

        Raises:
            InputError: see `resolve_model_folder`.
        """
        settings = self._settings
        roots = [*settings.model_roots, settings.models_dir, settings.runs_dir]
        return resolve_model_folder(field, given, self._allowed(project, roots))

    def _allowed(self, project: str, roots: Sequence[Path]) -> IsAllowed:
        below = below_any(roots)
        return lambda path: below(path) and self._is_own(project, path)

    def _is_own(self, project: str, path: Path) -> bool:
        settings = self._settings
        for folder, table in ((settings.files_dir, FileRow), (settings.runs_dir, JobRow)):
            inside = _first_part(path, folder)
            if inside is not None:
                with self._database.of(project).read() as session:
                    return session.get(table, inside.partition(".")[0]) is not None
        return _first_part(path, settings.locks_dir) is None and not self._is_database(path)

    def _is_database(self, path: Path) -> bool:
        """SQLite keeps two more files beside its own."""
        url = normalise_url(self._settings.database_url)
        if url.get_backend_name() != "sqlite" or not url.database:
            return False
        database = Path(url.database).resolve()
        return path.parent == database.parent and path.name.startswith(database.name)


def _first_part(path: Path, folder: Path) -> str | None:
    """Name of what contains a real path directly below a folder; None when it lies elsewhere, "" for the
    folder.
    """
    folder = folder.resolve()
    if not path.is_relative_to(folder):
        return None
    return next(iter(path.relative_to(folder).parts), "")


def below_any(roots: Sequence[Path]) -> IsAllowed:
    """Whether a real path lies below one of the roots, as they are now."""
    resolved = [root.resolve() for root in roots]
    return lambda path: any(path.is_relative_to(root) for root in resolved)


def resolve_below(field: str, given: str, is_allowed: IsAllowed) -> Path:
    """The real path of ``given``; relative paths start at the working directory.

    Raises:
        InputError: not allowed (said first, so that nothing else can be probed), or not there.
    """
    try:
        path = Path(given).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(field, f"not a path that can be followed: {error}") from error
    if not is_allowed(path):
        raise InputError(field, f"{given} is outside the folders that this service may read")
    try:
        exists = path.exists()
    except OSError as error:
        raise InputError(field, f"cannot read {given}: {error.strerror}") from error
    if not exists:
        raise InputError(field, f"{given} does not exist")
    return path


def resolve_model_folder(field: str, given: str, is_allowed: IsAllowed) -> Path:
    """The real path of a model folder none of whose files leads to where it is not allowed.

    Raises:
        InputError: not allowed, not there, or not a folder with a config.json.
    """
    folder = resolve_below(field, given, is_allowed)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise InputError(field, f"{given} is not a model folder: it has no config.json")
    for pattern in _MODEL_FILES:
        for file in folder.glob(pattern):
            if not is_allowed(file.resolve()):
                raise InputError(field, f"{given}: {file.name} leads outside the folders that this service may read")
    return folder


def artifact_file(run_dir: Path, row: ArtifactRow) -> Path:
    """Return the file of an artifact.

    Raises:
        NotFound: it was removed from the run's folder, or its path leads out of it.
    """
    path = (run_dir / row.path).resolve()
    if not path.is_relative_to(run_dir.resolve()) or not path.is_file():
        raise NotFound("artifact", row.name)
    return path
