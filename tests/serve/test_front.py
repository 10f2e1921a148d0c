import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import bridge
from serve.bridge import Bridge, Mailbox
from serve.errors import InvalidRequest, Overloaded, Unavailable
from serve.front import Front
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams, Timings, Usage
from serve.text_stream import TextStream
from tests.serve.fake_engine import FakeEngine, FakeInfo, byte_tokenizer, text_front

TIMINGS = Timings(1.0, 2.0, 3.0)


def outputs(text: str, cuts: Sequence[int] = ()) -> list[Output]:
    """`text` as an engine's outputs, a token per byte, cut at these places."""
    ids = tuple(text.encode())
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    parts = [ids[start:end] for start, end in itertools.pairwise(places)]
    middle = [Output("r", part) for part in parts]
    usage = Usage(2, len(ids), cached_tokens=1)
    return [*middle, Output("r", (), (), (), FinishReason.LENGTH, usage, TIMINGS)]


def stream(**sampling: object) -> TextStream:
    params = SamplingParams(**sampling)  # pyright: ignore[reportArgumentType]
    return TextStream(GenerateRequest("r", (104, 105), params), byte_tokenizer())


def read(reader: TextStream, given: list[Output]):
    deltas = [delta for delta in map(reader.push, given) if delta is not None]
    return "".join(delta.text for delta in deltas), deltas


cuts = st.lists(st.integers(0, 40), max_size=6)


@given(st.text(max_size=12), cuts)
def test_deltas_joined_are_the_text_however_tokens_come(text: str, cuts: list[int]):
    text = text.replace("\0", "")
    joined, deltas = read(stream(), outputs(text, cuts))
    assert joined == text
    assert b"".join(bytes(delta.token_ids) for delta in deltas) == text.encode()
    assert not any("\ufffd" in delta.text for delta in deltas) or "\ufffd" in text


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3)), cuts)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]):
    joined, deltas = read(stream(stop=tuple(stops)), outputs(text, cuts))
    found = [text.find(stop) for stop in stops if stop in text]
    assert joined == (text[: min(found)] if found else text)
    assert deltas[-1].finish_reason is (FinishReason.STOP if found else FinishReason.LENGTH)


def test_usage_counts_tokens_up_to_the_stop_string():
    reader = stream(stop=("cd",))
    joined, deltas = read(reader, outputs("abcdef", [3]))
    assert joined == "ab"
    assert [delta.token_ids for delta in deltas] == [(97, 98, 99), (100,), ()]
    assert deltas[-1].usage == Usage(2, 4, cached_tokens=1)
    assert deltas[-1].timings == TIMINGS
    assert reader.stopped


def test_a_stop_string_is_not_looked_for_before_min_tokens():
    joined, deltas = read(stream(stop=("a",), min_tokens=3), outputs("ababab"))
    assert joined == "abab"
    assert deltas[-1].usage == Usage(2, 5, cached_tokens=1)


def test_what_might_have_begun_a_stop_string_is_told_at_the_end():
    assert read(stream(stop=("abcd",)), outputs("xabc"))[0] == "xabc"


def test_without_a_tokenizer_there_are_ids_and_no_text():
    reader = TextStream(GenerateRequest("r", (1,)), None)
    joined, deltas = read(reader, outputs("ab"))
    assert joined == ""
    assert deltas[0].token_ids == (97, 98)


