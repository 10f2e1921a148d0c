"""The scheduler against a device that computes nothing and checks everything.

The fake device keeps what it is told to write in pages, and reads a row's tokens back from there;
its next token is a hash of them. So a request gets the tokens it would get alone only if every
position, page and count of every plan was right.
"""

import itertools
import math
import zlib
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.pages import NULL_PAGE, PagePool
from cache.tables import PageTables
from cache.transfers.sending import Sending
from serve.errors import DuplicateRequest, InvalidRequest, Overloaded
from serve.limits import Limits
from serve.pace import TokenCost
from serve.plan import Row, Send, StepPlan
from serve.plan import Sequence as Running
from serve.request import (
    FinishReason,
    GenerateRequest,
    Output,
    SamplingParams,
    Timings,
    TokenLogprobs,
)
from serve.scheduler import RowResult, Scheduler
from serve.sends import MOST_SENT

VOCAB = 11
COMMON = (4, 0, 4, 9, 9, 1, 4, 0, 4, 2, 10, 8)
"""Prompts begin with some of it: so they share prefixes."""
EOS = frozenset({7})
MEANINGLESS = -1
"""The device's token for a row that had ended before the step."""


def next_token(tokens: list[int], num_output: int, min_tokens: int, ends: frozenset[int]) -> int:
    """The fake model's choice; none of the first `min_tokens` is an end."""
    token = zlib.crc32(bytes(tokens)) % VOCAB
    while token in ends and num_output < min_tokens:
        token = (token + 1) % VOCAB
    return token


def ends_of(request: GenerateRequest) -> frozenset[int]:
    sampling = request.sampling
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else EOS)


def alone(request: GenerateRequest, max_length: int) -> tuple[tuple[int, ...], FinishReason]:
    """What the request is given when nobody else is there."""
    num_prompt, ends = len(request.prompt_ids), ends_of(request)
    tokens = list(request.prompt_ids)
    while True:
        num_output = len(tokens) - num_prompt
        tokens.append(next_token(tokens, num_output, request.sampling.min_tokens, ends))
        if tokens[-1] in ends:
            return tuple(tokens[num_prompt:]), FinishReason.STOP
        if len(tokens) == max_length:
            return tuple(tokens[num_prompt:]), FinishReason.LENGTH


def longest(request: GenerateRequest, limits: Limits, pool: PagePool) -> int | None:
    """Tokens, prompt included, to which the request may come; None when it must be refused."""
    num_prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
    memory = pool.num_usable * pool.page_size
    if num_prompt + 1 > min(limits.max_context, memory):
        return None
    if wanted is None:
        return min(limits.max_context, memory)
    length = min(num_prompt + wanted, limits.max_context)
    return length if length <= memory else None


def root_of(request: GenerateRequest) -> int:
    """What stands before a first token: requests of different roots may not share it."""
    return zlib.crc32(repr((request.tenant, request.cache_salt)).encode())


def image_of(request: GenerateRequest, tokens: list[int], number: int, size: int) -> Any:
    """What a page of the request holds once it is computed."""
    before, image = root_of(request), list[tuple[int, int]]()
    for token in tokens[: (number + 1) * size]:
        image.append((before, token))
        before = zlib.crc32(repr(image[-1]).encode())
    return image[number * size :]


