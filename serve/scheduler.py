"""Who is served when: admission, chunked prefill beside decode, preemption, endings.

Plain Python on integers: it takes the time as an argument and knows neither devices nor text, so
the same code runs in the server, the tests and the simulator.
"""

import math
from collections.abc import Sequence as ListLike
from dataclasses import replace
from typing import Any, NamedTuple

from cache.keys import PageNames, root_key
from cache.tables import PageTables
from cache.transfers.sending import Sending
from serve.errors import DuplicateRequest, InvalidRequest, Overloaded
from serve.limits import Limits
from serve.pace import Pace
from serve.plan import Row, Sequence, StepPlan
from serve.prefixes import MOST_LANDED, Prefiller, Prefixes, Tiers
from serve.request import (
    MAX_STOP_IDS,
    FinishReason,
    GenerateRequest,
    Output,
    Timings,
    TokenLogprobs,
    Usage,
)
from serve.sends import Sends
from serve.waiting import WaitingQueue, precedence


class RowResult(NamedTuple):
    """What a step chose for one row."""

    token_ids: ListLike[int]
    logprobs: ListLike[TokenLogprobs] = ()
    prompt_logprobs: ListLike[TokenLogprobs] = ()


class Scheduler:
    """Sequences waiting and running, and the pages and slots they hold."""

    def __init__(
        self,
        limits: Limits,
        tables: PageTables,
        eos_ids: frozenset[int],
        prefix_caching: bool = True,
        tiers: Tiers | None = None,
        prefiller: Prefiller | None = None,
    ) -> None:
        self.limits = limits
        self.prefix_caching = prefix_caching
        self.tables = tables
        self.eos_ids = eos_ids
        self.running: list[Sequence] = []
        """In order of precedence: the last is the first to be preempted."""
        self.num_preemptions = 0
        self.prefixes = Prefixes(tables, tiers, prefiller)
        self.sends = Sends(tables)
        self._waiting = WaitingQueue()
        self._by_id: dict[str, Sequence] = {}
        self._free_slots = list(range(limits.max_batch - 1, -1, -1))
        self._num_arrived = 0
        self._pace = Pace(limits.max_slowdown)
        self._is_shorts_turn = True
        self._committed_s = -math.inf

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._by_id) or self.prefixes.has_unsaved or self.sends.has_work

    def add(
        self,
        request: GenerateRequest,
        seed: int,
        now_s: float,
        names: PageNames | None = None,
        sending: Sending | None = None,
    ) -> None:
        """Queues a request; `seed` serves where it names none. With the `names` of its pages it
        shares them with others; `sending` is given its prompt's pages as they are computed.

        Raises DuplicateRequest, Overloaded, or InvalidRequest when it could never be served.
        """
        if request.request_id in self._by_id:
            raise DuplicateRequest(
                f"request {request.request_id!r} is being served; choose another request_id"
            )
        max_length = self._max_length(request)
        if self.num_waiting >= self.limits.max_queue:
            raise Overloaded(
                f"the queue holds {self.num_waiting} requests, schedule.max_queue allows "
                f"{self.limits.max_queue}; try again later"
            )
        sampling = request.sampling
        end_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            end_ids |= self.eos_ids
        if len(end_ids) > MAX_STOP_IDS:
            raise InvalidRequest(
                f"stop_token_ids and the model's end ids are {len(end_ids)} together; "
                f"at most {MAX_STOP_IDS} are possible"
            )
        self._num_arrived += 1
        sequence = Sequence(
            request=request,
            order=self._num_arrived,
            arrival_s=now_s,
            max_length=max_length,
            end_ids=end_ids,
            seed=seed if sampling.seed is None else sampling.seed,
            tokens=list(request.prompt_ids),
            num_prompt=len(request.prompt_ids),
            names=names,
            sending=sending,
        )
        self._by_id[request.request_id] = sequence
        self._waiting.push(sequence)

    def names_of(self, request: GenerateRequest) -> PageNames | None:
        """The names of the prompt's pages, with which to add it; None if prefixes are not cached.

        It may be called from any thread: of a long prompt it takes milliseconds.
        """
        if not self.prefix_caching:
            return None
        root = root_key(request.tenant, request.cache_salt)
        names = PageNames(root, self.tables.pool.page_size)
        names.extend(request.prompt_ids)
        return names

    def _max_length(self, request: GenerateRequest) -> int:
        """Tokens, prompt included, at which the request ends; refuses what can never fit."""
        num_prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if not num_prompt:
            raise InvalidRequest("the prompt is empty; send at least one token")
        if num_prompt >= self.limits.max_context:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; the context of {self.limits.max_context} "
                f"leaves room for {self.limits.max_context - 1} and one to generate"
            )
        pool = self.tables.pool
        held = min(self.limits.max_context, pool.num_usable * pool.page_size)
        needed = min(num_prompt + (wanted or 1), self.limits.max_context)
        if needed > held:
            raise InvalidRequest(
                f"request {request.request_id!r} needs {pool.pages_for(needed)} pages for "
                f"{needed} tokens, the cache has {pool.num_usable} in all; lower max_tokens, "
                "shorten the prompt or raise cache.pages"
            )
        return held if wanted is None else needed

    def abort(self, request_id: str, now_s: float) -> Output | None:
        """Ends a request at once; None when there is no such request."""
        sequence = self._by_id.get(request_id)
        return sequence and self._finish(sequence, FinishReason.CANCELLED, (), now_s)

    def schedule(self, now_s: float) -> StepPlan:
        """The next step: every decodable row, then prefill as far as budget and pace allow."""
        saves, sends = self.prefixes.begin_plan(), self.sends.begin_plan(self.running)
        # Before it is known how long the step is: whose last page lands may have a row in it.
        landings: list[tuple[int, Any]] = []
        for sequence in self._fetching:
            if len(landings) < MOST_LANDED:
                landings += self.prefixes.land(sequence, MOST_LANDED - len(landings))
        decode, num_tokens = self._plan_decode()
        plan = StepPlan(
            decode,
            num_tokens=num_tokens,
            saves=saves,
            sends=sends,
            landings=landings,
            planned_s=now_s,
        )
        if self._waiting or self._first_prefilling():
            plan = self._with_prefill(plan)
        self.prefixes.end_plan()
        self.sends.end_plan()
        return plan

    def _with_prefill(self, plan: StepPlan) -> StepPlan:
        """The plan with rows of prompts, and who was admitted for them.

        The rows have `chunk` tokens or less, or there is a single narrow one.
        """
        limits, num_decode = self.limits, len(plan.decode)
        rows, admitted, copies, total = plan.chunks, plan.admitted, plan.copies, 0.0
        allowed = self._pace.allowed(num_decode, limits.max_batch)
        budget = min(limits.token_budget - num_decode, limits.max_chunk_rows * limits.chunk)
        while allowed > 0 and budget > 0 and len(rows) < limits.max_chunk_rows:
            sequence, is_contested = self._next_prefill()
            if sequence is None:
                break
            cost = limits.token_cost.at(self._next_position(sequence))
            fitting = (width for width in limits.widths if width * cost <= allowed)
            width = next(fitting, limits.widths[-1])
            if rows and (width < limits.chunk or width * cost > allowed):
                break
            if is_contested:
                self._is_shorts_turn = not self._is_shorts_turn
            if sequence.slot is None:
                copies += self._admit(sequence, plan.planned_s)
                admitted.append(sequence)
                if sequence.fetch is not None:
                    continue
            rows.append(self._prefill_row(sequence, min(width, budget)))
            total += width * cost
            if width < limits.chunk:
                break
            budget -= rows[-1].length
            allowed -= width * cost
        return replace(plan, prompt_cost=total)

    def _plan_decode(self) -> tuple[list[Row], int]:
        """Decode rows with their pages, preempting the latest arrivals where pages run out."""
        num_tokens = self._num_tokens()
        rows: list[Row] = []
        for sequence in list(self.running):
            slot, remaining = sequence.slot, sequence.remaining
            if slot is None or remaining <= 0 or sequence.prefilling:
                continue
            advance = min(num_tokens, remaining)
            start = sequence.num_computed
            end = start + advance
            if end > self.tables.capacity(slot) and not self._make_room(sequence, end):
                continue
            num_output = sequence.num_output
            rows.append(Row(sequence, slot, start, 1, num_output, remaining, advance))
            sequence.num_computed = end
            sequence.num_in_flight += advance
        return rows, num_tokens

    def _num_tokens(self) -> int:
        """How far decode rows go in one call: far when nobody waits and pages suffice, else one."""
        if self.limits.max_steps == 1 or self._waiting.first or self._first_prefilling():
            return 1
        if any(sequence.fetch.is_near for sequence in self._fetching if sequence.fetch):
            return 1
        decodable = [s for s in self.running if s.remaining > 0]
        steps = max((min(self.limits.max_steps, s.remaining) for s in decodable), default=1)
        missing = sum(
            self.tables.missing(s.slot, s.num_computed + min(steps, s.remaining))
            for s in decodable
            if s.slot is not None
        )
        return steps if missing <= self.tables.pool.num_free else 1

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens of a running sequence; False if it was preempted itself."""
        assert sequence.slot is not None, "a sequence without a slot holds no pages"
        while self.tables.missing(sequence.slot, num_tokens) > self.tables.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.tables.grow(sequence.slot, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the pages and the slot back; its tokens are computed again later."""
        self.prefixes.end(sequence)
        self._leave(sequence)
        sequence.num_computed = sequence.prefill_end = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.push(sequence)

    def _next_prefill(self) -> tuple[Sequence | None, bool]:
        """Whose prompt gets the next row, and whether another's might have.

        The first in precedence and the shortest of the others, if that is shorter, take turns: so a
        long prompt doesn't hold up short ones, nor they it by more than as much again.
        """
        first = self._first_prefilling()
        if first is None:
            waiting = self._waiting.first
            return (waiting if waiting and self._has_room(waiting) else None), False
        others = [s for s in self.running if s.can_prefill and s is not first]
        # A long queue is looked through only where one of it could be admitted.
        waiting = self._waiting.shortest if self._free_slots else None
        if waiting is not None and self._has_room(waiting):
            others.append(waiting)
        shortest = min(others, key=lambda other: other.num_left, default=first)
        if shortest.num_left >= first.num_left:
            return first, False
        return (shortest if self._is_shorts_turn else first), True

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a sequence that waits can be admitted."""
        # The results of steps planned before a preemption must arrive before it is planned again.
        if not self._free_slots or sequence.num_in_flight:
            return False
        # Each running sequence may soon want a page: admission leaves it one.
        needed = self.prefixes.num_taken(sequence) + len(self.running)
        return needed <= self.tables.pool.num_free

    def _next_position(self, sequence: Sequence) -> int:
        """Where a prompt's next row begins."""
        if sequence.slot is None:
            return self.prefixes.num_cached(sequence)
        self.prefixes.catch_up(sequence)
        return sequence.num_computed

    def _admit(self, sequence: Sequence, now_s: float) -> list[tuple[int, int]]:
        """Lets a sequence run; returns the pages to copy for it."""
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.prefill_end = len(sequence.tokens)
        copies = self.prefixes.admit(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = now_s
        self.running.append(sequence)
        self.running.sort(key=precedence)
        return copies

    def _prefill_row(self, sequence: Sequence, width: int) -> Row:
        """The next tokens of a prompt, at most `width`."""
        assert sequence.slot is not None, "a row needs a slot"
        start = sequence.num_computed
        stop = min(start + width, sequence.prefill_end)
        # From a page's start on, a prompt finds what others have computed meanwhile.
        aligned = stop - stop % self.tables.pool.page_size
        if start < aligned and stop < sequence.prefill_end:
            stop = aligned
        num_tokens = int(stop == sequence.prefill_end)
        targets: list[int] = []
        if sequence.request.sampling.prompt_logprobs is not None and not sequence.prompt_reported:
            targets = sequence.tokens[start + 1 : min(stop + 1, sequence.num_prompt)]
        row = Row(
            sequence=sequence,
            slot=sequence.slot,
            start=start,
            length=stop - start,
            num_output=sequence.num_output,
            remaining=sequence.remaining,
            num_tokens=num_tokens,
            token_ids=tuple(sequence.tokens[start:stop]),
            targets=tuple(targets),
        )
        sequence.num_computed = stop
        sequence.num_in_flight = num_tokens
        self.prefixes.name_planned(sequence, stop)
        return row

    def commit(self, plan: StepPlan, results: ListLike[RowResult], now_s: float) -> list[Output]:
        """Takes in a step's tokens: what each request is given, and which requests end."""
        taken = [
            self._commit_row(row, result, now_s)
            for row, result in zip(plan.rows, results, strict=True)
            if not row.sequence.finished
        ]
        outputs = [output for output in taken if output is not None]
        # A step begins when it is planned or, if that was still under way, when the last one ended.
        seconds = now_s - max(self._committed_s, plan.planned_s)
        self._committed_s = now_s
        # A loop ends with the last of its rows.
        num_tokens = max((len(output.token_ids) for output in outputs), default=0)
        # A few tokens of a prompt alone take a step, too, and say nothing of prompts.
        is_prompt = sum(row.length for row in plan.chunks) >= self.limits.chunk
        if num_tokens if plan.decode else is_prompt:
            self._pace.observe(len(plan.decode), num_tokens, plan.prompt_cost, seconds)
        if plan.decode or is_prompt:
            self.prefixes.observe(plan.prompt_cost, seconds)
        return outputs

    def _commit_row(self, row: Row, result: RowResult, now_s: float) -> Output | None:
        sequence = row.sequence
        if row.targets:
            # A preempted prompt is computed anew, and rows from before may still come in.
            sequence.prompt_logprobs[row.start :] = result.prompt_logprobs
        if not row.num_tokens:
            return None
        sequence.num_in_flight -= row.num_tokens
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        taken, reason = 0, None
        while reason is None and taken < row.num_tokens:
            token = result.token_ids[taken]
            sequence.tokens.append(token)
            taken += 1
            if token in sequence.end_ids:
                reason = FinishReason.STOP
            elif len(sequence.tokens) >= sequence.max_length:
                reason = FinishReason.LENGTH
        token_ids, logprobs = tuple(result.token_ids[:taken]), tuple(result.logprobs[:taken])
        if reason is not None:
            return self._finish(sequence, reason, token_ids, now_s, logprobs)
        self.prefixes.name_computed(sequence)
        return Output(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=sequence.take_prompt_logprobs(),
        )

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...],
        now_s: float,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> Output:
        """Ends a request and gives back all it holds."""
        sequence.finished = True
        del self._by_id[sequence.request.request_id]
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self.prefixes.end(sequence)
            self._leave(sequence)
        scheduled_s = now_s if sequence.scheduled_s is None else sequence.scheduled_s
        first_token_s = now_s if sequence.first_token_s is None else sequence.first_token_s
        return Output(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=sequence.take_prompt_logprobs(),
            finish_reason=reason,
            usage=Usage(
                sequence.num_prompt,
                len(sequence.tokens) - sequence.num_prompt,
                sequence.num_cached,
                dict(sequence.fetched),
                sequence.num_sent,
                self._pace.unit_s * self.limits.token_cost.of_first(sequence.num_cached),
            ),
            timings=Timings(
                scheduled_s - sequence.arrival_s,
                first_token_s - sequence.arrival_s,
                now_s - sequence.arrival_s,
                sequence.num_preemptions,
            ),
        )

    def _leave(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages and slot back."""
        assert sequence.slot is not None, "only a running sequence leaves"
        self.sends.leave(sequence)
        self.tables.free(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.num_named = 0
        self.running.remove(sequence)

    def _first_prefilling(self) -> Sequence | None:
        """The first of those that run with prompt left that can be computed now."""
        return next((s for s in self.running if s.can_prefill), None)

    @property
    def _fetching(self) -> list[Sequence]:
        """Those that wait for pages from tiers or other engines."""
        return [s for s in self.running if s.fetch is not None]