def test_logprobs_end_with_the_tokens():
    with FakeEngine(burst=10) as engine:
        front = text_front(engine)
        request = front.prepare("hi", SamplingParams(max_tokens=10, stop=("b",), logprobs=1))
        deltas = [delta for _, delta in front.generate_all([request])]
    assert [p.token_id for p in deltas[0].logprobs] == [97, 98]
    assert deltas[0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([1, 256], {}, "prompt token id 256, at place 1, is outside the vocabulary"),
        ([-1], {}, "ids go from 0 to 255"),
        ([1] * 8, {}, "has 8 tokens; a context of 8 allows 7"),
        ("12345678", {}, "has 9 tokens"),
        ([1], {"request_id": "x" * 257}, "request_id has 257 characters; at most 256"),
        ([1], {"sampling": SamplingParams(stop_token_ids=(256,))}, "stop token id 256"),
        ("\ud800", {}, "half of a surrogate pair"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(prompt, options, message):
    front = text_front(FakeEngine(info=FakeInfo(max_context=8)))
    with pytest.raises(InvalidRequest, match=message):
        front.prepare(prompt, **options)


def test_the_longest_prompt_leaves_one_token_of_answer():
    with FakeEngine(info=FakeInfo(max_context=8)) as engine:
        front = Front(engine)
        ((_, delta),) = front.generate_all([front.prepare([1] * 7)])
    assert delta.token_ids == (97,)


def test_text_is_refused_without_a_tokenizer():
    front = Front(FakeEngine())
    with pytest.raises(InvalidRequest, match="has no tokenizer for a prompt of text; use token id"):
        front.prepare("hi")
    with pytest.raises(InvalidRequest, match="stop strings; use stop_token_ids"):
        front.prepare([1], SamplingParams(stop=("a",)))
    with pytest.raises(InvalidRequest, match="has no tokenizer"):
        front.decode([1])


def test_chat_is_refused_without_a_template_or_messages():
    with pytest.raises(InvalidRequest, match="has no chat template"):
        Front(FakeEngine(), byte_tokenizer()).encode_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(InvalidRequest, match="no messages"):
        text_front(FakeEngine()).encode_chat([])


def test_each_request_without_an_id_gets_its_own():
    front = text_front(FakeEngine())
    assert front.prepare([1]).request_id != front.prepare([1]).request_id


def test_generate_all_serves_more_than_the_queue_holds():
    with FakeEngine(max_queue=2, info=FakeInfo(max_batch=2)) as engine:
        front = text_front(engine)
        requests = [front.prepare([1], SamplingParams(max_tokens=n + 1)) for n in range(20)]
        texts = [""] * len(requests)
        for place, delta in front.generate_all(requests):
            texts[place] += delta.text
    assert texts == ["abcdefghijklmnopqrst"[: n + 1] for n in range(20)]


def test_generate_all_aborts_at_a_stop_string():
    with FakeEngine() as engine:
        front = text_front(engine)
        request = front.prepare([1], SamplingParams(stop=("de",)))
        deltas = [delta for _, delta in front.generate_all([request])]
        assert engine.aborted == [request.request_id]
    assert "".join(delta.text for delta in deltas) == "abc"
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_leaving_generate_all_aborts_what_runs():
    with FakeEngine() as engine:
        front = text_front(engine)
        deltas = front.generate_all([front.prepare([1]), front.prepare([1])])
        next(deltas)
        deltas.close()
        engine.wait_empty()
        assert len(engine.aborted) == 2


def test_generate_all_tells_an_engine_that_refuses_everything():
    with FakeEngine() as engine:
        engine.drain()
        front = text_front(engine)
        with pytest.raises(Unavailable):
            list(front.generate_all([front.prepare([1])]))


def test_what_came_together_is_one_delta():
    async def main():
        with FakeEngine(stepped=True) as engine:
            front = text_front(engine)
            async with asyncio.timeout(20):
                deltas = front.generate(front.prepare([1], SamplingParams(max_tokens=6)))
                first = asyncio.ensure_future(anext(deltas))
                await asyncio.sleep(0)  # The request is in the engine.
                engine.step(5)
                assert (await first).text == "abcde"
                engine.step(1)
                assert [delta.text async for delta in deltas] == ["f"]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_generate_aborts_the_request(how: str):
    async def main():
        with FakeEngine(stepped=True) as engine:
            front = text_front(engine)
            deltas = front.generate(front.prepare([1], request_id="left"))
            waiting = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            if how == "close":
                engine.step()
                await waiting
                await deltas.aclose()
            else:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            assert engine.aborted == ["left"]
            engine.wait_empty()

    asyncio.run(main())


def test_an_ended_request_is_not_aborted():
    async def main():
        with FakeEngine() as engine:
            front = text_front(engine)
            deltas = front.generate(front.prepare([1], SamplingParams(max_tokens=1)))
            async for _ in deltas:
                break
            await deltas.aclose()
            assert engine.aborted == []

    asyncio.run(main())


def test_one_wake_up_carries_a_step_of_all_streams():
    class CountingLoop(asyncio.SelectorEventLoop):
        num_wakes = 0

        def call_soon_threadsafe(self, *args, **options):
            self.num_wakes += 1
            return super().call_soon_threadsafe(*args, **options)

    async def main():
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        here = Bridge(loop)
        mailboxes = [Mailbox(here, lambda: None) for _ in range(64)]
        for mailbox in mailboxes:
            mailbox.put(Output("r", (1,)))
        assert [(await mailbox.take()).token_ids for mailbox in mailboxes] == [(1,)] * 64
        assert loop.num_wakes == 1

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(main())


def test_no_output_is_lost_between_threads():
    async def main():
        here = Bridge(asyncio.get_running_loop())
        mailboxes = [Mailbox(here, lambda: None) for _ in range(4)]

        def put_all():
            for n in range(5_000):
                mailboxes[n % 4].put(Output("r", (n,)))

        async def take(mailbox: Mailbox) -> list[int]:
            ids: list[int] = []
            while len(ids) < 1_250:
                ids += (await mailbox.take()).token_ids
            return ids

        async with asyncio.timeout(20):
            *taken, _ = await asyncio.gather(*map(take, mailboxes), asyncio.to_thread(put_all))
        assert taken == [list(range(n, 5_000, 4)) for n in range(4)]

    asyncio.run(main())


def test_a_reader_too_far_behind_is_dropped_and_the_request_aborted(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(bridge, "MAX_BEHIND", 10)

    async def main():
        with FakeEngine(stepped=True) as engine:
            front = text_front(engine)
            deltas = front.generate(front.prepare([1], SamplingParams(logprobs=4)))
            first = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            engine.step(2)  # With four alternatives each, ten in all.
            assert (await first).text == "ab"
            engine.step(3)
            await asyncio.sleep(0)
            assert len(engine.aborted) == 1
            engine.wait_empty()
            with pytest.raises(Overloaded, match="behind the engine; read the stream faster"):
                await anext(deltas)

    asyncio.run(main())


def test_an_engine_outlives_the_loop_of_its_readers():
    with FakeEngine(stepped=True) as engine:
        loop = asyncio.new_event_loop()
        mailbox = Mailbox(Bridge(loop), lambda: None)
        loop.close()
        engine.submit(GenerateRequest("r", (1,), SamplingParams(max_tokens=2)), mailbox.put)
        engine.step(2)
        assert mailbox.ended