class FakeDevice:
    """Runs plans in the order they are submitted, on pages that remember who wrote what."""

    def __init__(self, tables: PageTables, limits: Limits, tiers: "FakeTiers | None") -> None:
        self.tables = tables
        self.tiers = tiers
        self.limits = limits
        self.written: dict[tuple[int, int], tuple[int, int]] = {}
        """(page, offset) -> (what stands before it, token): a key depends on all tokens before."""
        self.rows = tables.array
        """The page tables as they were when the step under way was packed."""
        self.tenants: dict[int, Running] = {}
        """By slot."""
        self.last_token: dict[int, int] = {}
        self.ended: dict[int, bool] = {}

    def pack(self, plan: StepPlan) -> None:
        check_plan(plan, self.limits)
        for sequence in plan.admitted:
            assert sequence.slot is not None
            self.tenants[sequence.slot] = sequence
        self.rows = self.tables.array.copy()
        for row in plan.rows:
            self._check_row(row)

    def run(self, plan: StepPlan) -> list[RowResult]:
        for key, page in plan.saves:
            assert self.tiers is not None
            assert len(self._image(page)) == self.tables.pool.page_size, "a page is saved half full"
            self.tiers.keep(key, self._image(page))
        for sending, number, page in plan.sends:
            sending.deliver(number, [self._image(page)])
            sending.num_delivered += 1
        for page, image in plan.landings:
            self._set_image(page, image)
        for source, target in plan.copies:
            self._set_image(target, self._image(source))
        return [self._run_row(row, plan) for row in plan.rows]

    def _image(self, page: int) -> list[tuple[int, int]]:
        places = ((page, offset) for offset in range(self.tables.pool.page_size))
        return [self.written[place] for place in places if place in self.written]

    def _set_image(self, page: int, image: Any) -> None:
        for offset in range(self.tables.pool.page_size):
            self.written.pop((page, offset), None)
        self.written.update({(page, offset): one for offset, one in enumerate(image)})

    def _run_row(self, row: Row, plan: StepPlan) -> RowResult:
        if row.token_ids:
            return self._prefill(row)
        if self.ended[row.slot]:
            return RowResult([MEANINGLESS] * row.num_tokens)
        chosen = [
            self._advance(row, row.start + i, self.last_token[row.slot])
            for i in range(plan.num_tokens)
            if not self.ended[row.slot]
        ]
        return self._result(row, chosen)

    def _prefill(self, row: Row) -> RowResult:
        for i, token in enumerate(row.token_ids[:-1]):
            self._write(row, row.start + i, token)
        last = row.start + row.length - 1
        if row.num_tokens:
            return self._result(row, [self._advance(row, last, row.token_ids[-1])])
        self._write(row, last, row.token_ids[-1])
        return self._result(row, [])

    def _advance(self, row: Row, position: int, token: int) -> int:
        """Computes one token of a row; the next one, chosen from what its pages hold."""
        self._write(row, position, token)
        tokens = self._read(row, position + 1)
        sequence = row.sequence
        num_output = position + 1 - sequence.num_prompt
        min_tokens = sequence.request.sampling.min_tokens
        chosen = next_token(tokens, num_output, min_tokens, sequence.end_ids)
        self.last_token[row.slot] = chosen
        remaining = row.remaining - (num_output - row.num_output)
        self.ended[row.slot] = chosen in sequence.end_ids or remaining <= 1
        return chosen

    def _write(self, row: Row, position: int, token: int) -> None:
        before = root_of(row.sequence.request)
        if position:
            before = zlib.crc32(repr(self.written[self._place(row, position - 1)]).encode())
        self.written[self._place(row, position)] = (before, token)

    def _read(self, row: Row, length: int) -> list[int]:
        """The row's tokens, from its pages."""
        found = [self.written[self._place(row, at)] for at in range(length)]
        before = root_of(row.sequence.request)
        for one in found:
            assert one[0] == before, "a row reads what was computed after other tokens"
            before = zlib.crc32(repr(one).encode())
        return [token for _, token in found]

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        number, offset = divmod(position, self.tables.pool.page_size)
        page = int(self.rows[row.slot, number])
        assert page != NULL_PAGE, f"position {position} has no page"
        return page, offset

    def _check_row(self, row: Row) -> None:
        sequence = row.sequence
        assert self.tenants[row.slot] is sequence, "the slot's parameters are another request's"
        end = row.start + row.length
        prompt = sequence.request.prompt_ids
        assert row.num_output == max(end, sequence.prefill_end) - len(prompt)
        assert row.num_output + row.remaining == sequence.max_length - len(prompt)
        assert row.remaining >= max(1, row.num_tokens)
        if not row.token_ids:
            assert row.length == 1
            return
        assert row.length == len(row.token_ids) <= self.limits.chunk
        assert row.num_tokens == (end == sequence.prefill_end)
        assert row.token_ids == tuple(sequence.tokens[row.start : end])
        if row.targets:
            assert row.targets == prompt[row.start + 1 : end + 1]

    def _result(self, row: Row, chosen: list[int]) -> RowResult:
        """Logprobs tell the place they are for: output and prompt positions."""
        tokens = chosen + [MEANINGLESS] * (row.num_tokens - len(chosen))
        wanted = row.sequence.request.sampling.logprobs is not None
        logprobs = [TokenLogprobs(t, -row.num_output - i) for i, t in enumerate(tokens)]
        before = [TokenLogprobs(t, -row.start - 1 - i) for i, t in enumerate(row.targets)]
        return RowResult(tokens, logprobs if wanted else (), before)


def check_plan(plan: StepPlan, limits: Limits) -> None:
    """A plan fits the compiled shapes, and no sequence advances twice in it."""
    assert len(plan.decode) <= limits.max_batch
    assert len(plan.chunks) <= limits.max_chunk_rows
    assert sum(row.length for row in plan.rows) <= limits.token_budget
    assert 1 <= plan.num_tokens <= limits.max_steps
    assert plan.num_tokens == 1 or not plan.chunks
    assert all(row.num_tokens == min(plan.num_tokens, row.remaining) for row in plan.decode)
    assert all(0 <= row.slot < limits.max_batch for row in plan.rows)
    by_slot = sorted(plan.chunks, key=lambda row: row.slot)
    prompts = [list(rows) for _, rows in itertools.groupby(by_slot, lambda row: row.slot)]
    slots = [row.slot for row in plan.decode] + [rows[0].slot for rows in prompts]
    assert len(slots) == len(set(slots)), "two rows of a slot that are not one piece of a prompt"
    for rows in prompts:
        for one, after in itertools.pairwise(rows):
            # What lies between another's row of the same step computes.
            assert after.start >= one.start + one.length
            assert one.num_tokens == 0, "a prompt goes on after its last row"


def precedence(sequence: Running) -> tuple[int, int]:
    return sequence.request.priority, sequence.order


class FakeFetch:
    """Pages that arrive one at each look but the first `delay`, until one is missing."""

    def __init__(
        self, pages: list[tuple[bytes, Any]], delay: int, tier: str | None = "below"
    ) -> None:
        self._pages, self._delay, self._tier = pages, delay, tier
        self.is_near = tier is not None

    def done(self) -> bool:
        return not self._pages

    def take(self, most: int) -> list[tuple[bytes, Any]]:
        if self._delay:
            self._delay -= 1
            return []
        return [self._pages.pop(0)] if self._pages else []

    def tier_of(self, key: bytes) -> str | None:
        return self._tier

    def cancel(self) -> None:
        self._pages = []


