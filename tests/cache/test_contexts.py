"""Contexts against a model that is a dict, through steps of the clock and restarts; what is
refused, and what another tenant learns."""

import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import mkdtemp
from threading import Event, Thread

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.contexts.context import (
    ContextLimits,
    InvalidContext,
    NoSuchContext,
    TooManyContexts,
)
from cache.contexts.registry import Contexts
from cache.keys import PageNames, root_key

FINGERPRINT = bytes(range(16))
LIMITS = ContextLimits(
    max_tokens=20, max_contexts=7, max_tenant_contexts=4, default_ttl_s=60.0, max_ttl_s=1000.0
)
TENANTS = st.sampled_from(["a", "b"])
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12)
TTLS = st.integers(1, 1000)


class Clocks:
    def __init__(self):
        self.now_s = 5000.0
        self.wall_s = 1_700_000_000.0

    def passes(self, seconds):
        self.now_s += seconds
        self.wall_s += seconds

    def contexts(self, limits=LIMITS, directory=None, seed=0, page_size=4):
        """As after a start; with one seed the random numbers come again."""
        clocks = {"clock": lambda: self.now_s, "wall_clock": lambda: self.wall_s}
        return Contexts(limits, page_size, directory, FINGERPRINT, random=Random(seed), **clocks)


@pytest.fixture
def clocks():
    return Clocks()


def keys_of(tenant, salt, tokens, page_size=4):
    names = PageNames(root_key(tenant, salt), page_size)
    names.extend(tokens)
    return tuple(names.keys)


def ended(contexts):
    return [context.name for context in contexts.expire()]


@dataclass(frozen=True)
class Expected:
    tenant: str
    tokens: tuple[int, ...]
    end_s: float
    """By the monotonic clock."""
    saved: tuple[float, float]
    """What the file has: update_time and expire_time."""


class Histories(RuleBasedStateMachine):
    """Every context that was made is found by its tenant alone, until its time is over."""

    @initialize()
    def start(self):
        self.directory = Path(mkdtemp())
        self.clocks = Clocks()
        self.contexts = self.clocks.contexts(directory=self.directory)
        self.num_starts = 0
        self.held: dict[str, Expected] = {}
        """Those that `expire` has not returned."""
        self.gone: set[tuple[str, str]] = set()

    def teardown(self):
        rmtree(self.directory)

    @property
    def live(self):
        return [name for name, one in self.held.items() if self.clocks.now_s < one.end_s]

    def a_live_one(self, data):
        return data.draw(st.sampled_from(self.live))

    @rule(tenant=TENANTS, tokens=TOKENS, ttl_s=TTLS, in_words=st.booleans())
    def create(self, tenant, tokens, ttl_s, in_words):
        wall_s = self.clocks.wall_s
        asked = {"ttl_s": ttl_s} if in_words else {"expire_time": wall_s + ttl_s}
        num_own = sum(one.tenant == tenant for one in self.held.values())
        if num_own == LIMITS.max_tenant_contexts or len(self.held) == LIMITS.max_contexts:
            with pytest.raises(TooManyContexts):
                self.contexts.create(tenant, tokens, **asked)
            return
        made = self.contexts.create(tenant, tokens, **asked)
        assert made.name not in self.held
        assert (made.create_time, made.update_time) == (wall_s, wall_s)
        end_s = self.clocks.now_s + ttl_s
        self.held[made.name] = Expected(tenant, tuple(tokens), end_s, (wall_s, wall_s + ttl_s))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 9), max_size=8), ttl_s=st.none() | TTLS)
    def update(self, data, more, ttl_s):
        name = self.a_live_one(data)
        one = self.held[name]
        if (not more and ttl_s is None) or len(one.tokens) + len(more) > LIMITS.max_tokens:
            with pytest.raises(InvalidContext):
                self.contexts.update(one.tenant, name, more, ttl_s=ttl_s)
            return
        before, after = self.contexts.update(one.tenant, name, more, ttl_s=ttl_s)
        assert tuple(before.token_ids) == one.tokens
        assert after.keys[: len(before.keys)] == before.keys
        now_s, wall_s = self.clocks.now_s, self.clocks.wall_s
        end_s = one.end_s if ttl_s is None else now_s + ttl_s
        saved = (wall_s, wall_s + end_s - now_s)
        self.held[name] = Expected(one.tenant, (*one.tokens, *more), end_s, saved)
        assert (after.update_time, after.expire_time) == saved

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def delete(self, data):
        name = self.a_live_one(data)
        one = self.held.pop(name)
        assert tuple(self.contexts.delete(one.tenant, name).token_ids) == one.tokens
        self.gone.add((one.tenant, name))

    @rule(seconds=st.integers(0, 600))
    def wait(self, seconds):
        self.clocks.passes(seconds)

    @rule(seconds=st.integers(-2000, 2000))
    def set_wall_clock(self, seconds):
        self.clocks.wall_s += seconds

    @rule()
    def expire(self):
        over = sorted((one.end_s, name) for name, one in self.held.items())
        over = [name for end_s, name in over if end_s <= self.clocks.now_s]
        assert sorted(ended(self.contexts)) == sorted(over)
        for name in over:
            self.gone.add((self.held.pop(name).tenant, name))

    @rule(down_s=st.integers(0, 600), now_s=st.integers(0, 10_000))
    def restart(self, down_s, now_s):
        self.clocks.wall_s += down_s
        self.clocks.now_s = float(now_s)
        self.num_starts += 1
        self.contexts = self.clocks.contexts(directory=self.directory, seed=self.num_starts)
        assert not self.contexts.skipped
        for name, one in list(self.held.items()):
            update_time, expire_time = one.saved
            granted_s, left_s = expire_time - update_time, expire_time - self.clocks.wall_s
            if left_s > 0:
                self.held[name] = replace(one, end_s=now_s + min(granted_s, left_s))
            else:
                self.gone.add((one.tenant, name))
                del self.held[name]

    @invariant()
    def finds_what_it_should(self):
        live = set(self.live)
        for name, one in self.held.items():
            if name not in live:
                assert_no_such(self.contexts, one.tenant, name)
                continue
            found = self.contexts.get(one.tenant, name)
            assert tuple(found.token_ids) == one.tokens
            assert found.keys == keys_of(one.tenant, "", one.tokens)
            assert_no_such(self.contexts, "b" if one.tenant == "a" else "a", name)
        for tenant, name in self.gone:
            assert_no_such(self.contexts, tenant, name)
        assert {context.name for context in self.contexts.all()} == set(self.held)

    @rule(tenant=TENANTS, limit=st.integers(1, 3))
    def lists_each_once(self, tenant, limit):
        names, token = [], ""
        while True:
            listing = self.contexts.list(tenant, limit, token)
            names += [context.name for context in listing.contexts]
            assert len(listing.contexts) == limit or not listing.next_page_token
            if not (token := listing.next_page_token):
                break
        assert names == sorted(name for name in self.live if self.held[name].tenant == tenant)


