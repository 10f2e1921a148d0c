"""What is asked of an engine that computes a prompt for another, and what came of it."""

from collections.abc import Sequence
from itertools import count
from threading import Lock

from cache.transfers.arrivals import Arrivals
from cache.transfers.counts import Outcome, TransferCounts
from serve import plan
from serve.front import MAX_NAME_LENGTH
from serve.request import GenerateRequest, SamplingParams

_numbers = count()


def prefill_request(
    name: str,
    token_ids: Sequence[int],
    num_pages: int,
    page_size: int,
    *,
    tenant: str,
    cache_salt: str,
    priority: int,
) -> GenerateRequest:
    """The request whose prompt's first `num_pages` pages are wanted.

    It has one token more, since an engine computes at least one, and chooses one, which nobody
    reads. `name` says on whose behalf; its id is unique in this process.
    """
    return GenerateRequest(
        request_id=f"prefill-{next(_numbers)}-{name}"[:MAX_NAME_LENGTH],
        prompt_ids=tuple(token_ids[: num_pages * page_size + 1]),
        sampling=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
        tenant=tenant,
        cache_salt=cache_salt,
        priority=priority,
    )


def request_of(sequence: plan.Sequence, num_pages: int, page_size: int) -> GenerateRequest:
    """As above, for a sequence of this engine: of a preempted one with what it has generated."""
    request = sequence.request
    return prefill_request(
        request.request_id,
        sequence.tokens,
        num_pages,
        page_size,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )


class Tally:
    """TransferCounts that any thread may add to."""

    def __init__(self) -> None:
        self._counts = TransferCounts()
        self._lock = Lock()

    def counts(self) -> TransferCounts:
        with self._lock:
            counts = self._counts
            return TransferCounts(counts.outcomes.copy(), counts.pages, counts.bytes)

    def ended(self, outcome: Outcome) -> None:
        with self._lock:
            self._counts.outcomes[outcome] += 1

    def arrived(self, num_pages: int, num_bytes: int) -> None:
        with self._lock:
            self._counts.pages += num_pages
            self._counts.bytes += num_bytes

    def ended_as(self, arrivals: Arrivals, otherwise: Outcome) -> None:
        """Nothing more comes, and it ended `otherwise` unless the receiver knows better."""
        if arrivals.is_complete:
            self.ended(Outcome.COMPLETE)
        elif arrivals.is_late:
            self.ended(Outcome.LATE)
        elif arrivals.done():
            self.ended(Outcome.CANCELLED)
        else:
            self.ended(otherwise)
