"""Prompts computed by another server: whatever it or the way does, the tokens are the same."""

import asyncio
import random
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import pytest

from cache.tiers.record import RecordFormat
from cache.transfers.counts import Outcome
from cache.transfers.sending import Sending
from serve.api.transfer_service import TransferService
from serve.front import Front
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.prefill.remote import MOST_TRANSFERS, RemotePrefill
from serve.request import FinishReason
from tests.serve.fake_engine import served
from tests.serve.harness import (
    DENSE,
    PAGE_SIZE,
    Answer,
    compile_few,
    generate,
    greedy,
    make_parts,
    random_prompts,
)
from tests.serve.prefill.split import (
    FORM_KEY,
    LEAST_TOKENS,
    TIMEOUT_S,
    WEIGHTS,
    Sides,
    alone,
    form_of,
    mixed_requests,
    wait_until,
)
from tests.serve.test_prefix_caching import num_cached

NOBODY = "127.0.0.1:9"
PROMPT = random_prompts(DENSE, [100])[0]
REQUEST = greedy("a", PROMPT, 8)


@dataclass
class Faults:
    """What happens to a stream's messages on their way."""

    name: str = ""
    at: int = 0
    """The message it happens to."""
    left: int = 0
    """Streams that it still happens to."""
    held: threading.Event = field(default_factory=threading.Event)
    """Where it hangs until this is set."""


