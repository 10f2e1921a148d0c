"""Prompts computed by other processes, whose pages come over gRPC (`Transfer` of proto/weft/v1).

Whatever they do, the worst that comes of it is that a prompt is computed here. It does not know
how they compute, or when a prompt is asked for.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import Any

import grpc

from cache.keys import Key
from cache.tiers.breaker import Breaker
from cache.tiers.record import RecordFormat
from cache.transfers.arrivals import Arrivals
from cache.transfers.chunks import Assembler, BrokenTransfer, Chunk
from cache.transfers.counts import Outcome, TransferCounts
from serve import plan
from serve.page_images import PageImages
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.prefill.asking import Tally, request_of
from serve.prefill.pulls import Pulls
from serve.request import GenerateRequest

log = logging.getLogger("weft")

MOST_ATTEMPTS = 2
"""Engines that are asked for one prompt; what the first sent is not asked for again."""
LONGEST_OFF_S = 10.0
"""An engine that is back is asked again as soon."""
WELL = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
"""An engine that is busy, or has no room for this prompt, may be asked for the next."""
MOST_TRANSFERS = 64
"""At once, each with a thread of its own."""

_OPTIONS = (
    # A machine that is gone closes no connection.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # One that is back is found soon.
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class _Peer:
    """An engine that may be asked."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.breaker = Breaker(f"prefill at {address}", LONGEST_OFF_S)
        self.num_left = 0
        """Pages that it has yet to send us."""
        self.may_offer = True
        """Its pages may stay on devices: until that went wrong once."""
        # Not grpc.aio's: of that a process can't have one event loop that serves and another that
        # asks ("Internal error from Core", grpcio 1.85.1).
        self.channel = grpc.insecure_channel(address, options=_OPTIONS)
        self.prefill: Any = pb_grpc.TransferStub(self.channel).Prefill

    def offer_no_more(self) -> None:
        """What it offers could not be had once."""
        if self.may_offer:
            self.may_offer = False
            log.warning("pages from %s come over gRPC from now on", self.address)


