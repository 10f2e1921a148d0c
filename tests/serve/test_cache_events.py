"""Cache events from engine to client: a view fed by the stream knows what the server holds."""

import asyncio
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from cache.events import DEVICE, Change, EventLog, OnChange
from cache.keys import Key, PageNames, root_key
from cache.tiers.host import HostTier
from cache.tiers.stack import TierStack
from serve.api.control_service import MOST_EVENTS
from serve.build import build_engine
from serve.client import AsyncClient, CacheChange, CacheEvent, CacheEvents, CacheView, Client
from serve.engine import Engine
from serve.errors import InvalidRequest, Overloaded, Unavailable
from serve.front import Front
from serve.page_mover import PageMover
from serve.pb import inference_pb2 as pb
from serve.pb import inference_pb2_grpc as pb_grpc
from serve.replicas import Replicas
from serve.tier_traffic import TierTraffic
from sharding.mesh import MeshShape
from tests.cache.tiers.fake_store import key, keys, until
from tests.serve.fake_engine import TIMEOUT_S, FakeEngine, served, text_front
from tests.serve.harness import (
    DENSE,
    PAGE_SIZE,
    Answer,
    Parts,
    compile_few,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)
from tests.serve.test_build import MODEL, configure
from tools.random_checkpoint import write_random_checkpoint

WEIGHTS = random_weights(DENSE)
COMPILING_S = 300.0
"""For what is compiled when it is needed first, on a busy machine."""


class Held:
    """A fake engine's pages, of which a test says what comes and goes."""

    def __init__(self, engine: FakeEngine, epoch: str = "now", num_kept: int = 10_000) -> None:
        engine.cache_events = EventLog(epoch, num_kept)
        engine.cache_events.add(0, DEVICE, self._follow, page_size=16)
        self._first: list[Key] = []
        self._on_change: OnChange | None = None

    def _follow(self, on_change: OnChange) -> None:
        self._on_change = on_change
        on_change(Change.STORED, self._first, [root_key()] * len(self._first))

    def store(self, pages: Sequence[Key]) -> None:
        if self._on_change is None:
            self._first += pages
            return
        for one in pages:
            self._on_change(Change.STORED, [one])

    def clear(self) -> None:
        assert self._on_change is not None
        self._on_change(Change.CLEARED)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def held(engine: FakeEngine) -> Held:
    return Held(engine)


@contextmanager
def client_of(engine: FakeEngine) -> Iterator[Client]:
    with (
        engine,
        served(text_front(engine)) as address,
        Client(address, timeout_s=TIMEOUT_S) as client,
    ):
        yield client


def follow(view: CacheView, messages: Generator[CacheEvents], log: EventLog) -> list[CacheEvent]:
    """Applies what comes until the view is of now; returns the events."""
    now = log.subscribe().take(0)
    assert now is not None
    events: list[CacheEvent] = []
    while not view.is_complete or view.sequence_number < now.sequence_number:
        message = next(messages)
        view.apply(message)
        events += message.events
    return events


# The stream


def test_snapshot_comes_first_and_then_each_change(engine: FakeEngine, held: Held):
    held.store([key(1)])
    with client_of(engine) as client:
        messages = client.cache_events()
        stored = CacheEvent(CacheChange.STORED, DEVICE, 0, key(1), root_key(), 16)
        assert next(messages) == CacheEvents("now", 1, True, True, (stored,))
        held.clear()
        cleared = CacheEvent(CacheChange.CLEARED, DEVICE, 0, b"", b"", 0)
        assert next(messages) == CacheEvents("now", 2, False, False, (cleared,))


def test_cache_that_holds_nothing_says_so_at_once(engine: FakeEngine):
    with client_of(engine) as client:
        assert next(client.cache_events()) == CacheEvents("fake", 0, True, True, ())


def test_long_snapshot_comes_in_several_messages(engine: FakeEngine, held: Held):
    held.store(keys(MOST_EVENTS * 2 + 1))
    with client_of(engine) as client:
        view, messages = CacheView(), client.cache_events()
        sizes: list[int] = []
        while not view.is_complete:
            message = next(messages)
            sizes.append(len(message.events))
            view.apply(message)
        assert sizes == [MOST_EVENTS, MOST_EVENTS, 1]
        assert view.keys(0, DEVICE) == set(keys(MOST_EVENTS * 2 + 1))


