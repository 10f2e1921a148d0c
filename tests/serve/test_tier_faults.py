"""Tiers that fail: tokens are those of a server without, nothing leaks, and all is counted."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cache.tiers.host import HostTier
from cache.tiers.stack import TierStack
from cache.tiers.worth import Worth
from serve.api.http_server import EngineCollector
from serve.build import build_engine
from serve.client import Client
from serve.config import ConfigError, make_config
from serve.engine import Engine
from serve.fit import Served, fit
from serve.front import Front
from serve.page_images import BATCHES, Reading, _batches, _padded
from serve.plan import StepPlan
from serve.profile import Step
from serve.runner import Runner
from serve.tier_traffic import MOST_SAVED, MOST_UNDER_WAY, TierTraffic
from sharding.mesh import MeshShape
from tests.cache.tiers.fake_store import DISK_FULL, FakeStore, until
from tests.serve.fake_engine import FakeEngine, served
from tests.serve.harness import DENSE, Answer, greedy, make_parts, random_weights
from tests.serve.test_build import MODEL, configure
from tools.random_checkpoint import write_random_checkpoint

TIMEOUT_S = 60
NUM_TOKENS = 4
PROMPTS = [[3 + (i * j + i * i) % 90 for i in range(50)] for j in (1, 7, 11, 13, 17)]
"""Of three full pages each: with room for two of them on the device, each round is one of tiers."""
PAGE_BYTES = 2 * 2 * 16 * 2 * 8 * 4
HOST_PAGES = 4
SCHEDULE = {"max_batch": 2, "token_budget": 32, "chunk": 16, "max_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, MODEL, "bfloat16")
    return directory


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    """Computing takes longer than any tier that answers, and what failed is soon tried again."""
    monkeypatch.setattr(Worth, "recompute_s", lambda self, costs: [cost * 0.02 for cost in costs])
    monkeypatch.setattr(Worth, "decide", lambda self, num_pages, tier, recompute_s: True)
    monkeypatch.setattr("cache.tiers.breaker.FIRST_OFF_S", 0.01)
    monkeypatch.setattr("cache.tiers.breaker.LONGEST_OFF_S", 0.02)
    monkeypatch.setattr("cache.tiers.writer.RETRY_S", 0.01)
    monkeypatch.setattr("serve.engine.TIERS_GRACE_S", 2.0)


class Server:
    """An engine that runs, and what it must have told in the end."""

    def __init__(self, checkpoint: Path, expected: list[list[int]] | None, **tiers) -> None:
        config = configure(
            checkpoint,
            model={"dtype": "float32"},
            schedule=SCHEDULE,
            cache={"pages": 8},
            tiers=tiers,
        )
        self.engine = build_engine(config, compile_ahead=False)
        self._expected = expected
        self._metrics = CollectorRegistry()
        self._metrics.register(EngineCollector(self.engine))
        self.engine.start()

    def ask(self, number: int) -> Answer:
        """The answer to one of the prompts, which must be the expected one."""
        answer = Answer()
        self.engine.submit(greedy("r", PROMPTS[number], NUM_TOKENS), answer)
        assert self.engine.wait_idle(TIMEOUT_S)
        self.check(number, answer)
        return answer

    def check(self, number: int, answer: Answer) -> None:
        assert self._expected is None or answer.token_ids == self._expected[number]
        assert self.engine.load().pages_used == 0
        for tier in self.engine.tiers():
            assert tier.num_pages * tier.page_bytes <= tier.budget_bytes

    def rounds(self, num: int = 2) -> None:
        for _ in range(num):
            for number in range(len(PROMPTS)):
                self.ask(number)

    def metric(self, name: str, **labels: str) -> float:
        labels = {"model_name": "tiny", "tier": "disk"} | labels
        return self._metrics.get_sample_value(f"weft:kv_tier_{name}", labels) or 0.0

    def disk(self):
        return self.engine.tiers()[1]

    def fetched(self, number: int) -> int:
        """Tokens of a prompt that came from the disk."""
        usage = self.ask(number).outputs[-1].usage
        assert usage is not None
        return usage.fetched_tokens.get("disk", 0)


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    server = Server(checkpoint, None)
    answers = [server.ask(number).token_ids for number in range(len(PROMPTS))]
    server.engine.stop()
    return answers


Start = Callable[..., Server]


@pytest.fixture
def start(checkpoint, expected) -> Iterator[Start]:
    """Starts servers, and stops them in the end."""
    servers: list[Server] = []

    def begin(url: str, disk_pages: int = 1000, write_through: bool = True) -> Server:
        store = {"name": "disk", "url": url, "gib": disk_pages * (PAGE_BYTES + 100) / 2**30}
        tiers = {"host_gib": HOST_PAGES * PAGE_BYTES / 2**30, "write_through": write_through}
        servers.append(Server(checkpoint, expected, stores=[store], **tiers))
        return servers[-1]

    yield begin
    for server in servers:
        server.engine.stop()
        assert server.engine.failure is None


@pytest.fixture
def store(monkeypatch) -> FakeStore:
    """What every URL stands for."""
    fake = FakeStore()
    monkeypatch.setattr("serve.build.open_store", lambda url: fake)
    return fake


def recovers(server: Server) -> None:
    """It writes and reads again."""

    def came_up() -> bool:
        server.rounds(1)
        return not server.disk().is_off and server.fetched(0) > 0

    until(came_up, TIMEOUT_S)


@pytest.mark.parametrize(
    ("operation", "error", "reason", "loss"),
    [
        ("write", DISK_FULL, "ENOSPC", ("drops_total", "failed")),
        ("write", OSError(30, "Read-only file system"), "EROFS", ("drops_total", "failed")),
        ("read", OSError(5, "Input/output error"), "EIO", ("misses_total", "failed")),
    ],
)
def test_store_that_fails_costs_nothing_but_computing(start, store, operation, error, reason, loss):
    server = start("memory://")
    server.rounds(1)
    until(lambda: not server.disk().num_queued)
    store.errors[operation] = error
    if operation == "write":
        server.engine.flush_cache()
    server.rounds()
    until(lambda: server.metric("errors_total", reason=reason) >= 3)
    assert server.metric(loss[0], reason=loss[1]) >= 3
    store.errors.clear()
    recovers(server)


def test_store_that_cannot_be_listed_is_neither_read_nor_written_until_it_can(start, store):
    store.errors["list"] = PermissionError(13, "denied")
    server = start("memory://")
    server.rounds()
    until(lambda: server.metric("errors_total", reason="EACCES") >= 3)
    assert store.records() == {}
    store.errors.clear()
    recovers(server)


def test_disk_that_deletes_nothing_stays_within_its_budget(start, store):
    server = start("memory://", disk_pages=3)
    server.ask(0)
    until(lambda: server.disk().num_pages == 3)
    store.errors["delete"] = OSError(30, "Read-only file system")
    server.rounds()
    until(lambda: server.metric("drops_total", reason="no_room") >= 1)
    assert len(store.records()) == 3
    store.errors.clear()
    until(lambda: server.rounds(1) or server.metric("evicted_total") >= 1)


@pytest.mark.parametrize("operation", ["read", "write", "list"])
def test_nobody_waits_for_a_store_that_hangs(start, store, monkeypatch, operation):
    monkeypatch.setattr("cache.tiers.writer.WRITE_S", 0.05)
    monkeypatch.setattr("cache.tiers.store.READ_S", 0.05)
    monkeypatch.setattr("serve.engine.TIERS_GRACE_S", 0.1)
    if operation == "list":
        store.hanging.add(operation)
    server = start("memory://")
    if operation != "list":
        server.rounds(1)
        until(lambda: not server.disk().num_queued)
        store.hanging.add(operation)
    if operation == "write":
        store.data.clear()
    server.rounds(3)
    if operation == "list":
        assert server.disk().num_queued > 0
    else:
        until(lambda: server.ask(0) and server.metric("errors_total", reason="timeout") >= 3)
    store.release()
    recovers(server)


def test_folder_deleted_under_a_running_server_is_missed_and_made_again(start, tmp_path):
    folder = tmp_path / "pages"
    server = start(folder.as_uri())
    server.rounds(1)
    until(lambda: server.disk().num_pages == 3 * len(PROMPTS))
    shutil.rmtree(folder)
    recovers(server)
    assert server.metric("misses_total", reason="absent") >= 1
    assert records_of(folder)


def test_file_where_the_folder_should_be_is_no_tier_until_it_goes(start, tmp_path):
    (tmp_path / "pages").write_text("mine")
    server = start((tmp_path / "pages").as_uri())
    server.rounds()
    assert server.metric("errors_total", reason="NOT_FOUND") >= 1
    assert (tmp_path / "pages").read_text() == "mine"
    (tmp_path / "pages").unlink()
    recovers(server)


def records_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and len(path.name) == 32]


def flip(record: Path, at: int) -> None:
    content = bytearray(record.read_bytes())
    content[at] ^= 1
    record.write_bytes(content)


SPOIL: dict[str, Callable[[Path], object]] = {
    "truncated": lambda record: record.write_bytes(record.read_bytes()[:-1]),
    "corrupt": lambda record: flip(record, -1),
    "other_version": lambda record: flip(record, 8),
    "foreign": lambda record: flip(record, 12),
    "other_key": lambda record: flip(record, 28),
}
"""By the miss that it makes of a record."""


def test_records_that_are_not_what_they_should_be_are_computed_and_replaced(start, tmp_path):
    folder = tmp_path / "pages"
    first = start(folder.as_uri())
    first.rounds(1)
    first.engine.stop()
    for spoil, record in zip(cycle(SPOIL.values()), records_of(folder), strict=False):
        spoil(record)
    server = start(folder.as_uri())
    server.rounds(1)
    for reason in SPOIL:
        until(lambda reason=reason: server.metric("misses_total", reason=reason) >= 1)
    assert server.metric("hits_total") == 0
    recovers(server)


def test_pages_of_another_form_lie_in_a_folder_of_their_own(start, tmp_path, monkeypatch):
    folder = tmp_path / "pages"
    first = start(folder.as_uri())
    first.rounds(1)
    first.engine.stop()
    monkeypatch.setattr("serve.page_images.FORM", 2)
    server = start(folder.as_uri())
    server.rounds(1)
    assert server.metric("hits_total") == 0
    assert len(list(folder.iterdir())) == 2


@pytest.fixture
def reads(monkeypatch) -> Iterator[threading.Event]:
    """Pages come from the device when it is set."""
    may_go_on = threading.Event()
    wait = Reading.wait

    def wait_for_it(self: Reading) -> list:
        assert may_go_on.wait(TIMEOUT_S)
        return wait(self)

    monkeypatch.setattr(Reading, "wait", wait_for_it)
    yield may_go_on
    may_go_on.set()


def test_pages_on_their_way_from_the_device_are_flushed(start, tmp_path, reads):
    server = start((tmp_path / "pages").as_uri())
    server.ask(0)
    server.engine.flush_cache()
    reads.set()
    server.ask(1)
    until(lambda: server.disk().num_pages)
    server.engine.stop()
    assert [tier.num_pages for tier in server.engine.tiers()] == [3, 3]
    again = start((tmp_path / "pages").as_uri())
    until(lambda: again.disk().num_pages == 3)
    assert (again.fetched(0), again.fetched(1)) == (0, 48)


def test_pages_that_are_about_to_be_read_from_the_device_are_flushed(start, tmp_path, monkeypatch):
    planned, may_go_on = threading.Event(), threading.Event()
    prepare = Runner.prepare

    def wait_and_prepare(self: Runner, plan: StepPlan, step: Step) -> None:
        if plan.saves:
            planned.set()
            assert may_go_on.wait(TIMEOUT_S)
        prepare(self, plan, step)

    monkeypatch.setattr(Runner, "prepare", wait_and_prepare)
    server, answer = start((tmp_path / "pages").as_uri()), Answer()
    server.engine.submit(greedy("r", PROMPTS[0], NUM_TOKENS), answer)
    assert planned.wait(TIMEOUT_S)
    flush = threading.Thread(target=server.engine.flush_cache)
    flush.start()
    time.sleep(0.05)
    may_go_on.set()
    flush.join()
    assert server.engine.wait_idle(TIMEOUT_S)
    server.check(0, answer)
    server.engine.stop()
    assert [tier.num_pages for tier in server.engine.tiers()] == [0, 0]


def test_pages_that_a_request_waits_for_are_computed_after_a_flush(start, store, monkeypatch):
    monkeypatch.setattr(Worth, "recompute_s", lambda self, costs: [cost * 100 for cost in costs])
    server, answer = start("memory://"), Answer()
    server.rounds(1)
    until(lambda: server.disk().num_pages == 3 * len(PROMPTS))
    before = dict(store.data)
    store.hanging.add("read")
    server.engine.submit(greedy("r", PROMPTS[0], NUM_TOKENS), answer)
    until(lambda: store.hung)
    server.engine.flush_cache()
    store.data |= before
    store.release()
    assert server.engine.wait_idle(TIMEOUT_S)
    server.check(0, answer)
    usage = answer.outputs[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 0


def test_engine_that_stops_sleeps_until_its_pages_are_read(start, store, reads, monkeypatch):
    monkeypatch.setattr("serve.tier_traffic.MOST_UNDER_WAY", 4)
    num_steps = 0
    step = Engine.step

    def count(self: Engine) -> None:
        nonlocal num_steps
        num_steps += 1
        step(self)

    monkeypatch.setattr(Engine, "step", count)
    server = start("memory://")
    server.ask(0)
    server.ask(1)
    stop = threading.Thread(target=server.engine.stop)
    before = num_steps
    stop.start()
    time.sleep(0.1)
    assert num_steps < before + 5
    reads.set()
    stop.join()
    assert len(store.records()) == 6


def test_flush_returns_when_the_disk_has_nothing_left(start, tmp_path):
    server = start((tmp_path / "pages").as_uri())
    server.rounds(1)
    server.engine.flush_cache()
    assert records_of(tmp_path / "pages") == []
    assert [tier.num_pages for tier in server.engine.tiers()] == [0, 0]


def test_others_are_answered_while_a_flush_waits_for_a_disk(monkeypatch):
    may_go_on = threading.Event()

    def flush_cache(engine: FakeEngine) -> int:
        return 7 if may_go_on.wait(TIMEOUT_S) else 0

    monkeypatch.setattr(FakeEngine, "flush_cache", flush_cache)
    num_pages: list[int] = []
    with (
        FakeEngine() as engine,
        served(Front(engine)) as address,
        Client(address, timeout_s=TIMEOUT_S / 6) as client,
    ):
        flush = threading.Thread(target=lambda: num_pages.append(client.flush_cache()))
        flush.start()
        assert client.load().num_running == 0
        assert num_pages == []
        may_go_on.set()
        flush.join()
    assert num_pages == [7]


@given(st.lists(st.integers(1, 70), min_size=1, max_size=80))
def test_no_more_pages_are_being_read_than_are_counted_for(wanted):
    """With those that fill their batches."""
    ends: list[Callable[[list], None]] = []
    lengths: list[int] = []

    def read(state, pages, then) -> None:
        lengths.extend(len(_padded(some)) for some in _batches(pages))
        ends.append(then)

    state: Any = None
    mover: Any = SimpleNamespace(read=read)
    traffic = TierTraffic(TierStack(HostTier(0, PAGE_BYTES), []), mover, float)
    for num_pages in wanted:
        some = range(min(num_pages, traffic.num_savable))
        traffic.save(state, [(bytes(16), page) for page in some])
    assert sum(lengths) <= MOST_UNDER_WAY
    assert traffic.num_savable > 0 or sum(lengths) == MOST_UNDER_WAY
    for end in ends:
        end([])
    assert traffic.num_savable == MOST_SAVED


@pytest.mark.parametrize(
    ("tiers", "why"),
    [
        (
            {"host_gib": 1e-6},
            "tiers.host_gib is 1e-06: 1,074 bytes for each of 1 replicas, and a page takes 4,096; "
            "give 3.85e-06 or more",
        ),
        (
            {"host_gib": 0.01, "stores": [{"name": "disk", "url": "memory://", "gib": 1e-6}]},
            "tiers.stores, disk: gib is 1e-06: 1,074 bytes for each of 1 replicas, and a page "
            "takes 4,160; give 3.91e-06 or more",
        ),
        ({"host_gib": 1e6}, "tiers.host_gib is 1000000.0, this machine has .* in all; give what"),
        (
            {
                "host_gib": 0.01,
                "stores": [
                    {"name": name, "url": url, "gib": 0.01}
                    for name, url in (("a", "memory://x"), ("b", "memory://x/"))
                ],
            },
            "tiers.stores, a and b: both are memory://x/, .* give each a url of its own",
        ),
    ],
)
def test_tiers_that_cannot_be_are_refused_before_weights_are_read(
    checkpoint, monkeypatch, tiers, why
):
    monkeypatch.setattr("serve.build.load_weights", None)
    with pytest.raises(ConfigError, match=f"^{why}"):
        Server(checkpoint, None, **tiers)


@pytest.mark.parametrize(("stage", "tensor"), [(1, 1), (1, 2), (5, 1), (2, 4)])
def test_pages_on_their_way_are_counted_as_they_lie_on_a_device(stage, tensor):
    parts = make_parts(
        DENSE, random_weights(DENSE), MeshShape(stage=stage, tensor=tensor), moves_pages=True
    )
    assert parts.mover is not None
    reading = parts.mover.images.read(parts.runner.programs.new_state(), [1] * BATCHES[0])
    [(_, arrays)] = reading._batches
    page_bytes = sum(array.addressable_shards[0].data.nbytes for array in arrays) // BATCHES[0]
    sections = {"model": {"path": "nowhere"}, "mesh": {"stage": stage, "tensor": tensor}}

    def moving_bytes(**more):
        served = Served(make_config(sections | more, "test"), DENSE, "cpu")
        found = fit(served, 10**9)
        assert (
            found.needed_bytes == replace(found, moving_bytes=0).needed_bytes + found.moving_bytes
        )
        return found.moving_bytes

    assert moving_bytes(tiers={"host_gib": 1.0}) == 288 * page_bytes
    assert moving_bytes(split={"role": "prefill"}) == 64 * page_bytes
    decode = {"role": "decode", "peers": ["localhost:1"]}
    assert moving_bytes(split=decode) == 32 * page_bytes
    assert moving_bytes(split=decode, tiers={"host_gib": 1.0}) == 288 * page_bytes
    assert moving_bytes() == 0
