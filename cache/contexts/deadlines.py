"""When what is due: a heap in which what changed is passed over.

It does not know clocks, or what a key stands for.
"""

from heapq import heapify, heappop, heappush

SLACK = 64
"""A heap this small is not worth clearing of what was passed over."""


class Deadlines[K: (bytes, tuple[str, str])]:
    """The second from which each key is due."""

    def __init__(self) -> None:
        self._due_s: dict[K, float] = {}
        self._heap: list[tuple[float, K]] = []
        """Each of the above, and others that hold no longer."""

    def __len__(self) -> int:
        return len(self._due_s)

    def get(self, key: K) -> float | None:
        return self._due_s.get(key)

    def set(self, key: K, due_s: float) -> None:
        """Instead of what held for the key before."""
        self._due_s[key] = due_s
        heappush(self._heap, (due_s, key))
        if len(self._heap) > 2 * len(self._due_s) + SLACK:
            self._heap = [(due_s, key) for key, due_s in self._due_s.items()]
            heapify(self._heap)

    def remove(self, key: K) -> None:
        del self._due_s[key]

    def take_due(self, now_s: float) -> list[K]:
        """Those that are due, the earliest first; they are no longer known."""
        due: list[K] = []
        while self._heap and self._heap[0][0] <= now_s:
            due_s, key = heappop(self._heap)
            if self._due_s.get(key) == due_s:
                del self._due_s[key]
                due.append(key)
        return due
