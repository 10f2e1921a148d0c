"""`ContextCache` over gRPC, of a small engine without tiers: what a context saves, whose it is, and
that nothing of one is left behind."""

import asyncio
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any, cast

import pytest

from cache.contexts.context import ContextLimits, NoSuchContext
from cache.contexts.registry import Contexts
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from serve.api.contexts_service import ContextsService
from serve.client import AsyncClient, Client
from serve.contexts import ContextCache
from serve.engine import Engine
from serve.errors import InvalidRequest, NotFound, Overloaded, RequestError, Unavailable
from serve.front import Chat, Front
from serve.replicas import Replicas
from serve.request import GenerateRequest
from tests.serve.fake_engine import TIMEOUT_S, served
from tests.serve.harness import (
    DENSE,
    LIMITS,
    PAGE_SIZE,
    Parts,
    compile_few,
    make_parts,
    random_prompts,
    random_weights,
)
from tests.serve.test_replicas import FakeReplica

(LAW,) = random_prompts(DENSE, [50])
NUM_FULL = 3
"""Full pages of it."""
QUESTION = [7, 8, 9]
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
ROOM = 63 - LIMITS.max_context // PAGE_SIZE
"""Pages that can be kept: the pool's, but for those of the longest request."""
CHAT = [{"role": "system", "content": "BE BRIEF AND SPEAK OF NOTHING BUT THE LAW"}]
ASKED = [{"role": "user", "content": "WHO?"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0]|upper }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


class _Letters:
    """An id is a character from the blank on."""

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        return [*([1] if add_special_tokens else []), *(ord(letter) - 32 for letter in text)]


def tokenizer() -> Tokenizer:
    letters = tuple(bytes([32 + i]) for i in range(DENSE.vocab_size))
    return Tokenizer(_Letters(), letters, frozenset({1}), bos_id=1, eos_ids=(2,), leading_spaces=0)


@dataclass
class Clocks:
    now_s: float = 5000.0
    wall_s: float = 1_700_000_000.0

    def passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.wall_s += seconds


@dataclass
class Endpoint:
    client: Client
    engine: Engine
    contexts: Contexts
    cache: ContextCache
    clocks: Clocks

    def expire(self) -> None:
        asyncio.run(self.cache.expire())

    @property
    def num_kept(self) -> int:
        """Pages of the device that stay; nobody is served."""
        return self.engine.load().pages_used

    def usage(self, prompt, **options):
        *_, last = self.client.generate(prompt, **GREEDY, **options)
        return last.usage

    def answer(self, prompt, **options):
        chunks = list(self.client.generate(prompt, **GREEDY, **options))
        return [token for chunk in chunks for token in chunk.token_ids]


@contextmanager
def endpoint(parts: Parts, started: bool = True, limits=None, **changes) -> Iterator[Endpoint]:
    """A new engine behind a new server; nothing is cached."""
    clocks, engine = Clocks(), parts.engine(**changes)
    limits = limits or ContextLimits(LIMITS.max_context - 2, max_tenant_contexts=20)
    contexts = Contexts(
        limits, PAGE_SIZE, clock=lambda: clocks.now_s, wall_clock=lambda: clocks.wall_s
    )
    front = Front(engine, tokenizer(), ChatTemplate({"default": TEMPLATE}), contexts)
    cache = ContextCache(front, engine, contexts)
    if started:
        engine.start()
    try:
        with (
            served(front, [ContextsService.of(cache)]) as address,
            Client(address, timeout_s=TIMEOUT_S) as client,
        ):
            yield Endpoint(client, engine, contexts, cache, clocks)
    finally:
        for context in contexts.all():
            engine.unpin(context.keys)
        engine.stop()


@pytest.fixture(scope="module")
def parts() -> Parts:
    made = make_parts(DENSE, random_weights(DENSE))
    compile_few(made.runner)
    return made


@pytest.fixture(scope="module")
def shared(parts) -> Iterator[Endpoint]:
    """For what leaves nothing behind."""
    with endpoint(parts) as made:
        yield made


def until(happened) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.005)


# What a context saves