class FaultyContext:
    def __init__(self, context, faults):
        self._context, self._faults, self._num = context, faults, 0
        self._kept = None

    def __getattr__(self, name):
        return getattr(self._context, name)

    async def write(self, message):
        """Each chunk alone."""
        for chunk in message.chunks:
            number, self._num = self._num, self._num + 1
            if self._faults.name == "pause":
                self._faults.held.set()
                await asyncio.sleep(0.05)
                await self._context.write(pb.PageChunks(chunks=[chunk]))
                continue
            for one in self._changed(number, chunk):
                await self._context.write(pb.PageChunks(chunks=[one]))

    def _changed(self, number, message):
        if number == self._faults.at + 1 and self._kept is not None:
            return [message, self._kept]
        if number != self._faults.at:
            return [message]
        match self._faults.name:
            case "drop":
                return []
            case "double":
                return [message, message]
            case "reorder":
                self._kept = message
                return []
            case "corrupt":
                data = bytearray(message.data)
                data[len(data) // 2] ^= 1
                return [pb.PageChunk(page=message.page, offset=message.offset, data=bytes(data))]
            case "foreign":
                data = bytearray(message.data)
                data[12] ^= 1
                return [pb.PageChunk(page=message.page, offset=message.offset, data=bytes(data))]
            case "checksum":
                message.offer.checksum ^= 1
                return [message]
            case "place":
                message.offer.place = 32
                return [message]
            case "places":
                message.offer.id += 1_000
                message.offer.num_places = 5
                return [message]
            case "number":
                message.page += 1
                return [message]
            case "id":
                message.offer.id += 1_000
                return [message]
            case "hang":
                self._faults.held.wait(TIMEOUT_S)
                return [message]
            case "die":
                raise RuntimeError("killed in mid-transfer")
        raise AssertionError(self._faults.name)


class FaultyService(TransferService):
    faults = Faults()

    async def Prefill(self, messages, context: Any):  # noqa: N802
        fault = self.faults.name if self.faults.left else ""
        if self.faults.left:
            self.faults.left -= 1
            context = FaultyContext(context, self.faults)
        await super().Prefill(messages, context)
        if fault == "stay":
            await asyncio.Event().wait()


@dataclass(frozen=True)
class Far(Sides):
    addresses: list[str]
    service: FaultyService
    form: RecordFormat

    def flush(self) -> None:
        super().flush()
        self.prefill.flush_cache()

    def outcomes(self):
        return self.decode.transfers()[0].outcomes


def num_sent(answer):
    """Tokens of the prompt that another engine computed."""
    return answer.outputs[-1].usage.prefilled_tokens


@pytest.fixture(scope="module")
def computing():
    """The side that computes, on two devices."""
    parts = make_parts(DENSE, WEIGHTS, prefills_only=True, first_device=2)
    compile_few(parts.runner)
    engine = parts.engine(page_form=form_of(parts))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def decoding():
    parts = make_parts(DENSE, WEIGHTS, moves_pages=True)
    compile_few(parts.runner)
    return parts


@contextmanager
def far_sides(
    computing,
    decoding,
    num_peers=1,
    more_peers=(),
    lease_s=TIMEOUT_S,
    key=FORM_KEY,
    stays_on_devices=False,
    offers=True,
):
    service = FaultyService(computing, computing.page_form, "127.0.0.1" if offers else "")
    service.faults = Faults()
    form = RecordFormat(key, computing.page_form.image_bytes)
    with ExitStack() as stack:
        services = [TransferService.of(computing, computing.page_form)._replace(servicer=service)]
        found = [stack.enter_context(served(Front(computing), services)) for _ in range(num_peers)]
        addresses = [*more_peers, *found]
        destination = decoding.mover.images if stays_on_devices else None
        prefill = RemotePrefill(addresses, form, PAGE_SIZE, LEAST_TOKENS, lease_s, destination)
        engine = decoding.engine(prefill=prefill)
        prefill.start(engine.wake)
        engine._thread.start()
        sides = Far(engine, computing, addresses, service, form)
        sides.flush()
        try:
            yield sides
            sides.assert_all_let_go()
        finally:
            service.faults.held.set()
            # Not `stop`, which would end what other engines over the same runner need.
            with engine._changed:
                engine._stopping = True
                engine._changed.notify_all()
            engine._thread.join()
            prefill.close()


@pytest.fixture(scope="module")
def single():
    return alone()


@pytest.fixture(scope="module")
def expected(single):
    return generate(single, [REQUEST])["a"].token_ids


def test_a_prompt_comes_over_but_for_its_last_page(computing, decoding, expected):
    with far_sides(computing, decoding) as sides:
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 96
        counts = sides.decode.transfers()[0]
        assert counts.outcomes == {Outcome.COMPLETE: 1}
        assert (counts.pages, counts.bytes) == (6, 6 * sides.form.image_bytes)


def test_only_what_is_not_cached_is_moved(computing, decoding):
    with far_sides(computing, decoding) as sides:
        sides.answers([greedy("a", PROMPT[:60], 4)])
        [answer] = sides.answers([greedy("b", PROMPT, 4)])
        assert (num_cached(answer), num_sent(answer)) == (48, 48)
        assert sides.decode.transfers()[0].pages == 6


def test_whatever_is_asked_for_tokens_are_those_of_one_engine(computing, decoding, single):
    requests = mixed_requests(24)
    single_answers = generate(single, requests)
    with far_sides(computing, decoding) as sides:
        for request, answer in zip(requests, sides.answers(requests), strict=True):
            assert answer.token_ids == single_answers[request.request_id].token_ids
        assert sides.outcomes()[Outcome.COMPLETE] > 5


@pytest.mark.parametrize("fault", ["drop", "double", "reorder", "corrupt", "foreign", "die"])
@pytest.mark.parametrize("at", [0, 3])
def test_what_the_way_damages_is_computed_again(computing, decoding, expected, fault, at):
    """What came before the damage is used; there is nobody else to ask for the rest."""
    with far_sides(computing, decoding) as sides:
        sides.service.faults = Faults(fault, at, left=1)
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == (at + (fault == "double")) * PAGE_SIZE
        assert sides.outcomes().total() == 1
        kind = Outcome.FAILED if fault == "die" else Outcome.BROKEN
        assert sides.outcomes()[kind] == 1


def test_a_sender_that_never_ends_holds_nobody_up(computing, decoding, expected):
    """Of more prompts than there are threads for."""
    with far_sides(computing, decoding) as sides:
        num_prompts = MOST_TRANSFERS + 2
        sides.service.faults = Faults("stay", 10**9, left=num_prompts)
        for i in range(num_prompts):
            sides.decode.flush_cache()
            [answer] = sides.answers([greedy(f"r{i}", PROMPT, 1)])
            assert answer.token_ids == expected[:1]
        wait_until(lambda: sides.outcomes() == {Outcome.COMPLETE: num_prompts})


def test_a_server_that_drains_finishes_what_it_sends(computing, decoding, expected):
    with far_sides(computing, decoding) as sides:
        sides.service.faults = Faults("pause", 3, left=1)
        answer = Answer()
        sides.decode.submit(REQUEST, answer)
        wait_until(lambda: not sides.service.calls.idle.is_set())
        assert sides.service.faults.held.wait(TIMEOUT_S)
        assert not sides.service.calls.idle.is_set()
        assert sides.decode.wait_idle(TIMEOUT_S)
        assert num_sent(answer) == 96
        wait_until(sides.service.calls.idle.is_set)


def test_an_id_may_be_as_long_as_an_id_may_be(computing, decoding, expected):
    with far_sides(computing, decoding) as sides:
        [answer] = sides.answers([greedy("x" * 256, PROMPT, 8)])
        assert answer.token_ids == expected
        assert num_sent(answer) == 96


def test_another_engine_sends_the_rest_of_what_one_began(computing, decoding, expected):
    with far_sides(computing, decoding, num_peers=2) as sides:
        sides.service.faults = Faults("corrupt", 2, left=1)
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 96
        assert sides.outcomes() == {Outcome.BROKEN: 1, Outcome.COMPLETE: 1}
        assert sides.decode.transfers()[0].pages == 6


def test_an_engine_that_is_not_there_is_asked_a_few_times_and_then_left_alone(
    computing, decoding, expected
):
    with far_sides(computing, decoding, num_peers=0, more_peers=[NOBODY]) as sides:
        for i in range(5):
            sides.decode.flush_cache()
            [answer] = sides.answers([greedy(f"r{i}", PROMPT, 8)])
            assert answer.token_ids == expected
        assert sides.outcomes() == {Outcome.FAILED: 3, Outcome.NOBODY: 2}


def test_where_one_is_not_there_the_other_is_asked(computing, decoding, expected):
    with far_sides(computing, decoding, more_peers=[NOBODY]) as sides:
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 96
        assert sides.outcomes() == {Outcome.FAILED: 1, Outcome.COMPLETE: 1}


def test_an_engine_of_another_model_is_refused_and_said(computing, decoding, expected, caplog):
    with far_sides(computing, decoding, key=b"of another model") as sides:
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 0
        assert sides.outcomes() == {Outcome.FAILED: 1}
    assert "serve one model with one dtype" in caplog.text


def test_where_nothing_comes_for_a_lease_the_prompt_is_computed(computing, decoding, expected):
    with far_sides(computing, decoding, lease_s=0.3) as sides:
        sides.service.faults = Faults("hang", 2, left=1)
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 2 * PAGE_SIZE
        sides.service.faults.held.set()
        wait_until(lambda: sides.outcomes() == {Outcome.LATE: 1})


def test_requests_that_end_at_any_moment_leave_nothing(computing, decoding, single):
    rng = random.Random(1)
    requests = mixed_requests(60, seed=1)
    single_answers = generate(single, requests)
    with far_sides(computing, decoding) as sides:
        answers = [Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            sides.decode.submit(request, answer)
            if rng.random() < 0.3:
                sides.decode.abort(rng.choice(requests).request_id)
            time.sleep(0.002)
        assert sides.decode.wait_idle(TIMEOUT_S)
        for request, answer in zip(requests, answers, strict=True):
            tokens = single_answers[request.request_id].token_ids
            if answer.finish_reason is FinishReason.CANCELLED:
                tokens = tokens[: len(answer.token_ids)]
            assert answer.token_ids == tokens


def test_pages_that_stay_on_devices_come_without_a_byte_over_grpc(computing, decoding, expected):
    with far_sides(computing, decoding, stays_on_devices=True) as sides:
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 96
        counts = sides.decode.transfers()[0]
        assert counts.outcomes == {Outcome.COMPLETE: 1}
        assert (counts.pages, counts.bytes) == (6, 0)


def test_a_sender_that_offers_nothing_sends_records(computing, decoding, expected):
    with far_sides(computing, decoding, stays_on_devices=True, offers=False) as sides:
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert sides.decode.transfers()[0].bytes == 6 * sides.form.image_bytes


@pytest.mark.parametrize("fault", ["checksum", "place", "places", "number"])
def test_an_offer_that_is_wrong_is_the_last_of_its_sender(
    computing, decoding, expected, fault, caplog
):
    """What it would have brought is computed; the next prompt comes over gRPC."""
    with far_sides(computing, decoding, stays_on_devices=True) as sides:
        sides.service.faults = Faults(fault, 2, left=1)
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 2 * PAGE_SIZE
        assert sides.outcomes() == {Outcome.BROKEN: 1}
        sides.flush()
        [answer] = sides.answers([REQUEST])
        assert num_sent(answer) == 96
        assert sides.decode.transfers()[0].bytes == 6 * sides.form.image_bytes
    assert "come over gRPC from now on" in caplog.text


def test_arrays_that_never_come_are_waited_for_no_longer_than_a_lease(
    computing, decoding, expected
):
    with far_sides(computing, decoding, stays_on_devices=True, lease_s=0.5) as sides:
        sides.service.faults = Faults("id", 0, left=1)
        [answer] = sides.answers([REQUEST])
        assert answer.token_ids == expected
        assert num_sent(answer) == 0


@contextmanager
def stub_of(sides):
    with grpc.insecure_channel(sides.addresses[0]) as channel:
        yield pb_grpc.TransferStub(channel)


def opening(sides, **changes):
    asked = {
        "token_ids": PROMPT,
        "first_page": 0,
        "fingerprint": sides.form.fingerprint,
        "lease_s": 5.0,
    }
    return pb.PrefillMessage(request=pb.PrefillRequest(**asked | changes))


def test_a_receiver_that_takes_nothing_is_let_go_after_its_lease(computing, decoding, monkeypatch):
    narrow = partial(Sending, window=2)
    monkeypatch.setattr("serve.api.transfer_service.Sending", narrow)
    with far_sides(computing, decoding) as sides, stub_of(sides) as stub:
        stay = threading.Event()

        def messages():
            yield opening(sides, lease_s=0.2)
            stay.wait(TIMEOUT_S)

        call = stub.Prefill(messages())
        with pytest.raises(grpc.RpcError) as refused:
            for _ in call:
                pass
        stay.set()
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.2 s" in str(refused.value.details())


def test_a_receiver_that_reads_nothing_is_let_go_after_its_lease(computing, decoding, monkeypatch):
    """gRPC takes no more for it than fits a window, and waits."""
    with far_sides(computing, decoding) as sides:
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
        with grpc.insecure_channel(sides.addresses[0], options=options) as channel:
            stay = threading.Event()

            def messages():
                yield opening(sides, lease_s=0.3)
                stay.wait(TIMEOUT_S)

            call = pb_grpc.TransferStub(channel).Prefill(messages())
            wait_until(lambda: sides.prefill.load().num_finished > 0)
            wait_until(lambda: sides.prefill.load().pages_used == 0)
            assert call.is_active(), "it was let go though the receiver is still there"
            stay.set()
            call.cancel()


def test_a_receiver_that_vanishes_is_let_go(computing, decoding, monkeypatch):
    """`far_sides` looks whether any page is still owned."""
    monkeypatch.setattr("serve.api.transfer_service.Sending", partial(Sending, window=2))
    with far_sides(computing, decoding) as sides, stub_of(sides) as stub:
        for num_messages in (0, 1):
            stay = threading.Event()

            def messages(stay=stay):
                yield opening(sides)
                stay.wait(TIMEOUT_S)

            call = stub.Prefill(messages())
            for _ in range(num_messages):
                assert next(call).chunks
            call.cancel()
            stay.set()
        wait_until(sides.service.calls.idle.is_set)
        wait_until(lambda: sides.prefill.load().pages_used == 0)
        assert sides.prefill.load().num_running == 0


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"fingerprint": b""}, "FAILED_PRECONDITION", "serve one model"),
        ({"first_page": 6}, "INVALID_ARGUMENT", "pages from 6 on"),
        ({"token_ids": []}, "INVALID_ARGUMENT", "0 tokens has 0"),
        ({"token_ids": [1] * 16}, "INVALID_ARGUMENT", "16 tokens has 0"),
        ({"token_ids": [1000] * 40}, "INVALID_ARGUMENT", "outside the vocabulary"),
        ({"token_ids": [1] * 4000}, "INVALID_ARGUMENT", "context of 128"),
        ({"lease_s": 0}, "INVALID_ARGUMENT", "lease_s is 0"),
        ({"lease_s": float("nan")}, "INVALID_ARGUMENT", "lease_s is nan"),
        ({"lease_s": 1e9}, "INVALID_ARGUMENT", "at most 600"),
        ({"tenant": "x" * 300}, "INVALID_ARGUMENT", "tenant has 300"),
    ],
)
def test_what_cannot_be_sent_is_refused(computing, decoding, changes, code, message):
    with far_sides(computing, decoding) as sides, stub_of(sides) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Prefill(iter([opening(sides, **changes)])))
        assert refused.value.code().name == code
        assert message in str(refused.value.details())


def test_a_stream_without_a_request_is_refused(computing, decoding):
    with far_sides(computing, decoding) as sides, stub_of(sides) as stub:
        for messages in ([], [pb.PrefillMessage(taken=pb.PagesTaken(num_pages=1))]):
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Prefill(iter(messages)))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "send the prompt first" in str(refused.value.details())
