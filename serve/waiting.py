"""Sequences that wait, in the order in which they are to be served.

It does not know what they wait for.
"""

import heapq

from serve.plan import Sequence


class WaitingQueue:
    """A heap by priority, then by arrival: a preempted sequence keeps its place."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (*precedence(sequence), sequence))

    def remove(self, sequence: Sequence) -> None:
        if self.first is sequence:
            heapq.heappop(self._heap)
            return
        self._heap = [entry for entry in self._heap if entry[2] is not sequence]
        heapq.heapify(self._heap)

    @property
    def first(self) -> Sequence | None:
        """The one to be served next."""
        return self._heap[0][2] if self._heap else None

    @property
    def shortest(self) -> Sequence | None:
        """Of those with the first one's priority."""
        alike = (s for priority, _, s in self._heap if priority == self._heap[0][0])
        return min(alike, key=lambda sequence: sequence.num_left, default=None)


def precedence(sequence: Sequence) -> tuple[int, int]:
    """Lower goes first."""
    return (sequence.request.priority, sequence.order)
