"""Answers to requests that were made before, as they are sent: neither read from the database nor written
anew.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from chunkplan.service.db.tables import PlanUseRow

MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """A plan as JSON."""

    plan_id: str
    body: bytes

    @classmethod
    def of(cls, use: PlanUseRow) -> PlanAnswer:
        """What a project that has asked for a plan is told."""
        text = json.dumps(use.plan.plan, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return cls(use.plan_id, text.encode())


class Answers:
    """The answers that were given last, by project and plan. Plans never change, and are never deleted."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._known: OrderedDict[tuple[str, str], PlanAnswer] = OrderedDict()
        self._lock = Lock()

    def find(self, project: str, plan_id: str) -> PlanAnswer | None:
        """What the project was told about a plan."""
        with self._lock:
            answer = self._known.get((project, plan_id))
            if answer is not None:
                self._known.move_to_end((project, plan_id))
            return answer

    def keep(self, project: str, answer: PlanAnswer) -> PlanAnswer:
        """Keep an answer, in place of those that were asked for least lately."""
        key = project, answer.plan_id
        with self._lock:
            if key not in self._known:
                self._num_bytes += len(answer.body)
            self._known[key] = answer
            while self._num_bytes > self._max_bytes:
                _, oldest = self._known.popitem(last=False)
                self._num_bytes -= len(oldest.body)
        return answer