@dataclass
class FakePrefiller:
    """Computes a prompt but for its last `num_lost` pages; refuses every fourth."""

    delay: int
    num_lost: int
    page_size: int
    num_asked: int = 0

    def prefill(self, sequence: Running, first: int, last: int) -> Any:
        assert 0 <= first < last <= (len(sequence.tokens) - 1) // self.page_size
        assert sequence.names is not None
        self.num_asked += 1
        if self.num_asked % 4 == 0:
            return None
        pages = [
            (
                sequence.names.keys[number],
                image_of(sequence.request, sequence.tokens, number, self.page_size),
            )
            for number in range(first, last - self.num_lost)
        ]
        return FakeFetch(pages, self.delay, None)


@dataclass
class FakeReceiver:
    """Takes a request's pages a step after the last, or `leaves_at` a step."""

    request: GenerateRequest
    page_size: int
    first: int
    window: int
    leaves_at: int
    images: list[Any] = field(default_factory=list[Any])

    def sending(self) -> Sending | None:
        last = len(self.request.prompt_ids) // self.page_size
        if self.first >= last:
            return None
        return Sending(self.first, last, self._deliver, self.window)

    def _deliver(self, number: int, images: list[Any]) -> None:
        assert number == self.first + len(self.images)
        [image] = images
        tokens = list(self.request.prompt_ids)
        assert image == image_of(self.request, tokens, number, self.page_size)
        self.images.append(image)


@dataclass
class FakeTiers:
    """Keeps what it is given, but for every third page."""

    num_savable: int
    delay: int
    images: dict[bytes, Any] = field(default_factory=dict)
    num_given: int = 0

    def keep(self, key: bytes, image: Any) -> None:
        assert self.images.setdefault(key, image) == image, "a name stands for one content"
        self.num_given += 1
        if self.num_given % 3 == 0:
            del self.images[key]

    def holds(self, key: bytes) -> bool:
        return key in self.images

    def use(self, keys: list[bytes]) -> None:
        pass

    def fetch(self, keys: list[bytes], number: int) -> Any:
        found = list(itertools.takewhile(self.holds, keys))
        return FakeFetch([(key, self.images[key]) for key in found], self.delay) if found else None

    def observe_prefill(self, cost: float, seconds: float) -> None:
        assert cost > 0


