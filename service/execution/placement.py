"""Which queued job a device takes next. Reads only; whoever starts the job holds the host's turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from chunkplan.service.jobs.repository import JobRepository, Waiting
from chunkplan.service.machines.devices import Device


@dataclass(frozen=True)
class Load:
    """What the attempts on a device take of it, until they have ended."""

    num_jobs: int = 0
    num_bytes: int = 0


IDLE = Load()


@dataclass(frozen=True)
class Place:
    """A device of a host, what runs there, and the other devices beside it."""

    device: Device
    devices: Sequence[Device]
    """All devices of the host, this one among them."""
    loads: Mapping[str, Load]
    """By device; idle ones may be missing."""
    passing_over: Collection[str] = ()
    """Jobs that are not for this device now."""

    @property
    def is_full(self) -> bool:
        """Whether as many jobs run there as may."""
        return self.loads.get(self.device.name, IDLE).num_jobs >= self.device.max_jobs

    def next_job(self, jobs: JobRepository, now: datetime, longest_delay: timedelta) -> Waiting | None:
        """The job that should start there now; one that fits no device of the host is next too, to be
        rejected.

        It is the one whose turn it is. If that does not fit beside what runs, room is kept for it on one
        device, the one with the most room: nothing else starts there until it fits. As jobs end there its
        room grows, and once another device has more, it is kept there. So what is large waits, but is never
        passed for ever, and on the other devices the next ones that fit may start.
        """
        if self.is_full:
            return None
        device, free = self.device, self._free_bytes(self.device)
        head = self._next(jobs, now, longest_delay)
        if head is not None and head.upper_bytes > device.memory_bytes:
            if not self._fitting(head):
                return head
            head = self._next(jobs, now, longest_delay, device.memory_bytes)
        if head is None or head.upper_bytes <= free:
            return head
        if max(self._fitting(head), key=self._free_bytes) == device:
            return None
        return self._next(jobs, now, longest_delay, free)

    def _next(
        self, jobs: JobRepository, now: datetime, longest_delay: timedelta, max_bytes: int | None = None
    ) -> Waiting | None:
        return jobs.next_queued(
            self.device.names, now, longest_delay, max_bytes=max_bytes, passing_over=self.passing_over
        )

    def _fitting(self, job: Waiting) -> list[Device]:
        """The devices that are large enough for a job."""
        return [
            device for device in self.devices if job.device in device.names and job.upper_bytes <= device.memory_bytes
        ]

    def _free_bytes(self, device: Device) -> int:
        return device.memory_bytes - self.loads.get(device.name, IDLE).num_bytes