def test_events_that_come_together_travel_together(engine: FakeEngine, held: Held):
    with client_of(engine) as client:
        view, messages = CacheView(), client.cache_events()
        view.apply(next(messages))
        num_messages = 0
        held.store(keys(2_000))
        while view.sequence_number < 2_000:
            view.apply(next(messages))
            num_messages += 1
        assert num_messages < 100
        assert view.keys(0, DEVICE) == set(keys(2_000))


def test_who_comes_back_in_time_gets_no_snapshot(engine: FakeEngine, held: Held):
    with client_of(engine) as client:
        view, messages = CacheView(), client.cache_events()
        view.apply(next(messages))
        messages.close()
        held.store(keys(3))
        message = next(client.cache_events(view.epoch, view.sequence_number))
        assert (message.is_snapshot, message.sequence_number, len(message.events)) == (False, 3, 3)
        view.apply(message)
        assert view.keys(0, DEVICE) == set(keys(3))


def test_who_comes_back_too_late_gets_a_snapshot(engine: FakeEngine):
    held = Held(engine, num_kept=5)
    with client_of(engine) as client:
        view, messages = CacheView(), client.cache_events()
        view.apply(next(messages))
        messages.close()
        held.store(keys(30))
        follow(view, client.cache_events(view.epoch, view.sequence_number), engine.cache_events)
        assert view.keys(0, DEVICE) == set(keys(30))


def test_view_of_a_server_that_was_restarted_forgets_what_the_first_one_held():
    view = CacheView()
    for epoch, number in (("first", 1), ("second", 2)):
        engine = FakeEngine()
        Held(engine, epoch).store([key(number)])
        with client_of(engine) as client:
            messages = client.cache_events(view.epoch, view.sequence_number)
            message = next(messages)
            assert (message.epoch, message.is_snapshot) == (epoch, True)
            view.apply(message)
        assert view.keys(0, DEVICE) == {key(number)}


def test_reader_too_slow_is_told_to_subscribe_again(engine: FakeEngine):
    held = Held(engine, num_kept=10)
    with client_of(engine) as client:
        messages = client.cache_events()
        next(messages)
        held.store(keys(50_000))  # far faster than anybody could read
        with pytest.raises(Overloaded, match="are kept; subscribe again"):
            list(messages)
        view = CacheView()
        follow(view, client.cache_events(), engine.cache_events)
        assert view.keys(0, DEVICE) == set(keys(50_000))


def test_status_of_a_reader_too_slow_is_resource_exhausted(engine: FakeEngine):
    held = Held(engine, num_kept=10)
    with engine, served(text_front(engine)) as address, grpc.insecure_channel(address) as channel:
        stub = pb_grpc.ControlStub(channel)
        call = stub.SubscribeCacheEvents(pb.SubscribeCacheEventsRequest(), timeout=TIMEOUT_S)
        next(call)
        held.store(keys(50_000))
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_one_who_leaves_is_not_woken_any_more(engine: FakeEngine, held: Held):
    with client_of(engine) as client:
        messages = client.cache_events()
        next(messages)
        until(lambda: engine.cache_events._waiting)
        [woken] = engine.cache_events._waiting
        messages.close()
        until(lambda: not engine.cache_events._waiting)
        held.store([key(1)])
        assert woken not in engine.cache_events._waiting


def test_server_that_stops_is_unavailable_to_those_who_follow(engine: FakeEngine):
    with engine, served(text_front(engine)) as address:
        client = Client(address, timeout_s=TIMEOUT_S)
        messages = client.cache_events()
        next(messages)
    with client, pytest.raises(Unavailable):
        next(messages)


def test_one_stream_more_than_there_may_be_is_refused(engine: FakeEngine, monkeypatch):
    monkeypatch.setattr("serve.api.control_service.MOST_FOLLOWERS", 1)
    with client_of(engine) as client:
        first = client.cache_events()
        next(first)
        with pytest.raises(Overloaded, match="close one, or share one"):
            next(client.cache_events())
        first.close()

        def is_room() -> bool:
            try:
                next(client.cache_events())
            except Overloaded:
                return False
            return True

        until(is_room)


def test_number_that_has_no_place_on_the_wire_is_refused(engine: FakeEngine):
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="-1"):
        client.cache_events("now", -1)


