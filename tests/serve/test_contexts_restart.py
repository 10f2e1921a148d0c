"""Contexts of a configuration with tiers: kept on the disk, and found again by the next start."""

import asyncio
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from cache.contexts.registry import Contexts
from cache.tiers.worth import Worth
from serve.build import build_contexts, build_engine
from serve.config import ConfigError, load_config
from serve.contexts import ContextCache
from serve.engine import Engine
from serve.errors import NotFound, Overloaded
from serve.front import Front
from serve.request import SamplingParams
from tests.serve.test_build import MODEL, configure
from tools.random_checkpoint import write_random_checkpoint

TIMEOUT_S = 60
LAW = [3 + i % 90 for i in range(50)]
NUM_FULL = 3
QUESTION = [7, 8]
SCHEDULE = {"max_batch": 2, "token_budget": 32, "chunk": 16, "max_steps": 1}
OTHERS = [[5 + (i * j) % 90 for i in range(50)] for j in range(3, 13)]
PAGE_GIB = 4_200 / 2**30
"""An image has 4 KiB, a record a little more."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, MODEL, "bfloat16")
    return directory


@pytest.fixture(autouse=True)
def _slow_device(monkeypatch):
    """On which computing always takes longer than any tier."""
    monkeypatch.setattr(Worth, "recompute_s", lambda self, costs: [cost * 10 for cost in costs])
    monkeypatch.setattr(Worth, "decide", lambda self, num_pages, tier, recompute_s: True)


@pytest.fixture
def configured(checkpoint, tmp_path):
    def make(disk_pages=1000, host_pages=1000, stores=1, **contexts):
        store = {"name": "disk", "url": (tmp_path / "kv").as_uri(), "gib": disk_pages * PAGE_GIB}
        folder = str(tmp_path / "contexts") if stores else ""
        return configure(
            checkpoint,
            model={"dtype": "float32"},
            schedule=SCHEDULE,
            cache={"pages": 8},
            tiers={"host_gib": host_pages * PAGE_GIB, "stores": [store] * stores},
            contexts={"folder": folder} | contexts,
        )

    return make


@dataclass
class Server:
    engine: Engine
    front: Front
    contexts: Contexts
    cache: ContextCache

    def create(self, tokens, **options):
        return asyncio.run(self.cache.create("", tokens, **options)).context

    def delete(self, context):
        asyncio.run(self.cache.delete("", context.name))

    def usage(self, tokens, context=""):
        return asyncio.run(self._usage(tokens, context))

    async def _usage(self, tokens, name):
        after = self.front.context("", name) if name else None
        request = self.front.prepare(
            self.front.encode_prompt(tokens, after), SamplingParams(max_tokens=1), context=after
        )
        deltas = [delta async for delta in self.front.generate(request)]
        return deltas[-1].usage

    @property
    def num_pinned(self):
        return [tier.num_pinned for tier in self.engine.tiers()]

    def wait_until(self, happened):
        deadline_s = time.monotonic() + TIMEOUT_S
        while not happened(self.engine.tiers()[-1]):
            assert time.monotonic() < deadline_s, self.engine.tiers()
            time.sleep(0.01)


@contextmanager
def serving(config):
    engine = build_engine(config, compile_ahead=False)
    contexts = build_contexts(config, engine.info)
    assert contexts is not None
    front = Front(engine, contexts=contexts)
    cache = ContextCache(front, engine, contexts)
    engine.start()
    try:
        yield Server(engine, front, contexts, cache)
    finally:
        engine.stop()


def test_a_context_survives_a_restart_with_its_pages(configured):
    with serving(configured()) as server:
        made = server.create(LAW, display_name="The law")
        assert server.num_pinned == [0, NUM_FULL]
        assert server.engine.load().pages_used == 0, "the device keeps it as it keeps others"
        server.wait_until(lambda disk: disk.num_pages == NUM_FULL)
    with serving(configured()) as server:
        server.wait_until(lambda disk: disk.num_pages == NUM_FULL)
        usage = server.usage(QUESTION, made.name)
        assert (usage.prompt_tokens, usage.cached_tokens) == (52, 48)
        assert usage.fetched_tokens == {"disk": 48}
        assert server.num_pinned == [0, NUM_FULL]
        server.delete(made)
        assert server.num_pinned == [0, 0]
    with serving(configured()) as server, pytest.raises(NotFound):
        server.usage(QUESTION, made.name)


def test_what_a_start_has_no_room_for_is_never_a_contexts(configured):
    """The disk is made so small that only the context's pages fit."""
    with serving(configured()) as server:
        made = server.create(LAW)
        for prompt in OTHERS:
            server.usage(prompt)
    with serving(configured(disk_pages=NUM_FULL)) as server:
        server.wait_until(lambda disk: disk.num_pages == NUM_FULL)
        for prompt in OTHERS:
            server.usage(prompt)
        assert server.usage(QUESTION, made.name).cached_tokens == 48