class RemotePrefill:
    """The engines at some addresses, asked from threads of its own."""

    def __init__(
        self,
        addresses: Sequence[str],
        form: RecordFormat,
        page_size: int,
        least_tokens: int,
        lease_s: float,
        destination: PageImages | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prompts of which fewer than `least_tokens` are to be computed aren't worth the way; if
        nothing comes for `lease_s`, the asking engine computes them. With a `destination` pages are
        to come from device to device (pulls.py)."""
        self._peers = [_Peer(address) for address in addresses]
        self._form, self._page_size = form, page_size
        self._least_tokens, self._lease_s = least_tokens, lease_s
        self._destination, self._clock = destination, clock
        self._tally = Tally()
        self._lock = Lock()
        """Guards what peers have left."""
        self._wake: Callable[[], None] = lambda: None
        self._threads = ThreadPoolExecutor(MOST_TRANSFERS, thread_name_prefix="weft-prefill")

    def start(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def close(self) -> None:
        """Whoever still waits is told that nothing comes."""
        for peer in self._peers:
            peer.channel.close()
        self._threads.shutdown()

    def flush(self) -> None:
        """They are endpoints of their own, asked by others, too: Control.FlushCache is theirs."""

    def counts(self) -> TransferCounts:
        return self._tally.counts()

    def prefill(self, sequence: plan.Sequence, first: int, last: int) -> Arrivals | None:
        if (last - first) * self._page_size < self._least_tokens:
            self._tally.ended(Outcome.SHORT)
            return None
        if not self._alive():
            self._tally.ended(Outcome.NOBODY)
            return None
        assert sequence.names is not None, "only pages with names can come from elsewhere"
        request = request_of(sequence, last, self._page_size)
        keys = sequence.names.keys[first:last]
        transfer = _Transfer(self, request, keys, first)
        arrivals = Arrivals(
            keys,
            self._wake,
            on_taken=transfer.taken,
            on_over=transfer.cancel,
            lease_s=self._lease_s,
            clock=self._clock,
        )
        transfer.arrivals = arrivals
        self._threads.submit(transfer.run)
        return arrivals

    def choose(self, asked: Sequence[_Peer]) -> _Peer | None:
        """The engine with the least to do for us, of those that were not asked and are not off."""
        return min(
            (peer for peer in self._alive() if peer not in asked),
            key=lambda peer: peer.num_left,
            default=None,
        )

    def owe(self, peer: _Peer, num_pages: int) -> None:
        """The engine has as many more pages yet to send, or fewer."""
        with self._lock:
            peer.num_left += num_pages

    def pulls(self, peer: _Peer) -> Pulls | None:
        """What brings pages that stay on devices, if they may."""
        if self._destination is None or not peer.may_offer:
            return None
        return Pulls(peer.address.rpartition(":")[0], self._destination, self._lease_s)

    def opening(self, request: GenerateRequest, first: int, offers: bool) -> pb.PrefillMessage:
        return pb.PrefillMessage(
            request=pb.PrefillRequest(
                request_id=request.request_id,
                token_ids=request.prompt_ids,
                tenant=request.tenant,
                cache_salt=request.cache_salt,
                priority=request.priority,
                first_page=first,
                fingerprint=self._form.fingerprint,
                lease_s=self._lease_s,
                offers=offers,
            )
        )

    def assembler(self, keys: Sequence[Key], first: int) -> Assembler:
        return Assembler(self._form, keys, first)

    @property
    def tally(self) -> Tally:
        return self._tally

    def now_s(self) -> float:
        return self._clock()

    def _alive(self) -> list[_Peer]:
        now_s = self._clock()
        return [peer for peer in self._peers if not peer.breaker.is_off(now_s)]


class _Transfer:
    """One prompt on its way here."""

    arrivals: Arrivals

    def __init__(
        self, home: RemotePrefill, request: GenerateRequest, keys: Sequence[Key], first: int
    ) -> None:
        self._home, self._request, self._keys, self._first = home, request, keys, first
        self._num_before = 0
        """Pages that came from engines asked before."""
        self._told: SimpleQueue[pb.PrefillMessage | None] = SimpleQueue()
        """What is yet to be said to the sender; None is the end."""
        self._call: Any = None
        self._is_cancelled = False

    def taken(self, num_pages: int) -> None:
        """So that the sender goes on."""
        num_pages = max(0, num_pages - self._num_before)
        self._told.put(pb.PrefillMessage(taken=pb.PagesTaken(num_pages=num_pages)))

    def cancel(self) -> None:
        self._is_cancelled = True
        if (call := self._call) is not None:
            call.cancel()

    def run(self) -> None:
        asked: list[_Peer] = []
        try:
            while not self._is_cancelled and len(asked) < MOST_ATTEMPTS:
                peer = self._home.choose(asked)
                if peer is None or self._ask(peer):
                    return
                asked.append(peer)
        except Exception:
            log.exception("a prompt is computed here that another engine should have")
        finally:
            self.arrivals.end()

    def _ask(self, peer: _Peer) -> bool:
        """Whether all that was missing came."""
        outcome = Outcome.FAILED
        self._num_before = self.arrivals.num_arrived
        num_left = len(self._keys) - self._num_before
        self._home.owe(peer, num_left)
        try:
            self._receive(peer)
            peer.breaker.succeeded()
            return True
        except BrokenTransfer as error:
            outcome = Outcome.BROKEN
            peer.breaker.failed(error, self._home.now_s())
        except grpc.RpcError as error:
            if self.arrivals.is_late:
                peer.offer_no_more()
                peer.breaker.failed(TimeoutError("nothing came"), self._home.now_s())
            elif not self._is_cancelled:
                _count_failure(peer, error, self._home.now_s())
        finally:
            self._home.owe(peer, -num_left)
            self._home.tally.ended_as(self.arrivals, outcome)
        return False

    def _receive(self, peer: _Peer) -> None:
        """What is missing. Raises BrokenTransfer and grpc.RpcError."""
        first = self._first + self._num_before
        assembler = self._home.assembler(self._keys[self._num_before :], first)
        pulls = self._home.pulls(peer)
        told: SimpleQueue[pb.PrefillMessage | None] = SimpleQueue()
        told.put(self._home.opening(self._request, first, pulls is not None))
        self._told = told  # from now on `taken` comes after the opening
        call = self._call = peer.prefill(iter(told.get, None))
        try:
            if self._is_cancelled:
                call.cancel()
            for message in call:
                self._take(message, assembler, pulls)
                if self.arrivals.is_complete:
                    break
            assembler.finish()
        except BrokenTransfer:
            if pulls is not None:
                peer.offer_no_more()
            raise
        finally:
            told.put(None)
            call.cancel()

    def _take(self, message: pb.PageChunks, assembler: Assembler, pulls: Pulls | None) -> None:
        """Also of a message that is broken, what came before that."""
        images: list[Any] = []
        try:
            for chunk in message.chunks:
                if pulls is not None and chunk.HasField("offer"):
                    page = pulls.take(chunk.offer)
                    assembler.add_whole(chunk.page)
                    images.append(page)
                    continue
                image = assembler.add(Chunk(chunk.page, chunk.offset, chunk.data))
                if image is not None:
                    images.append(image)
        finally:
            num_bytes = sum(image.nbytes for image in images if isinstance(image, memoryview))
            self._home.tally.arrived(len(images), num_bytes)
            self.arrivals.accept(images)


def _count_failure(peer: _Peer, error: Any, now_s: float) -> None:
    """With the status first, by which a Breaker tells reasons apart."""
    code: grpc.StatusCode = error.code()
    if code not in WELL:
        peer.breaker.failed(ConnectionError(f"{code.name}: {error.details()}"), now_s)