def test_async_client_follows(engine: FakeEngine, held: Held):
    async def main(address: str) -> None:
        view = CacheView()
        async with AsyncClient(address, timeout_s=TIMEOUT_S) as client:
            messages = client.cache_events()
            view.apply(await anext(messages))
            held.store(keys(3))
            while view.sequence_number < 3:
                view.apply(await anext(messages))
            await messages.aclose()
        assert view.keys(0, DEVICE) == set(keys(3))

    with engine, served(text_front(engine)) as address:
        asyncio.run(main(address))


# The view


def snapshot(number: int, *events: CacheEvent, epoch: str = "now", end: bool = True) -> CacheEvents:
    return CacheEvents(epoch, number, True, end, events)


def changes(number: int, *events: CacheEvent, epoch: str = "now") -> CacheEvents:
    return CacheEvents(epoch, number, False, False, events)


def event(
    number: int, change: CacheChange = CacheChange.STORED, tier: str = DEVICE, replica: int = 0
) -> CacheEvent:
    return CacheEvent(change, tier, replica, key(number), b"", 0)


def test_view_tells_who_has_a_page_and_where():
    view = CacheView()
    view.apply(snapshot(7, event(1), event(1, tier="host"), event(1, tier="disk", replica=1)))
    assert view.tiers_of(key(1), 0) == {DEVICE, "host"}
    assert view.tiers_of(key(1), 1) == {"disk"}
    assert view.tiers_of(key(1), 2) == view.tiers_of(key(2), 0) == set()
    assert view.holds(key(1))
    assert not view.holds(key(2))
    view.apply(changes(9, event(1, CacheChange.REMOVED), event(0, CacheChange.CLEARED, "host")))
    assert view.tiers_of(key(1), 0) == set()
    assert view.tiers_of(key(1), 1) == {"disk"}


@pytest.mark.parametrize(
    "message", [changes(9, event(2)), changes(7, event(2)), changes(8, event(2), epoch="other")]
)
def test_view_refuses_what_does_not_come_next(message: CacheEvents):
    view = CacheView()
    view.apply(snapshot(7, event(1)))
    with pytest.raises(ValueError, match="don't follow those up to 7 of 'now'; subscribe with"):
        view.apply(message)
    view.apply(changes(8, event(2)))
    assert view.keys(0, DEVICE) == {key(1), key(2)}


def test_view_refuses_events_before_a_snapshot():
    with pytest.raises(ValueError, match="don't follow"):
        CacheView().apply(changes(1, event(1)))


def test_view_of_half_a_snapshot_is_to_begin_again():
    view = CacheView()
    view.apply(snapshot(7, event(1), end=False))
    assert (view.is_complete, view.epoch, view.sequence_number) == (False, "", 0)
    with pytest.raises(ValueError, match="don't follow"):
        view.apply(changes(8, event(2)))
    view.apply(snapshot(9, event(3), end=False))
    view.apply(snapshot(9, event(4)))
    assert view.keys(0, DEVICE) == {key(3), key(4)}
    assert (view.is_complete, view.epoch, view.sequence_number) == (True, "now", 9)


def test_new_snapshot_voids_what_was_known():
    view = CacheView()
    view.apply(snapshot(7, event(1)))
    view.apply(snapshot(7, event(2)))
    assert view.keys(0, DEVICE) == {key(2)}


# Engines


@dataclass
class Server:
    """Real engines, each with few pages and less host memory, and what they were asked."""

    parts: list[Parts]
    hosts: list[HostTier]
    engine: Engine | Replicas
    names: list[PageNames] = field(default_factory=list[PageNames])

    def serve(self, prompts: Sequence[Sequence[int]]) -> None:
        """All at once, so that each replica has some."""
        answers = [Answer() for _ in prompts]
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            self.engine.submit(greedy(f"{len(self.names)}.{i}", prompt, 20), answer)
        assert self.engine.wait_idle(TIMEOUT_S)
        for prompt, answer in zip(prompts, answers, strict=True):
            self.names.append(PageNames(root_key(), PAGE_SIZE))
            self.names[-1].extend([*prompt, *answer.token_ids])

    def held(self, replica: int) -> dict[str, set[Key]]:
        """Of all pages that anybody ever asked for."""
        index, host = self.parts[replica].tables.pool.index, self.hosts[replica]
        asked = {one for names in self.names for one in names.keys}
        return {
            DEVICE: {one for one in asked if index.page_of(one) is not None},
            "host": {one for one in asked if host.holds(one)},
        }