def assert_no_such(contexts, tenant, name):
    for call in (
        lambda: contexts.get(tenant, name),
        lambda: contexts.update(tenant, name, ttl_s=1),
        lambda: contexts.delete(tenant, name),
    ):
        with pytest.raises(NoSuchContext):
            call()


TestHistories = Histories.TestCase


def test_a_context_says_what_it_is(clocks):
    made = clocks.contexts().create("a", range(9), cache_salt="s", display_name="The law", ttl_s=10)
    assert made.name.startswith("contexts/")
    assert (made.display_name, made.num_tokens, list(made.token_ids)) == (
        "The law",
        9,
        list(range(9)),
    )
    assert made.keys == keys_of("a", "s", range(9))
    assert len(made.keys) == 2
    assert made.expire_time == clocks.wall_s + 10


def test_an_extension_keeps_the_salt(clocks):
    contexts = clocks.contexts()
    made = contexts.create("a", range(3), cache_salt="s")
    after = contexts.update("a", made.name, range(3, 9)).after
    assert after.keys == keys_of("a", "s", range(9))


def test_a_chat_keeps_its_messages_and_is_extended_as_a_whole(clocks, tmp_path):
    contexts = clocks.contexts(directory=tmp_path)
    messages = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    made = contexts.create("a", [1, 2, 3], messages=messages[:1])
    after = contexts.update("a", made.name, [1, 9, 9, 9, 9], messages=messages).after
    assert (after.messages, list(after.token_ids)) == (messages, [1, 9, 9, 9, 9])
    assert after.keys == keys_of("a", "", [1, 9, 9, 9, 9])
    assert clocks.contexts(directory=tmp_path).get("a", made.name) == after
    with pytest.raises(InvalidContext, match="would have 21 tokens"):
        contexts.update("a", made.name, [1] * 21, messages=messages)