class Server:
    """A scheduler and a fake device, whose results are read `lateness` steps late."""

    def __init__(
        self,
        limits: Limits,
        num_pages: int,
        page_size: int,
        lateness: int = 1,
        prefix_caching: bool = True,
        tiers: FakeTiers | None = None,
        prefiller: FakePrefiller | None = None,
    ) -> None:
        width = -(-limits.max_context // page_size)
        tables = PageTables(PagePool(num_pages, page_size), limits.max_batch + 1, width)
        self.limits = limits
        self.scheduler = Scheduler(limits, tables, EOS, prefix_caching, tiers, prefiller)
        self.receivers: list[tuple[FakeReceiver, Sending]] = []
        self.device = FakeDevice(tables, limits, tiers)
        self.lateness = lateness
        self.in_flight: deque[tuple[StepPlan, list[RowResult]]] = deque()
        self.outputs: dict[str, list[Output]] = defaultdict(list)
        self.expected: dict[str, tuple[tuple[int, ...], FinishReason]] = {}
        self.requests: dict[str, GenerateRequest] = {}
        self.num_steps = 0.0

    @property
    def pool(self) -> PagePool:
        return self.scheduler.tables.pool

    @property
    def live(self) -> set[str]:
        """Ids of requests under way, by what came out of the server."""
        ended = {name for name, got in self.outputs.items() if got and got[-1].finish_reason}
        return set(self.requests) - ended

    def add(self, request: GenerateRequest, receiver: FakeReceiver | None = None) -> bool:
        """Whether it was taken; it must be refused just when it can't fit or the queue is full."""
        max_length = longest(request, self.limits, self.pool)
        num_waiting = len(self.live) - len(self.scheduler.running)
        if max_length is None or num_waiting >= self.limits.max_queue:
            with pytest.raises(InvalidRequest if max_length is None else Overloaded):
                self._add(request)
            return False
        self._add(request, receiver)
        self.requests[request.request_id] = request
        self.expected[request.request_id] = alone(request, max_length)
        return True

    def _add(self, request: GenerateRequest, receiver: FakeReceiver | None = None) -> None:
        names = self.scheduler.names_of(request)
        sending = receiver.sending() if receiver and names else None
        self.scheduler.add(request, 1, float(self.num_steps), names, sending)
        if receiver and sending:
            self.receivers.append((receiver, sending))

    def abort(self, request_id: str) -> None:
        output = self.scheduler.abort(request_id, float(self.num_steps))
        assert (output is not None) == (request_id in self.live)
        if output is not None:
            self._take([output])
            self._check_books()

    def step(self, abort_planned: str | None = None) -> StepPlan:
        """As `Engine.step`; `abort_planned` is cancelled between pack and submit."""
        for receiver, sending in self.receivers:
            sending.taken(len(receiver.images))
            if self.num_steps >= receiver.leaves_at:
                sending.end()
        is_held = bool(self.scheduler.sends.held)
        before = list(self.scheduler.running)
        num_preemptions = self.scheduler.num_preemptions
        plan = self.scheduler.schedule(float(self.num_steps))
        self._check_order(plan, before, num_preemptions, is_held)
        self._check_books()
        self.device.pack(plan)
        if abort_planned is not None:
            self.abort(abort_planned)
        if plan:
            self.in_flight.append((plan, self.device.run(plan)))
        if self.in_flight and (not plan or len(self.in_flight) > self.lateness):
            self._take(self.scheduler.commit(*self.in_flight.popleft(), float(self.num_steps)))
            self._check_books()
        self.num_steps += 1
        return plan

    def finish(self, max_steps: int = 10_000) -> None:
        while self.scheduler.has_work or self.in_flight or self.scheduler.sends.held:
            assert self.num_steps < max_steps, f"after {self.num_steps} steps {self.live} wait"
            self.step()

    def timings(self, request_id: str) -> Timings:
        found = self.outputs[request_id][-1].timings
        assert found is not None
        return found

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(token for output in self.outputs[request_id] for token in output.token_ids)

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id in self.live, "nothing comes after the last output"
            self.outputs[output.request_id].append(output)

    def _check_order(
        self, plan: StepPlan, before: list[Running], num_preemptions: int, is_held: bool
    ) -> None:
        """The first in order are admitted, the last are preempted."""
        running = self.scheduler.running
        assert running == sorted(running, key=precedence)
        # Who waits for pages may find room at once where others have computed them meanwhile.
        stayed = [sequence for sequence in running if sequence not in plan.admitted]
        preempted = [sequence for sequence in before if sequence not in stayed]
        assert len(preempted) == self.scheduler.num_preemptions - num_preemptions
        assert preempted == before[len(before) - len(preempted) :]
        # Where receivers hold pages, there may be too few for the first alone.
        if not is_held and not self.scheduler.sends.held:
            assert not preempted or preempted[0] is not before[0], "the first in order goes on"
        admitted = [sequence.request.priority for sequence in plan.admitted]
        assert admitted == sorted(admitted)
        names = {sequence.request.request_id for sequence in running}
        waiting = [self.requests[name].priority for name in self.live - names]
        assert not admitted or not waiting or admitted[-1] <= min(waiting)
        if plan.num_tokens > 1:
            assert not waiting
        for sequence in running:
            decodable = not sequence.prefilling and sequence not in plan.admitted
            if sequence.fetch is not None:
                continue
            planned = any(row.sequence is sequence for row in plan.rows)
            all_planned = sequence.length == sequence.max_length
            assert planned or all_planned or not decodable, "a decodable sequence was left out"

    def _check_books(self) -> None:
        """Slots are held by one sequence each, pages by those that have them in their tables."""
        scheduler = self.scheduler
        slots = [sequence.slot for sequence in scheduler.running if sequence.slot is not None]
        assert len(slots) == len(scheduler.running)
        assert len(set(slots)) == len(slots) <= self.limits.max_batch
        owners = Counter(page for slot in slots for page in scheduler.tables.pages(slot))
        owners.update(scheduler.sends.held)
        assert self.pool.num_used == len(owners)
        assert all(self.pool.num_owners(page) == count for page, count in owners.items())
        for slot in set(range(self.limits.max_batch + 1)) - set(slots):
            assert not scheduler.tables.array[slot].any()
        assert scheduler.num_waiting == len(self.live) - len(slots)
        is_idle = not self.live and not scheduler.prefixes.has_unsaved
        assert scheduler.has_work == (not is_idle or scheduler.sends.has_work)

    def check_answer(self, request_id: str) -> None:
        """The request was given what it would be given alone, once, and told so in full."""
        request, outputs = self.requests[request_id], self.outputs[request_id]
        tokens, reason = self.expected[request_id]
        got = self.tokens(request_id)
        last = outputs[-1]
        if last.finish_reason is FinishReason.CANCELLED:
            assert got == tokens[: len(got)]
        else:
            assert (got, last.finish_reason) == (tokens, reason)
        assert last.usage is not None
        assert last.usage.prompt_tokens == len(request.prompt_ids)
        assert 0 <= last.usage.cached_tokens < len(request.prompt_ids)
        assert sum(last.usage.fetched_tokens.values()) <= last.usage.cached_tokens
        found = last.usage.cached_tokens + last.usage.prefilled_tokens
        assert found < len(request.prompt_ids)
        assert last.usage.completion_tokens == len(got)
        assert all(output.finish_reason is None for output in outputs[:-1])
        if request.sampling.logprobs is not None:
            logprobs = [one for output in outputs for one in output.logprobs]
            assert logprobs == [TokenLogprobs(t, -i) for i, t in enumerate(got)]
        self._check_prompt_logprobs(request, outputs)

    def _check_prompt_logprobs(self, request: GenerateRequest, outputs: list[Output]) -> None:
        places = [
            TokenLogprobs(token, -i)
            for i, token in enumerate(request.prompt_ids)
            if i and request.sampling.prompt_logprobs is not None
        ]
        first, *others = outputs
        assert not any(output.prompt_logprobs for output in others)
        if first.token_ids:
            assert list(first.prompt_logprobs) == places
        else:
            assert first.finish_reason is FinishReason.CANCELLED


LIMITS = Limits(max_batch=3, token_budget=8, chunk=4, max_steps=1, max_queue=100, max_context=32)


def server(num_pages: int = 100, page_size: int = 4, lateness: int = 1, **limits: float) -> Server:
    """Without the prefix cache: many of the prompts are alike."""
    changed = replace(LIMITS, **limits)  # type: ignore
    return Server(changed, num_pages, page_size, lateness, prefix_caching=False)


def request(
    request_id: str, num_prompt: int = 4, priority: int = 0, **sampling: object
) -> GenerateRequest:
    prompt = tuple((len(request_id) + i) % VOCAB for i in range(num_prompt))
    params = SamplingParams(**{"ignore_eos": True, **sampling})  # type: ignore
    return GenerateRequest(request_id, prompt, params, priority=priority)


@dataclass(frozen=True)
class Scenario:
    limits: Limits
    num_pages: int
    page_size: int
    lateness: int
    prefix_caching: bool
    tiers: tuple[int, int] | None
    """How many pages a step may save, and how late they arrive."""
    prefiller: tuple[int, int] | None
    """How late pages arrive from there, and how many at the end don't."""
    receivers: dict[str, tuple[int, int, int]]
    """By request: from which page on its prompt is sent, how many at once, until when."""
    arrivals: dict[int, list[GenerateRequest]]
    """By step."""
    aborts: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """By step: which of the requests under way, and whether after it is planned."""


@st.composite
def requests(draw: st.DrawFn, request_id: str) -> GenerateRequest:
    max_tokens = draw(st.none() | st.integers(1, 14))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens or 5, 5))),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=2))),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.none() | st.just(0)),
        prompt_logprobs=draw(st.none() | st.just(0)),
    )
    shared = COMMON[: draw(st.sampled_from([0, 0, 3, 7, 8, 12, 12]))]
    own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=not shared, max_size=14 - len(shared)))
    return GenerateRequest(
        request_id,
        (*shared, *own),
        sampling,
        tenant=draw(st.sampled_from(["", "", "", "other"])),
        cache_salt=draw(st.sampled_from(["", "", "", "salt"])),
        priority=draw(st.sampled_from([0, 0, 1])),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Mostly with memory for the largest request and little more, so that there is preemption."""
    max_batch = draw(st.integers(1, 4))
    limits = Limits(
        max_batch=max_batch,
        token_budget=max_batch + draw(st.integers(1, 12)),
        chunk=draw(st.integers(1, 6)),
        max_steps=draw(st.sampled_from([1, 4])),
        max_queue=draw(st.sampled_from([2, 100])),
        max_context=draw(st.sampled_from([9, 24])),
        max_slowdown=draw(st.sampled_from([math.inf, math.inf, 1.5])),
        token_cost=TokenCost(draw(st.sampled_from([(), ((math.inf, 0.5),)]))),
    )
    arrivals: dict[int, list[GenerateRequest]] = defaultdict(list)
    for i in range(draw(st.integers(2, 10))):
        arrivals[draw(st.sampled_from([0, 0, 1, 2, 3, 9, 15, 19]))].append(draw(requests(f"r{i}")))
    abort = st.tuples(st.integers(0, 7), st.booleans())
    receiver = st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from([4, 9, 10_000]))
    page_size = draw(st.integers(1, 4))
    every = list(itertools.chain(*arrivals.values()))
    largest = max(len(one.prompt_ids) + (one.sampling.max_tokens or 1) for one in every)
    num_pages = 1 - (-min(largest, limits.max_context) // page_size) + draw(st.integers(-1, 5))
    return Scenario(
        limits,
        num_pages=max(2, num_pages),
        page_size=page_size,
        lateness=draw(st.sampled_from([0, 1, 1, 2])),
        prefix_caching=draw(st.sampled_from([True, True, False])),
        tiers=draw(st.none() | st.tuples(st.integers(1, 9), st.integers(0, 3))),
        prefiller=draw(st.none() | st.tuples(st.integers(0, 6), st.integers(0, 2))),
        receivers={one.request_id: draw(receiver) for one in every if draw(st.booleans())},
        arrivals=arrivals,
        aborts=draw(st.dictionaries(st.integers(0, 20), abort, max_size=3)),
    )


@settings(max_examples=300)
@given(scenarios())
def test_every_request_is_given_what_it_would_be_given_alone(scenario):
    some = Server(
        scenario.limits,
        scenario.num_pages,
        scenario.page_size,
        scenario.lateness,
        scenario.prefix_caching,
        FakeTiers(*scenario.tiers) if scenario.tiers else None,
        FakePrefiller(*scenario.prefiller, scenario.page_size) if scenario.prefiller else None,
    )
    for now in range(22):
        for one in scenario.arrivals.get(now, []):
            sent = scenario.receivers.get(one.request_id)
            some.add(one, FakeReceiver(one, scenario.page_size, *sent) if sent else None)
        which, planned = scenario.aborts.get(now, (0, False))
        live = sorted(some.live) if now in scenario.aborts else []
        victim = live[which % len(live)] if live else None
        if victim is not None and not planned:
            some.abort(victim)
        some.step(abort_planned=victim if planned else None)
    # Nobody starves: the first in order is given a token a step, or waits for results; what was
    # preempted is computed again. Half of this was never reached in thousands of histories.
    total = sum(len(one.prompt_ids) + 12 for one in some.requests.values())
    if scenario.prefiller:
        total *= 2  # a page that another computes comes a step after the last
    some.finish(max_steps=22 + total * (1 + scenario.lateness))
    for name in some.requests:
        some.check_answer(name)
    assert some.pool.num_free == some.pool.num_usable
    for receiver, sending in some.receivers:
        ended = some.outputs[receiver.request.request_id][-1].finish_reason
        if ended is not FinishReason.CANCELLED and some.num_steps < receiver.leaves_at:
            assert len(receiver.images) == sending.last - sending.first


@pytest.mark.parametrize("lateness", [0, 1, 2])
def test_preempted_request_reports_each_prompt_logprob_once(lateness):
    """Preempted between two of its prefill rows, after the last, and after its first token."""
    phases: set[str] = set()
    for num_pages in range(21, 32):
        some = server(num_pages, page_size=1, lateness=lateness, token_budget=6, chunk=2)
        some.add(request("a", 4, max_tokens=16))
        some.add(request("b", 14, max_tokens=4, prompt_logprobs=0))
        for _ in range(60):
            before = some.scheduler.num_preemptions
            second = some.scheduler.running[1] if len(some.scheduler.running) > 1 else None
            was = second and (second.prefilling, second.first_token_s is None)
            some.step()
            if was and some.scheduler.num_preemptions > before:
                phases.add("prefill" if was[0] else "first token" if was[1] else "decode")
        some.finish()
        some.check_answer("a")
        some.check_answer("b")
    assert "decode" in phases
    assert phases >= ({"prefill", "first token"} if lateness else set())


def prefilled(plan: StepPlan) -> list[tuple[str, int]]:
    """Whose prompts a step takes in, and how many tokens of each row."""
    return [(row.sequence.request.request_id, row.length) for row in plan.chunks]


def test_short_prompts_take_turns_with_a_long_one():
    some = server(token_budget=9, chunk=4, max_context=64)
    some.add(request("long", 40, max_tokens=1))
    assert prefilled(some.step()) == [("long", 4), ("long", 4)]
    some.add(request("short", 10, max_tokens=1))
    assert prefilled(some.step()) == [("short", 4), ("long", 4)]
    assert prefilled(some.step()) == [("short", 4), ("long", 4)]
    assert prefilled(some.step()) == [("short", 2), ("long", 4)]
    some.finish()
    some.check_answer("long")
    some.check_answer("short")


def test_prompts_of_one_length_are_served_in_turn():
    some = server(token_budget=9, chunk=4)
    for name in "abc":
        some.add(request(name, 12, max_tokens=1))
    order = [name for _ in range(5) for name, _ in prefilled(some.step())]
    assert order == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_a_long_prompt_is_not_starved_by_short_ones():
    some = server(token_budget=5, chunk=4, max_context=64)
    some.add(request("long", 40, max_tokens=1))
    some.step()
    steps = itertools.count(1)
    while "long" in some.live:
        some.add(request(f"short {next(steps)}", 4, max_tokens=1))
        some.step()
    assert next(steps) <= 2 * 40 / 4 + 3


def test_prompts_beside_decode_are_paced_and_alone_are_not():
    limits = {"token_budget": 20, "chunk": 16, "max_context": 64, "max_slowdown": 2.0}
    some = server(**limits)
    some.add(request("long", 60, max_tokens=1))
    assert prefilled(some.step()) == [("long", 16)]
    some = server(**limits)
    some.add(request("decodes", 4, max_tokens=60))
    some.step()
    some.add(request("long", 60, max_tokens=1))
    assert not some.step().chunks, "decode alone is timed first"
    *lengths, _ = (length for _ in range(9) for _, length in prefilled(some.step()))
    assert lengths == sorted(lengths), "more, since on this device prompts take no time"
    assert set(lengths) == {4, 16}


class TimedServer(Server):
    """One whose steps take as long as their rows say."""

    def __init__(self, **limits: float) -> None:
        cost = TokenCost(((math.inf, 0.01),))
        limits = {
            "max_batch": 16,
            "max_context": 5000,
            "token_budget": 64,
            "chunk": 32,
            "max_slowdown": 3.0,
        } | limits
        super().__init__(replace(LIMITS, token_cost=cost, **limits), 5000, 4)  # type: ignore

    def step(self, abort_planned: str | None = None) -> StepPlan:
        plan = self.scheduler.schedule(self.num_steps)
        results = self.device.run(plan)
        cost = sum(row.length * self.limits.token_cost.at(row.start) for row in plan.chunks)
        self.num_steps += 0.01 + 0.0002 * cost  # in seconds, here
        self._take(self.scheduler.commit(plan, results, self.num_steps))
        return plan

    def add_streams(self) -> None:
        for i in range(3):
            self.add(request(f"stream {i}", 4, max_tokens=2000))
        for _ in range(20):
            self.step()


@pytest.mark.parametrize("num_short", [20, 40, 200])
def test_beside_streams_neither_long_nor_short_prompts_starve(num_short):
    some = TimedServer()
    some.add_streams()
    some.add(request("long", 1000, max_tokens=1))
    for i in range(300):
        if not any(name.startswith("short") for name in some.live):
            some.add(request(f"short {i}", num_short, max_tokens=1))
        some.step()
    shorts = [name for name in some.requests if name.startswith("short")]
    assert "long" not in some.live
    assert len(shorts) > 10
    assert max(some.timings(name).first_token_s for name in set(shorts) - some.live) < 2.0


def test_many_short_prompts_beside_streams_share_steps():
    some = TimedServer()
    some.add_streams()
    for i in range(8):
        some.add(request(f"short {i}", 8, max_tokens=1))
    steps = itertools.takewhile(lambda _: "short 7" in some.live, iter(some.step, None))
    assert len(list(steps)) <= 6


def test_a_short_prompt_does_not_wait_for_a_second_long_one():
    some = TimedServer()
    some.add_streams()
    some.add(request("long", 3000, max_tokens=1))
    some.add(request("longer", 3500, max_tokens=1))
    some.add(request("short", 40, max_tokens=1))
    for _ in range(30):
        some.step()
    assert some.live >= {"long", "longer"}
    assert "short" not in some.live


def test_a_loop_that_ended_early_is_timed_by_the_tokens_it_gave():
    some = TimedServer(max_steps=4)
    for i in range(6):
        some.add(request(f"stream {i}", 4, max_tokens=2))
        some.finish()
    (decode_s,) = some.scheduler._pace._decode_s.values()
    assert min(decode_s) == pytest.approx(0.01 / 1)


def test_decode_rows_come_first_and_prefill_takes_what_is_left_of_the_budget():
    some = server(token_budget=8, chunk=4)
    some.add(request("a", 4, max_tokens=20))
    some.add(request("b", 4, max_tokens=20))
    some.step()
    some.add(request("c", 20, max_tokens=1))
    plan = some.step()
    assert [row.sequence.request.request_id for row in plan.decode] == ["a", "b"]
    assert [(row.start, row.length) for row in plan.chunks] == [(0, 4), (4, 2)]


def test_prefill_takes_no_more_rows_than_were_compiled():
    some = server(token_budget=8, chunk=4)
    for name in "abc":
        some.add(request(name, 1, max_tokens=1))
    assert [len(some.step().chunks) for _ in range(2)] == [2, 1]


def test_long_prompt_does_not_hold_up_decode():
    some = server(token_budget=5, chunk=4, max_context=64)
    some.add(request("a", 4, max_tokens=30))
    some.step()
    some.add(request("b", 40, max_tokens=1))
    plans = [some.step() for _ in range(8)]
    assert all(len(plan.decode) == 1 for plan in plans)
    assert sum(row.length for plan in plans for row in plan.chunks) == 32


def test_lower_priority_number_is_admitted_first_and_equals_by_arrival():
    some = server(max_batch=1, token_budget=4)
    for name, priority in (("a", 0), ("b", 2), ("c", 1), ("d", 1), ("e", -1)):
        some.add(request(name, 2, priority=priority, max_tokens=2))
    some.finish()
    assert list(some.outputs) == ["e", "a", "c", "d", "b"]


def test_preemption_takes_the_latest_and_its_answer_is_the_same():
    # 15 pages of 2 tokens, of which the three would fill 24.
    some = server(num_pages=16, page_size=2)
    for name in "abc":
        some.add(request(name, 4, max_tokens=12))
    preempted: list[str] = []
    for _ in range(60):
        before = list(some.scheduler.running)
        some.step()
        gone = [one for one in before if one not in some.scheduler.running and not one.finished]
        preempted += [one.request.request_id for one in gone]
    assert preempted[0] == "c"
    assert "a" not in preempted
    for name in "abc":
        some.check_answer(name)
    assert some.timings("a").num_preemptions == 0
    assert some.timings("c").num_preemptions == preempted.count("c")


@pytest.mark.parametrize(("num_pages", "admitted"), [(5, ["a"]), (6, ["a", "b"])])
def test_admission_leaves_a_page_to_each_that_runs(num_pages, admitted):
    """Otherwise a request would be admitted only to be preempted at the next page."""
    some = server(num_pages, page_size=4)
    some.add(request("a", 4, max_tokens=12))
    some.add(request("b", 4, max_tokens=1))
    assert [one.request.request_id for one in some.step().admitted] == admitted


def test_higher_priority_that_came_later_is_not_preempted_for_a_lower_one():
    some = server(num_pages=11, page_size=2)
    some.add(request("low", 4, priority=1, max_tokens=12))
    some.step()
    some.add(request("high", 4, priority=0, max_tokens=12))
    some.finish()
    assert some.timings("high").num_preemptions == 0
    assert some.timings("low").num_preemptions > 0
    some.check_answer("low")


@pytest.mark.parametrize("lateness", [0, 1, 2])
@pytest.mark.parametrize("max_steps", [1, 4])
def test_request_fills_the_context_exactly(lateness, max_steps):
    some = server(lateness=lateness, max_steps=max_steps, max_context=30)
    some.add(request("open", 7))
    some.add(request("beyond", 7, max_tokens=100))
    some.add(request("last", 29))
    some.finish()
    assert [len(some.tokens(name)) for name in ("open", "beyond", "last")] == [23, 23, 1]
    assert {got[-1].finish_reason for got in some.outputs.values()} == {FinishReason.LENGTH}


def test_request_without_max_tokens_fills_the_memory_when_that_is_less():
    some = server(num_pages=6, page_size=4, max_context=32)
    some.add(request("a", 4))
    some.finish()
    assert len(some.tokens("a")) == 16


def test_decode_goes_many_steps_only_when_nobody_waits():
    some = server(max_batch=1, token_budget=4, max_steps=4)
    some.add(request("a", 2, max_tokens=9))
    some.add(request("b", 2, max_tokens=3))
    nums = [some.step().num_tokens for _ in range(14)]
    assert nums[:9] == [1] * 9
    assert max(nums) == 2  # b's two tokens after its first
    some.check_answer("b")


def test_decode_goes_one_step_when_pages_do_not_suffice_for_many():
    some = server(num_pages=8, page_size=2, max_steps=8, max_batch=2)
    some.add(request("a", 2, max_tokens=12))
    some.add(request("b", 2, max_tokens=12))
    some.step()
    assert some.step().num_tokens == 1
    assert some.scheduler.num_preemptions == 0
    some.finish()
    some.check_answer("a")
    some.check_answer("b")


def test_row_that_may_be_given_less_than_the_others_advances_less():
    some = server(max_steps=8, lateness=0)
    some.add(request("a", 2, max_tokens=9))
    some.add(request("b", 2, max_tokens=3))
    some.step()
    plan = some.step()
    assert plan.num_tokens == 8
    assert [row.num_tokens for row in plan.decode] == [8, 2]
    some.finish()
    some.check_answer("b")


def test_abort_frees_slot_and_pages_before_the_next_step():
    some = server(num_pages=6, page_size=4, max_batch=1)
    some.add(request("a", 16, max_tokens=4))
    some.step()
    some.add(request("b", 16, max_tokens=4))
    assert not some.step().admitted
    some.abort("a")
    assert [one.request.request_id for one in some.step().admitted] == ["b"]
    some.finish()
    some.check_answer("b")


def test_aborting_nobody_gives_nothing():
    assert server().scheduler.abort("ghost", 0.0) is None


def test_request_id_is_free_again_after_its_end_even_with_its_step_under_way():
    some = server(lateness=2)
    first = request("a", 6, max_tokens=8)
    some.add(first)
    some.step()
    with pytest.raises(DuplicateRequest, match="request 'a' is being served; choose another"):
        some.scheduler.add(first, 1, 0.0)
    some.abort("a")
    del some.outputs["a"]
    some.add(request("a", 9, max_tokens=5))
    some.finish()
    some.check_answer("a")


def test_queue_is_bounded_and_says_so():
    some = server(max_queue=3)
    for i in range(3):
        assert some.add(request(f"r{i}", max_tokens=1))
    with pytest.raises(Overloaded, match=r"holds 3 requests, schedule.max_queue allows 3; try"):
        some.scheduler.add(request("r3"), 1, 0.0)
    some.step()
    assert some.add(request("r4", max_tokens=1))


def test_running_requests_do_not_count_as_queued():
    some = server(max_queue=1, max_batch=3)
    for name in "abc":
        assert some.add(request(name, 1, max_tokens=30))
        some.step()
    assert some.add(request("d"))
    assert not some.add(request("e"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request("r", 0), "the prompt is empty; send at least one token"),
        (request("r", 32), "prompt has 32 tokens; the context of 32 leaves room for 31 and one"),
        (
            request("r", 20, max_tokens=5),
            r"request 'r' needs 7 pages for 25 tokens, the cache has 6 in all; "
            r"lower max_tokens, shorten the prompt or raise cache.pages",
        ),
        (request("r", 24), "needs 7 pages for 25 tokens, the cache has 6 in all"),
    ],
)
def test_request_that_can_never_be_served_is_refused_with_what_to_change(asked, message):
    some = server(num_pages=7, page_size=4)
    with pytest.raises(InvalidRequest, match=message):
        some.scheduler.add(asked, 1, 0.0)
    assert not some.scheduler.has_work


def test_request_that_just_fits_is_served():
    some = server(num_pages=7, page_size=4)
    some.add(request("a", 20, max_tokens=4))
    some.add(request("b", 23))
    some.finish()
    some.check_answer("a")
    some.check_answer("b")


def test_more_end_ids_than_the_step_has_room_for_are_refused():
    tables = PageTables(PagePool(10, 4), 4, 8)
    scheduler = Scheduler(LIMITS, tables, eos_ids=frozenset(range(12)))
    stop = tuple(range(20, 28))
    with pytest.raises(InvalidRequest, match="are 20 together; at most 16 are possible"):
        scheduler.add(request("r", stop_token_ids=stop, ignore_eos=False), 1, 0.0)
    scheduler.add(request("r", stop_token_ids=stop), 1, 0.0)


def test_token_budget_that_a_full_batch_uses_up_is_refused():
    with pytest.raises(ValueError, match=r"token_budget is 3.* raise token_budget above max_batch"):
        replace(LIMITS, token_budget=3)


def test_request_is_given_its_own_seed_or_the_engines():
    some = server()
    some.scheduler.add(request("a", seed=5), seed=1, now_s=0.0)
    some.scheduler.add(request("b"), seed=1, now_s=0.0)
    assert [one.seed for one in some.scheduler.schedule(0.0).admitted] == [5, 1]


def test_times_are_counted_from_arrival():
    some = server(max_batch=1, token_budget=8)
    some.add(request("a", 8, max_tokens=3))
    some.add(request("b", 8, max_tokens=2))
    some.finish()
    times = [some.timings(name) for name in "ab"]
    # Each result is read in the step after its own; b waits until a's last has been read.
    assert [one.scheduled_s for one in times] == [0, 4]
    assert [one.first_token_s for one in times] == [1, 5]
    assert [one.finished_s for one in times] == [3, 6]


def test_pages_for_receivers_lie_on_the_device_twice_no_more_than_it_has_room_for():
    limits = replace(LIMITS, max_context=128, token_budget=130, chunk=64)
    some = Server(limits, num_pages=300, page_size=1)
    some.device.run = lambda plan: FakeDevice.run(some.device, replace(plan, sends=[]))
    waiting: list[Send] = []
    for name in ("a", "bb"):
        asked = request(name, 60, max_tokens=2)
        some.add(asked, FakeReceiver(asked, 1, 0, 1_000, 10_000))
    for _ in range(4):
        waiting += some.step().sends
    assert len(waiting) == MOST_SENT
    for send in waiting:
        send.sending.num_delivered += 1
    assert len(some.step().sends) == 2 * 60 - MOST_SENT