@contextmanager
def real_server(num_replicas: int) -> Iterator[Server]:
    log = EventLog("now")
    server = Server([], [], None)  # type: ignore[arg-type]

    def make_traffic(mover: PageMover) -> TierTraffic:
        image_bytes = mover.images.image_bytes
        host = HostTier(10 * image_bytes, image_bytes)
        log.add(len(server.hosts), "host", host.follow)
        server.hosts.append(host)
        return TierTraffic(TierStack(host, []), mover, lambda number: float(PAGE_SIZE))

    engines: list[Engine] = []
    for replica in range(num_replicas):
        mesh = MeshShape(data=num_replicas)
        parts = make_parts(
            DENSE, WEIGHTS, mesh, num_pages=20, replica=replica, make_traffic=make_traffic
        )
        compile_few(parts.runner)
        server.parts.append(parts)
        info, seeds = parts.engine().info, random.Random(0)
        engines.append(
            Engine(info, parts.scheduler(), parts.runner, seeds, cache_events=log, replica=replica)
        )
    server.engine = Replicas(engines) if num_replicas > 1 else engines[0]
    server.engine.start()
    try:
        yield server
    finally:
        server.engine.stop()


def test_view_is_what_devices_and_host_memory_hold():
    num_replicas = 2
    prompts = random_prompts(DENSE, [90, 50, 33, 90, 70, 60, 80, 90])
    with (
        real_server(num_replicas) as server,
        served(Front(server.engine)) as address,
        Client(address, timeout_s=TIMEOUT_S) as client,
    ):
        log = server.engine.cache_events
        server.serve(prompts[:2])
        view, messages = CacheView(), client.cache_events()
        events: list[CacheEvent] = []

        def is_exact(replica: int) -> Callable[[], bool]:
            def compared() -> bool:
                events.extend(follow(view, messages, log))
                known = {tier: set(view.keys(replica, tier)) for tier in (DEVICE, "host")}
                return known == server.held(replica)

            return compared

        for some in (prompts[2:4], prompts[4:], prompts[:4]):
            server.serve(some)
            for replica in range(num_replicas):
                until(is_exact(replica))  # saving ends after the requests
                assert view.keys(replica, DEVICE)
                assert view.keys(replica, "host")
        gone = {(e.replica, e.tier) for e in events if e.change is CacheChange.REMOVED}
        assert {(0, DEVICE), (0, "host")} <= gone, "there was too much room"
        assert client.flush_cache() > 0
        flushed = follow(view, messages, log)
        cleared = [(e.replica, e.tier) for e in flushed if e.change is CacheChange.CLEARED]
        assert cleared == [(r, t) for r in range(num_replicas) for t in (DEVICE, "host")]
        for replica in range(num_replicas):
            assert server.held(replica) == {DEVICE: set(), "host": set()}
            assert view.keys(replica, DEVICE) == view.keys(replica, "host") == set()


def test_built_engines_have_one_log_of_all_their_tiers(tmp_path: Path):
    write_random_checkpoint(tmp_path / "tiny", MODEL, "bfloat16")
    config = configure(
        tmp_path / "tiny",
        mesh={"data": 2},
        cache={"pages": 8},
        tiers={
            "host_gib": 0.01,
            "stores": [{"name": "disk", "url": (tmp_path / "pages").as_uri(), "gib": 0.01}],
            "write_through": True,
        },
    )
    engine = build_engine(config, compile_ahead=False)
    engine.start()
    try:
        for name in ("a", "b"):
            engine.submit(greedy(name, list(range(3, 40)), 4), Answer())
        assert engine.wait_idle(COMPILING_S)
        names = PageNames(root_key(), 16)
        names.extend(range(3, 35))

        def has_all() -> bool:
            batch = engine.cache_events.subscribe().take(100)
            assert batch is not None
            held = {(e.replica, e.tier, e.key) for e in batch.events}
            return held >= {
                (replica, tier, one)
                for replica in range(2)
                for tier in (DEVICE, "host", "disk")
                for one in names.keys
            }

        until(has_all)  # stores write in the background
    finally:
        engine.stop()