def test_a_request_with_a_context_pays_for_the_rest_only(parts):
    with endpoint(parts) as at:
        expected = at.answer(LAW + QUESTION)
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW, display_name="The law", ttl_s=60)
        assert (made.num_tokens, made.cached_tokens, made.display_name) == (50, 0, "The law")
        assert made.compute_s >= 0
        assert at.num_kept == NUM_FULL
        assert at.answer(QUESTION, context=made.name) == expected
        usage = at.usage(QUESTION, context=made.name)
        assert (usage.prompt_tokens, usage.cached_tokens) == (53, 52)


def test_a_context_outlives_whatever_needs_room(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW)
        for prompt in random_prompts(DENSE, [120] * 16, seed=1):
            at.usage(prompt)
        usage = at.usage(QUESTION, context=made.name)
        assert usage.cached_tokens == NUM_FULL * PAGE_SIZE
        assert at.usage(LAW + QUESTION).cached_tokens > 0, "it is an ordinary prefix, too"


def test_a_text_goes_on_without_a_second_first_token(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create("IT IS WRITTEN THAT NOBODY SHALL ")
        usage = at.usage("WAIT", context=made.name)
        assert usage.prompt_tokens == len(
            at.client.tokenize("IT IS WRITTEN THAT NOBODY SHALL WAIT")
        )
        assert usage.cached_tokens == made.num_tokens == 33


def test_a_chat_goes_on_as_if_it_had_been_sent_whole(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(CHAT)
        whole = at.client.tokenize(CHAT + ASKED)
        assert made.num_tokens == len(whole) - len("U:WHO?;A:")
        usage = at.usage(ASKED, context=made.name)
        assert (usage.prompt_tokens, usage.cached_tokens) == (len(whole), made.num_tokens)
        assert at.answer(ASKED, context=made.name) == at.answer(CHAT + ASKED)


def test_a_context_of_what_was_asked_before_computes_its_last_page_only(parts):
    with endpoint(parts) as at:
        at.usage(LAW)
        assert at.num_kept == 0
        assert at.client.contexts.create(LAW).cached_tokens == NUM_FULL * PAGE_SIZE
        assert at.num_kept == NUM_FULL


def test_a_salt_is_the_contexts_own(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW, cache_salt="s")
        assert at.usage(QUESTION, context=made.name).cached_tokens == 50
        assert at.usage(QUESTION, context=made.name, cache_salt="s").cached_tokens == 52
        assert at.usage(LAW + QUESTION).cached_tokens == 0
        with pytest.raises(InvalidRequest, match="cache_salt is not that of contexts/"):
            at.usage(QUESTION, context=made.name, cache_salt="t")


# Get, list, update, delete


def test_what_is_created_is_told_and_deleted(shared):
    contexts = shared.client.contexts
    made = [contexts.create(LAW[:20], tenant="t", display_name=str(i)) for i in range(5)]
    assert contexts.get(made[3].name, "t").display_name == "3"
    assert contexts.get(made[3].name, "t").expire_time == shared.clocks.wall_s + 3600
    listed = list(contexts.list("t", page_size=2))
    assert [one.name for one in listed] == sorted(one.name for one in made)
    assert list(contexts.list("other")) == []
    for one in made:
        contexts.delete(one.name, "t")
    assert list(contexts.list("t")) == []
    assert shared.num_kept == 0


def test_an_extension_is_appended_and_computed(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW[:20])
        longer = at.client.contexts.update(made.name, LAW[20:], ttl_s=7)
        assert (longer.num_tokens, longer.cached_tokens) == (50, 20)
        assert longer.expire_time == at.clocks.wall_s + 7
        assert at.num_kept == NUM_FULL
        assert at.usage(QUESTION, context=made.name).cached_tokens == 50
        at.client.contexts.delete(made.name)
        assert at.num_kept == 0


def test_a_chat_is_extended_by_messages(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(CHAT)
        more = [*ASKED, {"role": "assistant", "content": "NOBODY"}]
        longer = at.client.contexts.update(made.name, more)
        assert longer.num_tokens == made.num_tokens + len("U:WHO?;A:NOBODY;")
        assert at.usage(ASKED, context=made.name).cached_tokens == longer.num_tokens
        at.client.contexts.delete(made.name)
        assert at.num_kept == 0


def test_extensions_that_come_together_are_all_appended(parts):
    with endpoint(parts) as at, ThreadPoolExecutor(4) as pool:
        made = at.client.contexts.create(LAW[:10])
        parts_of_it = [[token] * 20 for token in (3, 4, 5, 6)]
        list(pool.map(lambda more: at.client.contexts.update(made.name, more), parts_of_it))
        tokens = at.contexts.get("", made.name).token_ids.tolist()
        assert sorted(tokens[10:]) == sorted(token for part in parts_of_it for token in part)
        at.client.contexts.delete(made.name)
        assert at.num_kept == 0


def test_contexts_that_come_together_are_all_kept(parts):
    with endpoint(parts) as at, ThreadPoolExecutor(8) as pool:
        prompts = random_prompts(DENSE, [40] * 8)
        made = list(pool.map(at.client.contexts.create, prompts))
        assert len({one.name for one in made}) == 8
        assert at.num_kept == 8 * 2
        assert [at.usage(QUESTION, context=one.name).cached_tokens >= 32 for one in made]


def test_the_asynchronous_client_makes_the_same_calls(shared):
    async def calls() -> None:
        async with AsyncClient(shared.client.address, TIMEOUT_S) as client:
            made = await client.contexts.create(LAW, tenant="a")
            assert (await client.contexts.get(made.name, "a")).num_tokens == 50
            longer = await client.contexts.update(made.name, [5], tenant="a")
            assert longer.num_tokens == 51
            assert [one.name async for one in client.contexts.list("a")] == [made.name]
            await client.contexts.delete(made.name, "a")

    asyncio.run(calls())
    assert shared.num_kept == 0


# When it ends


def test_an_expired_context_lets_go_of_its_pages(parts):
    with endpoint(parts) as at:
        short = at.client.contexts.create(LAW, ttl_s=10)
        at.client.contexts.create(LAW[:20], ttl_s=100)
        at.clocks.passes(10)
        with pytest.raises(NotFound):
            at.usage(QUESTION, context=short.name)
        at.expire()
        assert at.num_kept == 1
        at.clocks.passes(90)
        at.expire()
        assert at.num_kept == 0


def test_the_wall_clock_set_back_keeps_nothing_for_ever_and_loses_nothing(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW, ttl_s=100)
        at.clocks.wall_s -= 1e6
        at.clocks.passes(99)
        at.expire()
        assert at.usage(QUESTION, context=made.name).cached_tokens == 50
        at.clocks.wall_s += 2e6
        at.expire()
        assert at.num_kept == NUM_FULL
        at.clocks.passes(1)
        at.expire()
        assert at.num_kept == 0


def test_contexts_end_while_the_server_runs(parts, monkeypatch):
    monkeypatch.setattr("serve.contexts.EXPIRE_EVERY_S", 0.01)

    async def wait_for_end(at: Endpoint) -> None:
        async with at.cache.expiring():
            while at.num_kept:
                await asyncio.sleep(0.01)

    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW, ttl_s=10)
        assert at.num_kept == NUM_FULL
        at.clocks.passes(10)
        asyncio.run(asyncio.wait_for(wait_for_end(at), TIMEOUT_S))
        with pytest.raises(NotFound, match="no such context"):
            at.client.contexts.get(made.name)


def test_a_flush_loses_what_was_computed_and_not_that_it_is_to_be_kept(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW)
        assert at.client.flush_cache() == NUM_FULL + 1
        assert at.num_kept == 0
        assert at.usage(QUESTION, context=made.name).cached_tokens == 0
        assert at.num_kept == NUM_FULL
        at.client.contexts.delete(made.name)
        assert at.num_kept == 0


# What fails leaves nothing behind


def test_a_create_that_is_cancelled_leaves_nothing(parts):
    with endpoint(parts, started=False) as at:
        with Client(at.client.address, timeout_s=0.3) as hasty, pytest.raises(TimeoutError):
            hasty.contexts.create(LAW)
        until(lambda: not at.contexts.all() and at.engine.wait_idle(0) is False)
        at.engine.start()
        until(lambda: at.engine.wait_idle(0))
        assert at.num_kept == 0


def test_a_create_that_the_server_stops_in_leaves_nothing(parts):
    engine = parts.engine()
    contexts = Contexts(ContextLimits(100), PAGE_SIZE)
    front = Front(engine, contexts=contexts)
    cache = ContextCache(front, engine, contexts)
    with ThreadPoolExecutor(1) as pool:
        with served(front, [ContextsService.of(cache)]) as address:
            client = Client(address, timeout_s=TIMEOUT_S)
            creating = pool.submit(client.contexts.create, LAW)
            until(lambda: engine.load().num_waiting == 1)
        with client, pytest.raises(RequestError):
            creating.result(TIMEOUT_S)
    until(lambda: not contexts.all())
    assert engine.load().num_waiting == 0
    engine.stop()


def test_an_extension_that_is_cancelled_changes_nothing(parts):
    with endpoint(parts) as at:
        made = at.client.contexts.create(LAW[:20])
        submit, at.engine.submit = at.engine.submit, lambda request, sink: None
        with Client(at.client.address, timeout_s=0.3) as hasty, pytest.raises(TimeoutError):
            hasty.contexts.update(made.name, LAW[20:])
        at.engine.submit = submit
        assert at.client.contexts.get(made.name).num_tokens == 20
        at.client.contexts.delete(made.name)
        until(lambda: at.num_kept == 0)


@pytest.mark.parametrize("seed", range(3))
def test_no_history_of_calls_and_cancels_leaves_a_page_behind(parts, seed, monkeypatch):
    random = Random(seed)
    monkeypatch.setattr(Contexts, "_save", lambda *_: time.sleep(random.random() * 0.004))

    async def call(at: Endpoint, names: list[str]) -> None:
        kind = random.choice(["create", "create", "update", "delete", "expire"])
        with suppress(NotFound, InvalidRequest):
            if kind == "create" or not names:
                prompt = [random.randrange(3, 90)] * random.randrange(1, 90)
                made = await at.cache.create("", prompt, ttl_s=random.choice([1.0, 100.0]))
                names.append(made.context.name)
            elif kind == "update":
                await at.cache.update("", random.choice(names), [5] * random.randrange(1, 60))
            elif kind == "delete":
                await at.cache.delete("", random.choice(names))
            else:
                at.clocks.passes(0.3)
                await at.cache.expire()

    async def history(at: Endpoint) -> None:
        names: list[str] = []
        calls: list[asyncio.Task[None]] = []
        for _ in range(60):
            calls.append(asyncio.create_task(call(at, names)))
            await asyncio.sleep(random.random() * 0.008)
            if random.random() < 0.5:
                random.choice(calls[-2:]).cancel()
        await asyncio.wait(calls)
        assert not [one for one in calls if not one.cancelled() and one.exception()]
        assert at.engine.wait_idle(TIMEOUT_S)
        kept = {key for context in at.contexts.all() for key in context.keys}
        assert at.num_kept == len(kept)
        at.clocks.passes(100)
        await at.cache.expire()

    with endpoint(parts) as at:
        asyncio.run(history(at))
        assert at.contexts.all() == []
        assert at.num_kept == 0


def test_what_a_draining_server_refuses_leaves_nothing(parts):
    with endpoint(parts) as at:
        at.client.drain()
        with pytest.raises(Unavailable, match="draining"):
            at.client.contexts.create(LAW)
        assert at.contexts.all() == []
        at.engine.flush_cache()
        assert at.num_kept == 0


def test_more_than_can_be_kept_is_refused_and_nobody_starves(parts):
    with endpoint(parts) as at:
        *prompts, last = random_prompts(DENSE, [LIMITS.max_context - 2] * (ROOM // 7 + 1))
        made = [at.client.contexts.create(prompt) for prompt in prompts]
        with pytest.raises(Overloaded, match=rf"{ROOM} of its 63 can be.*raise cache.pages"):
            at.client.contexts.create(last)
        assert at.num_kept == len(made) * 7
        (longest,) = random_prompts(DENSE, [LIMITS.max_context - 6], seed=2)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda start: at.answer([start, *longest[1:]]), range(3, 11)))
        assert all(len(answer) == 6 for answer in answers)
        usages = [at.usage([5], context=one.name) for one in made]
        assert all(usage.cached_tokens >= 7 * PAGE_SIZE for usage in usages)


def test_too_many_contexts_are_refused(parts):
    limits = ContextLimits(100, max_contexts=3, max_tenant_contexts=2)
    with endpoint(parts, limits=limits) as at:
        for tenant in ("a", "a", "b"):
            at.client.contexts.create([5], tenant=tenant)
        for tenant, why in (("a", "may have 2; delete one"), ("b", "has room for 3 contexts")):
            with pytest.raises(Overloaded, match=why):
                at.client.contexts.create(LAW, tenant=tenant)
        assert at.num_kept == 0


# Bad input


NOW = Clocks().wall_s


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl_s": 0.0}, "ttl is 0.0 s; it must be above 0 and at most 604800 s"),
        ({"ttl_s": -1.0}, "ttl is -1.0 s"),
        ({"ttl_s": 1e9}, "ttl is 1000000000.0 s"),
        ({"ttl_s": math.inf}, "ttl is inf s"),
        ({"ttl_s": math.nan}, "ttl is nan s"),
        ({"expire_time": NOW - 1}, "expire_time is .* must be after now"),
        ({"expire_time": NOW + 1e9}, "expire_time is"),
        ({"expire_time": math.nan}, "expire_time is nan"),
        ({"ttl_s": 1.0, "expire_time": NOW + 1}, "both ttl .* and expire_time"),
    ],
)
def test_an_end_that_cannot_be_is_refused(shared, options, message):
    contexts = shared.client.contexts
    with pytest.raises(InvalidRequest, match=message):
        contexts.create(LAW, tenant="t", **options)
    made = contexts.create(LAW[:5], tenant="t")
    num_finished = shared.engine.load().num_finished
    with pytest.raises(InvalidRequest, match=message):
        contexts.update(made.name, LAW, tenant="t", **options)
    assert shared.engine.load().num_finished == num_finished, "nothing is computed in vain"
    assert contexts.get(made.name, "t").num_tokens == 5
    contexts.delete(made.name, "t")
    assert list(contexts.list("t")) == []
    assert shared.num_kept == 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([90], {}, "token id 90, at place 0, is outside the vocabulary"),
        ([3] * 127, {}, "would have 127 tokens; at most 126 are possible"),
        (LAW, {"display_name": "x" * 129}, "display_name has 129 characters"),
        (LAW, {"tenant": "x" * 257}, "tenant has 257 characters"),
        (LAW, {"cache_salt": "x" * 257}, "cache_salt has 257 characters"),
    ],
)
def test_a_context_that_cannot_be_is_refused(shared, prompt, options, message):
    with pytest.raises(InvalidRequest, match=message):
        shared.client.contexts.create(prompt, **options)
    assert shared.contexts.all() == []
    assert shared.num_kept == 0


