"""From an artifact's row to its file."""

from __future__ import annotations

from pathlib import Path

from chunkplan.service.db.tables import ArtifactRow
from chunkplan.service.errors import NotFound


def artifact_file(run_dir: Path, row: ArtifactRow) -> Path:
    """The file of an artifact.

    Raises:
        NotFound: it was removed from the run's folder, or its path leads out of it.
    """
    path = (run_dir / row.path).resolve()
    if not path.is_relative_to(run_dir.resolve()) or not path.is_file():
        raise NotFound("artifact", row.name)
    return path
