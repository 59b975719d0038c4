"""Which row of the host-side tables a running request has: stable from its first step to its last.

Block tables and sampling parameters are kept per slot and gathered in batch order: a step only writes what changed.
"""

from collections.abc import Iterable

from tritium.runtime.request import Request, ScheduledBatch


class RequestSlots:
    """Gives each scheduled request a slot in [0, num_slots) and takes it back when it leaves the batch for good."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[str, int] = {}

    def admit(self, batch: ScheduledBatch) -> list[tuple[int, Request]]:
        """Free the slots of finished and preempted requests; return those that received a slot in this step."""
        self.release(r.request_id for r in batch.finished)
        self.release(r.request_id for r in batch.preempted)
        admitted = []
        for sequence in batch.sequences:
            request_id = sequence.request.request_id
            if request_id not in self._slots:
                self._slots[request_id] = self._free.pop()
                admitted.append((self._slots[request_id], sequence.request))
        return admitted

    def release(self, request_ids: Iterable[str]) -> None:
        """Take the slots back; ids without one are ignored."""
        for request_id in request_ids:
            slot = self._slots.pop(request_id, None)
            if slot is not None:
                self._free.append(slot)

    def of(self, batch: ScheduledBatch) -> list[int]:
        """The slots of the batch's sequences, in their order."""
        return [self._slots[s.request.request_id] for s in batch.sequences]
