"""From the queue to a device: the job whose turn it is, with a plan that is up to date."""

from __future__ import annotations

from collections.abc import Sequence

from chunkplan.service.execution.ledger import Claimed, Ledger, Unchecked
from chunkplan.service.execution.replanning import Replanned, Replanner
from chunkplan.service.job_states import Reason
from chunkplan.service.machines.devices import Device


class Dispatcher:
    """Claims jobs for the devices of this host. Plans that have to be made anew are made meanwhile, in
    threads.
    """

    def __init__(self, ledger: Ledger, replanner: Replanner, devices: Sequence[Device]) -> None:
        self._ledger = ledger
        self._replanner = replanner
        self._devices = devices

    def collect(self) -> None:
        """Gives jobs the plans that have come back."""
        self._replanner.collect(self._replan)

    def claim(self, device: Device) -> Claimed | None:
        """Gives the job whose turn it is to a device; None too while that job's plan is being made."""
        while not self._replanner.is_waiting(device):
            claimed = self._ledger.claim(
                device,
                self._devices,
                passing_over=self._replanner.not_for(device),
                is_current=self._replanner.is_current,
            )
            if not isinstance(claimed, Unchecked):
                return claimed
            try:
                job = self._ledger.planned(claimed.job_id)
            except (ValueError, KeyError) as error:  # what no version can read must not keep the others waiting
                self._ledger.reject(claimed.job_id, Reason.ERROR, f"its plan cannot be read: {error}")
                continue
            found = self._replanner.look(job, device)
            if found is not None:
                self._replan(found)
        return None

    def close(self) -> None:
        """Begins no more plans."""
        self._replanner.close()

    def _replan(self, found: Replanned) -> bool:
        places = [device for device in self._devices if found.job.job_id not in self._replanner.not_for(device)]
        return self._ledger.replan(found, places)
