"""Retention hints: what a request asks to be kept outlives whatever needs room, for as long as it
said after the last use."""

from dataclasses import replace

import pytest

from cache.contexts.context import ContextLimits
from cache.contexts.registry import Contexts
from cache.pins import PinsExceedBudget
from cache.retention import Retention
from cache.tiers.host import HostTier
from cache.tiers.stack import TierStack
from serve.api.http_server import EngineCollector
from serve.client import Client
from serve.engine import Engine
from serve.errors import InvalidRequest
from serve.tier_traffic import TierTraffic
from tests.serve.fake_engine import TIMEOUT_S, FakeEngine, served, text_front
from tests.serve.harness import (
    DENSE,
    LIMITS,
    PAGE_SIZE,
    Parts,
    compile_few,
    generate,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

(PROMPT,) = random_prompts(DENSE, [100])
ROOM = 63 - LIMITS.max_context // PAGE_SIZE
"""Pages that can be kept; half of them by hints."""
FIVE_MINUTES, HOUR = 300.0, 3600.0


@pytest.fixture(scope="module")
def parts() -> Parts:
    made = make_parts(DENSE, random_weights(DENSE))
    compile_few(made.runner)
    return made


class Server:
    """An engine moved by hand, and its clock."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.now_s, self.num_asked = engine, 0.0, 0
        engine._clock = lambda: self.now_s

    def ask(self, prompt, *keep) -> int:
        """Tokens that were found."""
        self.num_asked += 1
        request = greedy(str(self.num_asked), prompt, 2)
        kept = Retention.parse(keep, len(prompt)) if keep else None
        (answer,) = generate(self.engine, [replace(request, keep=kept)]).values()
        return answer.outputs[-1].usage.cached_tokens

    def need_room(self) -> None:
        """Requests of other prompts, twice as much as the pool."""
        for prompt in random_prompts(DENSE, [120] * 16, seed=self.num_asked):
            self.ask(prompt)

    @property
    def num_kept(self) -> int:
        return self.engine.retained().num_pages


@pytest.fixture
def server(parts):
    made = Server(parts.engine())
    yield made
    made.now_s = 1e9
    assert made.num_kept == 0
    assert made.engine.load().pages_used == 0, "nothing is left behind"


def test_kept_pages_outlive_what_needs_room_until_their_time_is_over(server):
    server.ask(PROMPT, (100, "5m"))
    assert server.num_kept == 100 // PAGE_SIZE
    server.now_s += FIVE_MINUTES - 1
    server.need_room()
    assert server.num_kept == 6
    server.now_s += 1
    server.need_room()
    assert server.num_kept == 0
    assert server.ask(PROMPT) == 0


def test_without_a_hint_nothing_outlives_what_needs_room(server):
    server.ask(PROMPT)
    server.need_room()
    assert server.ask(PROMPT) == 0


@pytest.mark.parametrize("length", [100, 50])
def test_a_use_begins_the_time_anew(server, length):
    server.ask(PROMPT, (100, "5m"))
    server.now_s += FIVE_MINUTES - 1
    assert server.ask(PROMPT[:length]) > 0
    server.now_s += FIVE_MINUTES - 1
    server.need_room()
    num_used = length // PAGE_SIZE
    assert server.num_kept == num_used, "what it did not use is over"
    assert server.ask(PROMPT) == num_used * PAGE_SIZE


def test_each_part_is_kept_for_its_own_time(server):
    server.ask(PROMPT, (40, "1h"), (100, "5m"))
    assert server.num_kept == 6
    server.now_s += FIVE_MINUTES
    server.need_room()
    assert server.ask(PROMPT) == 32
    server.now_s += HOUR - 1
    assert server.num_kept == 2
    server.now_s += 1
    assert server.num_kept == 0


def test_what_was_computed_before_is_kept_too(server):
    server.ask(PROMPT)
    server.ask(PROMPT, (100, "5m"))
    server.need_room()
    assert server.ask(PROMPT) >= 96


def test_more_than_half_the_room_is_refused_and_served_all_the_same(server):
    prompts = random_prompts(DENSE, [120] * 8)
    for prompt in prompts:
        server.ask(prompt, (120, "5m"))
    counts = server.engine.retained()
    assert counts.num_pages == ROOM // 2
    assert counts.num_refused == 8 * 7 - ROOM // 2
    server.need_room()
    assert server.ask(prompts[0]) >= 112, "those that came first are kept"


def test_contexts_that_take_all_room_leave_none_for_hints(server):
    keys = [bytes([i]) * 16 for i in range(ROOM)]
    server.engine.pin(keys)
    server.ask(PROMPT, (100, "5m"))
    assert server.engine.retained() == (0, 6)
    server.engine.unpin(keys)
    server.ask(PROMPT, (100, "5m"))
    assert server.engine.retained() == (6, 6)
    with pytest.raises(PinsExceedBudget):
        server.engine.pin(keys)


def test_a_flush_leaves_the_hint(server):
    server.ask(PROMPT, (100, "5m"))
    server.engine.flush_cache()
    assert server.ask(PROMPT) == 0
    server.need_room()
    assert server.ask(PROMPT) >= 96


def test_hints_are_refused_where_no_prefixes_are_cached(parts):
    engine = parts.engine(prefix_caching=False)
    with pytest.raises(InvalidRequest, match=r"caches no prefixes.*set cache.prefix_caching"):
        Server(engine).ask(PROMPT, (100, "5m"))


def test_with_tiers_host_memory_keeps_what_is_asked_for():
    def traffic(mover):
        image_bytes = mover.images.image_bytes
        stack = TierStack(HostTier(8 * image_bytes, image_bytes), [])
        return TierTraffic(stack, mover, lambda number: 1.0)

    parts = make_parts(DENSE, random_weights(DENSE), make_traffic=traffic)
    compile_few(parts.runner)
    engine = parts.engine()
    parts.runner.start(engine.wake)
    server = Server(engine)
    server.ask(PROMPT, (64, "5m"))
    server.need_room()
    assert engine.load().pages_used == 0
    (host,) = engine.tiers()
    assert (host.num_pinned, server.num_kept) == (4, 4)
    keys = engine._scheduler.names_of(greedy("r", PROMPT, 1)).keys
    assert all(parts.traffic.holds(key) for key in keys[:4])
    server.now_s += FIVE_MINUTES
    assert server.num_kept == 0
    assert engine.tiers()[0].num_pinned == 0
    parts.runner.close(0)


@pytest.fixture(scope="module")
def client():
    engine = FakeEngine()
    with (
        engine,
        served(text_front(engine)) as address,
        Client(address, timeout_s=TIMEOUT_S) as made,
    ):
        yield made, engine


def test_hints_reach_the_engine(client):
    made, engine = client
    made.generate_text([1] * 50, keep=[(20, "1h"), (0, "")], max_tokens=1)
    assert engine.submitted[-1].keep == Retention(((20, 3600.0), (50, 300.0)))
    made.generate_text([1] * 50, max_tokens=1)
    assert engine.submitted[-1].keep is None


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([(i, "5m") for i in range(1, 6)], "5 breakpoints; at most 4 are possible"),
        ([(20, "5m"), (10, "5m")], "at token 10 after 20; positions must ascend, from 1 to"),
        ([(20, "5m"), (20, "5m")], "at token 20 after 20"),
        ([(0, "5m"), (20, "5m")], "at token 20 after 50"),
        ([(51, "5m")], "at token 51 after 0; .* the prompt's 50 tokens"),
        ([(2**32 - 1, "5m")], "at token 4294967295"),
        ([(20, "2h")], "is '2h'; it must be one of 5m, 1h"),
        ([(-1, "5m")], "-1"),
    ],
)
def test_hints_that_cannot_be_are_refused(client, keep, message):
    with pytest.raises(InvalidRequest, match=message):
        client[0].generate_text([1] * 50, keep=keep, max_tokens=1)


def test_metrics_tell_what_is_kept():
    contexts = Contexts(ContextLimits(100), PAGE_SIZE)
    contexts.create("a", [1] * 40)
    contexts.create("b", [1] * 2)
    found = {
        sample.name: sample.value
        for metric in EngineCollector(FakeEngine(), contexts).collect()
        for sample in metric.samples
    }
    assert found["weft:retained_pages"] == 3
    assert found["weft:retained_pages_refused_total"] == 4
    assert found["weft:contexts"] == 2
    assert found["weft:contexts_tokens"] == 42
