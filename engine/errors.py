"""The one exception for bad input: it names the field and the fix.

Every front end renders it: the CLI as one line, the HTTP service as problem+json, a library user as an
exception.
"""

from __future__ import annotations


class InputError(ValueError):
    """A value that the user gave cannot be used.

    Args:
        field: dotted path of the offending field in the request (``training.schedule.num_chunks``).
        message: what is wrong and what would be right, one sentence, without the field's name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