def test_a_name_may_be_known_before(clocks):
    contexts = clocks.contexts()
    name = contexts.new_name()
    assert contexts.create("a", [1], name=name).name == name
    assert contexts.num_tokens == 1


def test_what_is_let_go_is_gone_once_also_if_its_time_is_over(clocks):
    contexts = clocks.contexts()
    over, left = contexts.create("a", [1], ttl_s=1), contexts.create("a", [1])
    clocks.passes(1)
    for made in (over, left):
        assert contexts.let_go(made)
        assert not contexts.let_go(made)
    assert ended(contexts) == []
    assert not contexts._names


def test_an_end_that_cannot_be_is_told_before(clocks):
    contexts = clocks.contexts()
    contexts.check_end(None, None)
    contexts.check_end(1000.0, None)
    with pytest.raises(InvalidContext, match=r"ttl is 1001.0 s"):
        contexts.check_end(1001.0, None)
    clocks.wall_s += 10
    with pytest.raises(InvalidContext, match="expire_time"):
        contexts.check_end(None, clocks.wall_s)


def test_what_has_ended_takes_no_room(clocks):
    contexts = clocks.contexts()
    contexts.create("a", [1], ttl_s=1)
    contexts.delete("b", contexts.create("b", [1]).name)
    clocks.passes(1)
    contexts.expire()
    assert not contexts._entries
    assert not contexts._names
    assert not contexts._all_names
    assert not contexts._ends


def test_without_an_end_it_is_the_defaults(clocks):
    made = clocks.contexts().create("a", [1])
    assert made.expire_time == clocks.wall_s + LIMITS.default_ttl_s


def test_setting_the_wall_clock_neither_ends_nor_prolongs_what_runs(clocks):
    contexts = clocks.contexts()
    made = contexts.create("a", [1], ttl_s=100)
    for step_s in (-1e9, 2e9, -1e9):
        clocks.wall_s += step_s
        assert ended(contexts) == []
        assert contexts.get("a", made.name) == made
        clocks.passes(33)
    clocks.wall_s -= 1e6
    clocks.passes(1)
    assert ended(contexts) == [made.name]


def test_a_restart_goes_on_where_it_was(clocks, tmp_path):
    made = clocks.contexts(directory=tmp_path).create("a", [1], display_name="\ud800é", ttl_s=100)
    clocks.passes(60)
    clocks.now_s = 3.0
    again = clocks.contexts(directory=tmp_path)
    assert again.get("a", made.name) == made
    clocks.passes(39.5)
    assert ended(again) == []
    clocks.passes(0.5)
    assert ended(again) == [made.name]
    assert list(tmp_path.iterdir()) == []


def test_a_restart_under_a_clock_set_back_keeps_no_longer_than_was_granted(clocks, tmp_path):
    made = clocks.contexts(directory=tmp_path).create("a", [1], ttl_s=100)
    clocks.wall_s -= 1e6
    again = clocks.contexts(directory=tmp_path)
    assert again.get("a", made.name).expire_time == clocks.wall_s + 100
    clocks.passes(99)
    assert ended(again) == []
    clocks.passes(1)
    assert ended(again) == [made.name]


def test_an_extension_after_the_clock_was_set_back_grants_nothing_more(clocks, tmp_path):
    contexts = clocks.contexts(directory=tmp_path)
    made = contexts.create("a", [1], ttl_s=100)
    clocks.passes(90)
    clocks.wall_s -= 1e6
    assert contexts.update("a", made.name, [2]).after.expire_time == clocks.wall_s + 10
    again = clocks.contexts(directory=tmp_path)
    clocks.passes(10)
    assert ended(again) == [made.name]


