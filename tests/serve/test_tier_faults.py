"""Tiers that fail: tokens are those of a server without tiers, nothing leaks, and all is counted."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cache.tiers.worth import Worth
from serve.api.http_server import EngineCollector
from serve.build import build_engine
from serve.page_images import Reading
from tests.cache.tiers.fake_store import DISK_FULL, FakeStore, until
from tests.serve.harness import Answer, greedy
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
def test_store_that_fails_costs_nothing_but_computing(
    start, store, operation, error, reason, loss
):
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
def reads(monkeypatch) -> threading.Event:
    """Pages come from the device when it is set."""
    may_go_on = threading.Event()
    wait = Reading.wait

    def wait_for_it(self: Reading) -> list:
        assert may_go_on.wait(TIMEOUT_S)
        return wait(self)

    monkeypatch.setattr(Reading, "wait", wait_for_it)
    return may_go_on


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


def test_request_that_waits_for_a_page_is_computed_after_a_flush(start, store):
    server = start("memory://")
    server.rounds(1)
    until(lambda: server.disk().num_pages == 3 * len(PROMPTS))
    store.hanging.add("read")
    answer = Answer()
    server.engine.submit(greedy("r", PROMPTS[0], NUM_TOKENS), answer)
    until(lambda: store.hung)
    began_s = time.monotonic()
    server.engine.flush_cache()
    assert server.engine.wait_idle(TIMEOUT_S)
    assert time.monotonic() - began_s < TIMEOUT_S / 2
    server.check(0, answer)
    assert answer.outputs[-1].usage.cached_tokens == 0
    store.release()
    until(lambda: server.disk().num_pages == 3)
    server.ask(1)
    until(lambda: server.disk().num_pages == 6)
    assert all(tier.num_pages <= 6 for tier in server.engine.tiers())


def test_flush_returns_when_the_disk_has_nothing_left(start, tmp_path):
    server = start((tmp_path / "pages").as_uri())
    server.rounds(1)
    server.engine.flush_cache()
    assert records_of(tmp_path / "pages") == []
    assert [tier.num_pages for tier in server.engine.tiers()] == [0, 0]