def test_an_update_that_cannot_be_is_refused(shared):
    contexts = shared.client.contexts
    made = contexts.create(LAW)
    for prompt, message in (
        (None, "changes nothing; send token ids, ttl or expire_time"),
        ([], "the prompt is empty"),
        ([3] * 77, "would have 127 tokens"),
        (CHAT, "is of text or token ids, and chat messages can't go on after it"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            contexts.update(made.name, prompt)
    assert contexts.get(made.name).num_tokens == 50
    contexts.delete(made.name)
    assert shared.num_kept == 0


def test_kinds_that_do_not_mix_are_refused_with_what_to_send(shared):
    contexts = shared.client.contexts
    text, chat = contexts.create("SOME TEXT"), contexts.create(CHAT)
    with pytest.raises(InvalidRequest, match=r"is of text or token ids.*send text or token ids"):
        shared.usage(ASKED, context=text.name)
    for prompt in ("MORE", [5]):
        with pytest.raises(InvalidRequest, match=r"is of chat messages.*send chat messages"):
            shared.usage(prompt, context=chat.name)
    with pytest.raises(InvalidRequest, match=r"a context of 128 allows 127.*shorten the prompt"):
        shared.usage([5] * 118, context=text.name)
    for one in (text, chat):
        contexts.delete(one.name)


@pytest.mark.parametrize("limit", [1001, 2**32 - 1])
def test_a_listing_that_is_too_long_is_refused(shared, limit):
    with pytest.raises(InvalidRequest, match=f"a listing of {limit} contexts"):
        list(shared.client.contexts.list(page_size=limit))


def test_a_front_without_contexts_says_so(parts):
    front = Front(parts.engine())
    with pytest.raises(InvalidRequest, match="without contexts; send the whole prompt"):
        front.context("", "contexts/1")
    assert front.encode_prompt(Chat(()).messages) == ()


# Whose it is


def test_unknown_foreign_expired_and_deleted_contexts_are_told_alike(parts):
    with endpoint(parts) as at:
        contexts = at.client.contexts
        foreign = contexts.create(LAW, tenant="mine").name
        expired = contexts.create(LAW, tenant="yours", ttl_s=1).name
        deleted = contexts.create(LAW, tenant="yours").name
        contexts.delete(deleted, "yours")
        at.clocks.passes(2)
        names = ("contexts/" + "0" * 24, foreign, expired, deleted, "", "x" * 10_000)
        calls = (
            lambda name: contexts.get(name, "yours"),
            lambda name: contexts.update(name, [1], tenant="yours"),
            lambda name: contexts.update(name, tenant="yours", ttl_s=5),
            lambda name: contexts.delete(name, "yours"),
            lambda name: at.usage(QUESTION, context=name or "none", tenant="yours"),
        )
        told = set()
        for name in names:
            for call in calls:
                with pytest.raises(NotFound) as refused:
                    call(name)
                told.add(str(refused.value).replace(repr((name or "none")[:64]), "NAME"))
        assert len({text for text in told if "NAME" in text}) == 1
        assert contexts.get(foreign, "mine").num_tokens == 50


def test_a_foreign_name_takes_as_long_as_one_that_is_not():
    contexts = Contexts(ContextLimits(100), PAGE_SIZE)
    foreign = [contexts.create("mine", [1] * 40).name for _ in range(100)]
    for _ in range(100):
        contexts.create("yours", [1] * 40)
    missing = [contexts.new_name() for _ in range(100)]

    def seconds(name: str) -> float:
        started_s = time.perf_counter()
        for _ in range(20):
            with suppress(NoSuchContext):
                contexts.get("yours", name)
        return time.perf_counter() - started_s

    taken = [(seconds(one), seconds(other)) for one, other in zip(foreign, missing, strict=True)]
    one, other = (median(times) for times in zip(*taken, strict=True))
    assert 1 / 1.3 < one / other < 1.3


# Replicas


@pytest.mark.parametrize("name", ["contexts/1", "contexts/2", "contexts/3", "contexts/4"])
def test_what_is_asked_after_a_context_goes_where_it_is_kept(name):
    fakes = [FakeReplica(busy=2), FakeReplica(busy=1)]
    replicas: Any = Replicas(cast(Any, fakes))
    home = replicas.home(name)
    other = fakes[1 - fakes.index(home)]
    assert home is replicas.home(name)
    replicas.submit(GenerateRequest("r", (1,), context=name), lambda output: None)
    assert home.taken == ["r"]
    home.failure = RuntimeError("gone")
    replicas.submit(GenerateRequest("s", (1,), context=name), lambda output: None)
    assert other.taken == ["s"]


def test_contexts_are_spread_over_replicas():
    fakes = [FakeReplica(), FakeReplica()]
    replicas: Any = Replicas(cast(Any, fakes))
    names = [Contexts(ContextLimits(9), PAGE_SIZE).new_name() for _ in range(100)]
    assert 25 < sum(replicas.home(name) is fakes[0] for name in names) < 75
