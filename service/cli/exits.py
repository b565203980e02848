"""How a command ends when it does not end well: one line, and a code that scripts can rely on."""

from __future__ import annotations

FAILED, USAGE, DOES_NOT_FIT = 1, 2, 3


class CommandError(Exception):
    """Ends the command with one line on stderr.

    Args:
        message: what is wrong, and what to do about it where that is known.
        exit_code: `FAILED`, `USAGE` or `DOES_NOT_FIT`.
    """

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