def test_a_context_that_no_longer_fits_is_dropped_and_named(configured, caplog):
    with serving(configured()) as server:
        made = server.create(LAW, display_name="The law")
    with caplog.at_level(logging.WARNING), serving(configured(disk_pages=2)) as server:
        assert server.contexts.all() == []
        assert server.num_pinned == [0, 0]
    assert f"{made.name} (The law), 50 tokens, is dropped: 3 pages" in caplog.text
    with serving(configured()) as server:
        assert server.contexts.all() == []


def test_a_page_that_was_lost_is_computed_and_kept_again(configured, tmp_path):
    with serving(configured()) as server:
        made = server.create(LAW)
    for path in (tmp_path / "kv").rglob("*"):
        if path.is_file():
            path.unlink()
    with serving(configured()) as server:
        assert server.usage(QUESTION, made.name).cached_tokens == 0
        server.wait_until(lambda disk: disk.num_pages == NUM_FULL)


def test_pages_that_were_computed_before_are_kept_too(configured):
    with serving(configured()) as server:
        server.usage(LAW)
        assert server.num_pinned == [0, 0]
        server.create(LAW)
        server.wait_until(lambda disk: disk.num_pages == NUM_FULL)
        assert server.num_pinned == [0, NUM_FULL]


def test_more_than_the_tier_has_room_for_is_refused_with_what_to_change(configured):
    with serving(configured(disk_pages=4)) as server:
        server.create(LAW)
        with pytest.raises(Overloaded, match=r"in tier disk, 3 already are.* raise the budget"):
            server.create(OTHERS[0])
        server.create([*LAW, 5])
        assert server.num_pinned == [0, NUM_FULL]


def test_without_a_store_host_memory_keeps_contexts(configured):
    with serving(configured(stores=0, host_pages=4)) as server:
        made = server.create(LAW)
        assert server.num_pinned == [NUM_FULL]
        for prompt in OTHERS:
            server.usage(prompt)
        assert server.usage(QUESTION, made.name).fetched_tokens == {"host": 48}
        assert server.engine.flush_cache() >= 0
        assert server.usage(QUESTION, made.name).fetched_tokens == {"host": 48}


def test_a_folder_needs_a_store(configured, tmp_path):
    with pytest.raises(ConfigError, match=r"tiers.stores has one where contexts.folder is set"):
        configured(stores=0, folder="contexts")
    with pytest.raises(ConfigError, match="max_ttl_s is inf; it must be a finite number"):
        configured(max_ttl_s=float("inf"))


def test_a_relative_folder_is_the_files(tmp_path):
    (tmp_path / "serve.toml").write_text(
        '[model]\npath = "m"\n[tiers]\nhost_gib = 1\n[[tiers.stores]]\nname = "disk"\nurl = "kv"\n'
        'gib = 1\n[contexts]\nfolder = "kept"\n'
    )
    assert load_config(tmp_path / "serve.toml").contexts.folder == str(tmp_path / "kept")


def test_without_prefix_caching_there_are_no_contexts(checkpoint):
    config = configure(checkpoint, cache={"pages": 8, "prefix_caching": False})
    engine = build_engine(config, compile_ahead=False)
    assert build_contexts(config, engine.info) is None