def test_what_expired_while_it_was_down_is_gone_with_its_file(clocks, tmp_path):
    clocks.contexts(directory=tmp_path).create("a", [1], ttl_s=100)
    clocks.passes(100)
    assert len(clocks.contexts(directory=tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_restart_keeps_more_than_new_limits_would_allow(clocks, tmp_path):
    contexts = clocks.contexts(directory=tmp_path)
    made = [contexts.create("a", range(9)).name for _ in range(3)]
    limits = replace(LIMITS, max_tokens=8, max_tenant_contexts=2)
    again = clocks.contexts(limits, directory=tmp_path)
    assert sorted(made) == [context.name for context in again.list("a").contexts]


def test_a_restart_with_another_page_size_names_the_pages_anew(clocks, tmp_path):
    made = clocks.contexts(directory=tmp_path).create("a", range(9))
    again = clocks.contexts(directory=tmp_path, page_size=3)
    assert again.get("a", made.name).keys == keys_of("a", "", range(9), page_size=3)


def test_without_a_directory_a_restart_forgets(clocks):
    clocks.contexts().create("a", [1])
    assert len(clocks.contexts()) == 0


def test_a_listing_goes_on_after_what_was_deleted_meanwhile(clocks):
    contexts = clocks.contexts()
    names = sorted(contexts.create("a", [1]).name for _ in range(4))
    first = contexts.list("a", 2)
    assert [context.name for context in first.contexts] == names[:2]
    contexts.delete("a", names[1])
    contexts.delete("a", names[2])
    rest = contexts.list("a", 2, first.next_page_token)
    assert [context.name for context in rest.contexts] == names[3:]
    assert rest.next_page_token == ""


def test_a_name_that_was_given_is_not_given_again(clocks, tmp_path):
    made = clocks.contexts(directory=tmp_path).create("a", [1])
    other = clocks.contexts(directory=tmp_path).create("b", [1])  # the same random numbers
    assert made.name != other.name


@pytest.mark.parametrize(
    "lifetime",
    [
        {"ttl_s": 0},
        {"ttl_s": -1},
        {"ttl_s": math.nan},
        {"ttl_s": math.inf},
        {"ttl_s": -math.inf},
        {"ttl_s": 1000.001},
        {"ttl_s": 10**400},
        {"expire_time": 0},
        {"expire_time": 1_700_000_000.0},
        {"expire_time": 1_700_001_000.1},
        {"expire_time": math.nan},
        {"expire_time": math.inf},
        {"ttl_s": 1, "expire_time": 1_700_000_001.0},
    ],
)
def test_an_end_that_cannot_be_is_refused_and_nothing_changes(clocks, tmp_path, lifetime):
    contexts = clocks.contexts(directory=tmp_path)
    made = contexts.create("a", [1], ttl_s=10)
    with pytest.raises(InvalidContext, match=r"ttl|expire_time"):
        contexts.create("a", [1], **lifetime)
    with pytest.raises(InvalidContext, match=r"ttl|expire_time"):
        contexts.update("a", made.name, [2], **lifetime)
    assert contexts.all() == [made]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("token_ids", "words"),
    [
        ([], "is empty"),
        (range(21), "21 tokens; at most 20"),
        ([-1], r"0 to 2\*\*32 - 1"),
        ([2**32], r"0 to 2\*\*32 - 1"),
        ([1.5], r"0 to 2\*\*32 - 1"),
    ],
)
def test_tokens_that_cannot_be_are_refused(clocks, token_ids, words):
    contexts = clocks.contexts()
    with pytest.raises(InvalidContext, match=words):
        contexts.create("a", token_ids)
    assert contexts.all() == []


@pytest.mark.parametrize("more", [[], [-1], range(20)])
def test_an_extension_that_cannot_be_is_refused(clocks, more):
    contexts = clocks.contexts()
    made = contexts.create("a", [1])
    with pytest.raises(InvalidContext):
        contexts.update("a", made.name, more)
    assert contexts.get("a", made.name) == made


def test_a_display_name_has_a_bound(clocks):
    contexts = clocks.contexts()
    contexts.create("a", [1], display_name="x" * 128)
    with pytest.raises(InvalidContext, match="129 characters; at most 128"):
        contexts.create("a", [1], display_name="x" * 129)


def test_contexts_have_bounds_for_a_tenant_and_for_all(clocks):
    contexts = clocks.contexts()
    for tenant, count in (("a", 4), ("b", 3)):
        for _ in range(count):
            contexts.create(tenant, [1], ttl_s=10)
    with pytest.raises(TooManyContexts, match="has 4 contexts and may have 4"):
        contexts.create("a", [1])
    with pytest.raises(TooManyContexts, match="room for 7 contexts"):
        contexts.create("b", [1])
    clocks.passes(10)
    assert len(ended(contexts)) == 7
    contexts.create("a", [1])


@pytest.mark.parametrize(
    ("limit", "token"), [(0, ""), (-1, ""), (1001, ""), (1, "x"), (1, "contexts/../x")]
)
def test_a_listing_that_cannot_be_is_refused(clocks, limit, token):
    with pytest.raises(InvalidContext):
        clocks.contexts().list("a", limit, token)


@pytest.mark.parametrize("name", ["", "contexts/", "x" * 10**6, "contexts/../../etc/passwd", "\0"])
def test_an_unknown_name_is_no_such_context(clocks, tmp_path, name):
    contexts = clocks.contexts(directory=tmp_path)
    assert_no_such(contexts, "a", name)
    with pytest.raises(NoSuchContext) as error:
        contexts.get("a", name)
    assert len(str(error.value)) < 1000


def test_anothers_expired_and_unknown_names_cannot_be_told_apart(clocks):
    contexts = clocks.contexts()
    there = contexts.create("a", [1], ttl_s=10)
    gone = contexts.create("b", [1], ttl_s=1)
    clocks.passes(1)
    messages = set()
    for name in (there.name, gone.name, "contexts/" + "0" * 24):
        with pytest.raises(NoSuchContext) as error:
            contexts.get("b", name)
        messages.add(str(error.value).replace(name, "NAME"))
    assert len(messages) == 1


def test_asking_for_anothers_context_takes_the_same_steps_as_for_none(clocks):
    contexts = clocks.contexts()
    anothers = contexts.create("a", [1]).name

    def steps(name):
        taken = []

        def trace(frame, event, arg):
            frame.f_trace_opcodes = True
            taken.append((frame.f_code.co_name, frame.f_lasti))
            return trace

        sys.settrace(trace)
        try:
            contexts.get("b", name)
        except NoSuchContext:
            return taken
        finally:
            sys.settrace(None)

    unknown = "contexts/" + "0" * 24
    steps(unknown)  # the interpreter specializes what it has seen
    assert steps(anothers) == steps(unknown) != []


def test_nobody_waits_for_the_disk_to_get_or_list(clocks, tmp_path, monkeypatch):
    contexts = clocks.contexts(directory=tmp_path)
    made = contexts.create("a", [1])
    is_writing, may_go_on = Event(), Event()

    def hang(descriptor):
        is_writing.set()
        may_go_on.wait(60)

    monkeypatch.setattr(os, "fsync", hang)
    writer = Thread(target=contexts.create, args=("a", [2]))
    writer.start()
    try:
        assert is_writing.wait(60)
        assert contexts.get("a", made.name) == made
        assert contexts.list("a").contexts == [made]
    finally:
        may_go_on.set()
        writer.join()
    assert len(contexts.list("a").contexts) == 2


def test_who_creates_while_another_does_counts_it(clocks, tmp_path, monkeypatch):
    contexts = clocks.contexts(replace(LIMITS, max_contexts=1), directory=tmp_path)
    is_writing, may_go_on, refused = Event(), Event(), []

    def hang(descriptor):
        is_writing.set()
        may_go_on.wait(60)

    def create():
        try:
            contexts.create("a", [1])
        except TooManyContexts as error:
            refused.append(error)

    monkeypatch.setattr(os, "fsync", hang)
    first, second = Thread(target=create), Thread(target=create)
    first.start()
    assert is_writing.wait(60)
    second.start()
    second.join(0.1)  # time to do what it must not
    may_go_on.set()
    first.join()
    second.join()
    assert (len(contexts), len(refused)) == (1, 1)


def test_what_many_threads_create_ends_once(clocks):
    contexts = clocks.contexts(replace(LIMITS, max_contexts=1000, max_tenant_contexts=300))
    names, gone = [], []

    def create(tenant):
        names.extend(contexts.create(tenant, [1], ttl_s=10).name for _ in range(200))

    def end(tenant):
        for _ in range(200):
            for context in contexts.list(tenant, 1).contexts:
                gone.append(contexts.delete(tenant, context.name).name)

    threads = [Thread(target=call, args=(t,)) for t in "abc" for call in (create, end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clocks.passes(10)
    gone += ended(contexts)
    assert len(set(names)) == 600
    assert sorted(gone) == sorted(names)


def test_ten_thousand_contexts_are_as_fast_as_few(clocks):
    limits = replace(LIMITS, max_contexts=10_000, max_tenant_contexts=10_000)

    def seconds(count):
        contexts = clocks.contexts(limits)
        names = [contexts.create("a", [1], ttl_s=100).name for _ in range(count)]
        started_s = time.process_time()
        for i in range(1000):
            contexts.get("a", names[i % count])
            contexts.expire()
        contexts.list("a", 10)
        return time.process_time() - started_s

    # 100 times as many; a look at each of them would take 100 times as long.
    assert seconds(10_000) < 20 * seconds(100)
