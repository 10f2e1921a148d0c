"""Engines timed in turn on the same jobs, and their tokens compared.

It does not know which engines they are or where they come from (`bench/offline.py`).
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psutil

from bench.peers.protocol import Answer, Job, Ready
from bench.peers.worker import WorkerError
from bench.report import Agreement, Difference, Side, Workload

Tell = Callable[[str], None]
"""Is told, line by line, how far things are."""


class Engine(Protocol):
    """What is needed of a `Worker`."""

    @property
    def name(self) -> str: ...
    @property
    def ready(self) -> Ready: ...
    def ask(self, job: Job) -> Answer: ...
    def cpu_s(self) -> float: ...


Ask = Callable[[Engine, Job], Answer]


@dataclass(frozen=True)
class Task:
    """A workload, the prompts it sends, and how an answer becomes tokens/s."""

    workload: Workload
    num_prompts: int
    prompt_length: int
    num_tokens: int
    rate: Callable[[Job, Answer], float]

    def job(self, vocab_size: int, seed: Sequence[int]) -> Job:
        """Random token ids: the work is the same for all, and any model takes them."""
        shape = (self.num_prompts, self.prompt_length)
        prompts = np.random.default_rng(seed).integers(vocab_size, size=shape)
        return Job(prompts.tolist(), self.num_tokens)


def decode_rate(job: Job, answer: Answer) -> float:
    """Tokens after the first, or the first few that came together; without prefill."""
    return (job.num_tokens - answer.num_first) / (answer.total_s - answer.first_s)


def batch_rate(job: Job, answer: Answer) -> float:
    return len(job.prompts) * job.num_tokens / answer.total_s


def prefill_rate(job: Job, answer: Answer) -> float:
    return sum(map(len, job.prompts)) / answer.first_s


@dataclass(frozen=True)
class Entrant:
    """An engine that has done each task once."""

    engine: Engine
    warmup_s: float


def enter(engine: Engine, tasks: Sequence[Task]) -> Entrant:
    """Do each task once, so that what an engine compiles or allocates late is not timed."""
    started = time.perf_counter()
    for i, task in enumerate(tasks):
        engine.ask(task.job(engine.ready.vocab_size, [i, 0]))
    return Entrant(engine, time.perf_counter() - started)


@dataclass(frozen=True)
class Measurement:
    """The figures of all, and what each peer's tokens have in common with the first's."""

    sides: list[Side]
    agreements: dict[str, Agreement]
    failures: dict[str, str]
    """Peers that died or could not do a job, and what they said; they have no side."""


@dataclass(frozen=True)
class _Round:
    """One job, done by every engine that could, by its name."""

    task: Task
    run: int
    job: Job
    answers: dict[str, Answer]
    other_s: dict[str, float]
    """Processor time that everyone but the engine used while each answer was made."""


class _LeftOut(Exception):
    """A peer has failed, and why has been noted."""


def busy_s() -> float:
    """Time that the cores we may use have been in use since the machine started, by anyone."""
    every = psutil.cpu_times(percpu=True)
    ours = [every[core] for core in os.sched_getaffinity(0)]
    return sum(t.user + t.nice + t.system + t.irq + t.softirq + t.steal for t in ours)


def measure(
    entrants: Sequence[Entrant],
    tasks: Sequence[Task],
    runs: int,
    tell: Tell,
    busy_s: Callable[[], float] = busy_s,
) -> Measurement:
    """Time the engines `runs` times on each task, alternating; the first is compared with the rest.

    Each run has prompts of its own, the same for all, so that no cache of prefixes knows them.
    A peer that fails is left out from then on. Raises WorkerError when the first does.
    """
    ours = entrants[0].engine
    engines = {entrant.engine.name: entrant.engine for entrant in entrants}
    vocab_size = ours.ready.vocab_size
    failures: dict[str, str] = {}
    rounds: list[_Round] = []

    def ask(engine: Engine, job: Job) -> Answer:
        try:
            return engine.ask(job)
        except WorkerError as error:
            if engine is ours:
                raise
            failures[engine.name] = str(error)
            tell(f"{engine.name}: not measured: {error}")
            raise _LeftOut from error

    for i, task in enumerate(tasks):
        for run in range(1, runs + 1):
            job = task.job(vocab_size, [i, run])
            answers: dict[str, Answer] = {}
            other_s: dict[str, float] = {}
            for name, engine in engines.items():
                if name in failures:
                    continue
                other_before_s = busy_s() - engine.cpu_s()
                with suppress(_LeftOut):
                    answers[name] = answer = ask(engine, job)
                    other_s[name] = busy_s() - engine.cpu_s() - other_before_s
                    rate = f"{task.rate(job, answer):,.1f} tokens/s"
                    tell(f"{name}: {task.workload.name}, run {run} of {runs}: {rate}")
            rounds.append(_Round(task, run, job, answers, other_s))
    agreements: dict[str, Agreement] = {}
    for name, engine in engines.items():
        if engine is not ours and name not in failures:
            with suppress(_LeftOut):
                agreements[name] = _agreement(ask, ours, engine, rounds)
    return Measurement(
        sides=[
            _side(entrant, rounds) for entrant in entrants if entrant.engine.name not in failures
        ],
        agreements=agreements,
        failures=failures,
    )


def _side(entrant: Entrant, rounds: Sequence[_Round]) -> Side:
    name, ready = entrant.engine.name, entrant.engine.ready
    samples: dict[str, list[float]] = {}
    for r in rounds:
        rate = r.task.rate(r.job, r.answers[name])
        samples.setdefault(r.task.workload.name, []).append(rate)
    return Side(
        name=name,
        versions=ready.versions,
        settings=ready.settings,
        start_s=ready.start_s,
        warmup_s=entrant.warmup_s,
        other_cores=sum(r.other_s[name] for r in rounds)
        / sum(r.answers[name].total_s for r in rounds),
        samples=samples,
    )


def _agreement(ask: Ask, ours: Engine, peer: Engine, rounds: Sequence[_Round]) -> Agreement:
    num_prompts = num_equal = 0
    differences: dict[str, Difference] = {}
    for r in rounds:
        answers = (r.answers[ours.name], r.answers[peer.name])
        pairs = list(zip(*(answer.token_ids for answer in answers), strict=True))
        different = [i for i, (mine, theirs) in enumerate(pairs) if mine != theirs]
        num_prompts += len(pairs)
        num_equal += len(pairs) - len(different)
        name = r.task.workload.name
        if different and name not in differences:
            first = different[0]
            differences[name] = _difference(ask, ours, peer, r, first, *pairs[first])
    return Agreement(num_prompts, num_equal, list(differences.values()))


def _difference(
    ask: Ask,
    ours: Engine,
    peer: Engine,
    r: _Round,
    prompt: int,
    our_ids: Sequence[int],
    peer_ids: Sequence[int],
) -> Difference:
    """Where two continuations part, and how close a call it was: the job is done again to see."""
    if len(our_ids) != len(peer_ids):
        raise ValueError(
            f"{r.task.workload.name}, run {r.run}, prompt {prompt}: {ours.name} made "
            f"{len(our_ids)} tokens and {peer.name} {len(peer_ids)} of {r.job.num_tokens}; "
            "their figures cannot be compared"
        )
    position = next(i for i, (a, b) in enumerate(zip(our_ids, peer_ids, strict=True)) if a != b)
    again = Job(r.job.prompts, r.job.num_tokens, margins=True)
    our_margin, peer_margin = (
        ask(engine, again).margins[prompt][position] for engine in (ours, peer)
    )
    return Difference(
        workload=r.task.workload.name,
        run=r.run,
        prompt=prompt,
        position=position,
        our_id=our_ids[position],
        peer_id=peer_ids[position],
        our_margin=our_margin,
        peer_margin=peer_margin,
    )
