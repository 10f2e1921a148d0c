"""A prompt of 200,000 tokens beside others' streams: what it takes, and what they notice.

    weft bench long --set schedule.max_slowdown=2

Streams decode on their own first, then while the long prompt is computed. Each begins anew once its
answer is long enough, and the first ones stand at different places of theirs, so that a step's work
for them is the same all the time. It does not know how steps are planned.
"""

import json
import queue
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from bench.measure import Tell
from bench.offline import describe
from bench.random_model import random_model
from bench.report import Machine, this_machine
from model.families import read_model_config
from plan.machine import ROOT
from serve.build import build_engine
from serve.commands.devices import ensure_devices, keep_compiled_programs
from serve.config import ServeConfig, make_config, override_config
from serve.engine import ModelInfo
from serve.errors import RequestError
from serve.fit import Served
from serve.progress import Progress
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams

RANDOM_MODEL = {
    "arch": "llama",
    "hidden": 1024,
    "mlp": 3584,
    "layers": 2,
    "heads": 4,
    "kv-heads": 1,
    "head-dim": 64,
    "vocab": 4096,
    "context": 262_144,
    "dtype": "float32",
    "seed": 0,
}
"""What is timed when no model is named.

Keys and values of 200,000 tokens take 1.9 times the weights' bytes, and the last token's attention
9 times its other work; of Llama 3.1 8B these are 1.7 and 7.5.
"""
LONG, ANSWER = "long", 16
"""Tokens that follow the long prompt."""
BASELINE_S = 30.0
"""How long the streams are timed alone."""
SCHEDULE = ("token_budget", "chunk", "max_slowdown")
"""What of it decides a prompt's pace."""
POLL_S = 0.2
"""Longest without a look at memory."""
PAGE_SIZE = 16


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    num_prompt: int = 200_000
    """Tokens of the long prompt."""
    num_streams: int = 15
    """One less than a power of two, as which the steps' rows are compiled."""
    num_asked: int = 16
    """Tokens of a stream's prompt."""
    num_answered: int = 4000
    """Of its answer."""

    @property
    def longest(self) -> int:
        """Tokens of a request, with its answer."""
        return max(self.num_prompt + ANSWER, self.num_asked + self.num_answered)

    @property
    def num_cached(self) -> int:
        return self.num_prompt + ANSWER + self.num_streams * (self.num_asked + self.num_answered)


@dataclass(frozen=True)
class Gaps:
    """Times between tokens of a stream; of several that came at once each has its share."""

    num: int
    p50_s: float
    p99_s: float
    most_s: float


@dataclass(frozen=True)
class Report:
    model: str
    arguments: list[str]
    """Those of the command that name the model: none for the random one."""
    overrides: list[str]
    machine: Machine
    load: Load
    schedule: dict[str, str]
    alone: Gaps
    beside: Gaps
    prefill_s: float
    """From when the long prompt was sent to its first token."""
    num_steps: int
    """In that time."""
    pool_bytes: int
    growth_bytes: int
    """Of resident memory at its peak, over what it was before, the pool included."""

    @property
    def slowdown(self) -> float:
        return self.beside.p99_s / self.alone.p99_s

    def to_json(self) -> str:
        figures = {"slowdown": self.slowdown, "growth_gib": self.growth_bytes / 2**30}
        return json.dumps(asdict(self) | {"figures": figures}, indent=2)

    def to_markdown(self) -> str:
        alone, beside = self.alone, self.beside
        rows = [
            ("between a stream's tokens", "median", "p99", "most"),
            ("---", "---:", "---:", "---:"),
            ("streams alone", *_milliseconds(alone)),
            ("beside the prompt", *_milliseconds(beside)),
            (
                "ratio",
                f"{beside.p50_s / alone.p50_s:.2f}",
                f"{self.slowdown:.2f}",
                f"{beside.most_s / alone.most_s:.2f}",
            ),
        ]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        load, machine = self.load, self.machine
        asked = [f"--prompt {load.num_prompt}", f"--streams {load.num_streams}"]
        command = " ".join(
            ["weft bench long", *self.arguments, *asked, *(f"--set {o}" for o in self.overrides)]
        )
        lines = [
            f"A prompt of {load.num_prompt:,} tokens; its first token after {self.prefill_s:.1f} s "
            f"({load.num_prompt / self.prefill_s:,.0f} tokens/s) and {self.num_steps:,} steps.",
            f"{load.num_streams} streams of {load.num_asked:,} tokens in, {load.num_answered:,} "
            f"out; {alone.num:,} tokens alone, {beside.num:,} beside the prompt.",
            f"Resident memory grew by {self.growth_bytes / 2**20:.0f} MiB at most, with a pool of "
            f"{self.pool_bytes / 2**20:.0f} MiB.",
            f"{self.model}; {', '.join(f'{k}={v}' for k, v in self.schedule.items())}.",
            f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_gib:.0f} GiB, load before "
            f"{machine.load_before:.1f}; commit {machine.commit}"
            f"{' with changes' if machine.dirty else ''}; `{command}`.",
        ]
        return f"{table}\n\n" + "\n".join(f"- {line}" for line in lines)


def run(
    model: Path | None = None,
    overrides: Sequence[str] = (),
    load: Load = Load(),
    baseline_s: float = BASELINE_S,
    *,
    cache: Path = Path(".cache"),
    tell: Tell = lambda line: None,
) -> Report:
    """Raises RequestError where a request does not fit or ends otherwise than by its length,
    ValueError where there is no model, and what building the engine raises."""
    machine = this_machine(ROOT)
    directory = model or random_model(RANDOM_MODEL, cache, tell)
    config = _config(directory, overrides, load)
    ensure_devices(config.mesh)
    keep_compiled_programs()
    process, before_bytes = psutil.Process(), 0
    engine = build_engine(config, Progress, check=partial(_check, load))
    engine.start()
    clients = _Clients(engine, load)
    profile, peak_bytes = engine.profiles[0], 0

    def prefill_is_over() -> bool:
        nonlocal peak_bytes
        peak_bytes = max(peak_bytes, process.memory_info().rss)
        return clients.long_began_s is not None

    try:
        clients.start()
        clients.watch(lambda: clients.all_decode)
        tell(f"{load.num_streams} streams alone, for {baseline_s:.0f} s")
        ends_s = time.perf_counter() + baseline_s
        alone = clients.watch(lambda: time.perf_counter() >= ends_s)
        before_bytes, before_steps = process.memory_info().rss, profile.num_steps
        tell(f"beside a prompt of {load.num_prompt:,} tokens")
        sent_s = clients.send_long()
        beside = clients.watch(prefill_is_over)
        num_steps = profile.num_steps - before_steps
        clients.watch(lambda: clients.long_ended)
    finally:
        engine.stop()
    assert clients.long_began_s is not None, "it was watched until then"
    return Report(
        model=describe(directory),
        arguments=[] if model is None else [str(model)],
        overrides=list(overrides),
        machine=machine,
        load=load,
        schedule={name: str(getattr(config.schedule, name)) for name in SCHEDULE},
        alone=alone,
        beside=beside,
        prefill_s=clients.long_began_s - sent_s,
        num_steps=num_steps,
        pool_bytes=_pool_bytes(config, engine.info),
        growth_bytes=peak_bytes - before_bytes,
    )


def _config(directory: Path, overrides: Sequence[str], load: Load) -> ServeConfig:
    """With a pool that holds all requests at once, whatever the page."""
    asked: dict[str, Any] = {
        "model": {"path": str(directory.absolute())},
        "schedule": {"max_batch": load.num_streams + 1},
        "cache": {"page_size": PAGE_SIZE},
    }
    asked["cache"]["pages"] = load.num_cached // PAGE_SIZE + 2 * (load.num_streams + 1)
    return override_config(make_config(asked, "weft bench long"), overrides)


def _check(load: Load, info: ModelInfo) -> None:
    """Refuses what the engine would, before weights are read and steps compiled."""
    if load.longest > info.max_context:
        raise RequestError(
            f"a request has up to {load.longest:,} tokens with its answer, and {info.name} has a "
            f"context of {info.max_context:,}; name a model of a longer one, or lower --prompt "
            f"(streams have {load.num_asked + load.num_answered:,})"
        )
    held = info.num_pages * info.page_size
    if load.num_cached > held:
        raise RequestError(
            f"all requests together have {load.num_cached:,} tokens, and the cache holds {held:,}; "
            "lower --prompt or --streams, or leave cache.pages to the bench"
        )


def _pool_bytes(config: ServeConfig, info: ModelInfo) -> int:
    served = Served(config, read_model_config(Path(config.model.path)), jax.default_backend())
    pool = served.pool(info.num_pages)
    return (
        pool.num_pages * pool.page_bytes(served.partition) * config.mesh.stage * config.mesh.tensor
    )


class _Clients:
    """Those who wait for tokens: of the streams, each followed by another, and of the prompt."""

    def __init__(self, engine: Any, load: Load) -> None:
        self._engine, self._load = engine, load
        self._arrivals: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
        self._last_s: dict[str, float] = {}
        """Of each stream that decodes, when its last token came."""
        self._rng = random.Random(0)
        self._num_begun = 0
        self.long_began_s: float | None = None
        self.long_ended = False

    @property
    def all_decode(self) -> bool:
        return len(self._last_s) == self._load.num_streams

    def start(self) -> None:
        load = self._load
        for i in range(load.num_streams):
            num_done = load.num_answered * i // load.num_streams
            self._begin(load.num_asked + num_done, load.num_answered - num_done)

    def send_long(self) -> float:
        """When it was."""
        self._submit(LONG, self._load.num_prompt, ANSWER)
        return time.perf_counter()

    def watch(self, is_over: Callable[[], bool]) -> Gaps:
        """Takes what comes until then. Raises RequestError."""
        gaps_s: list[float] = []
        while not is_over():
            try:
                arrived_s, output = self._arrivals.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if output.finish_reason not in (None, FinishReason.LENGTH):
                raise RequestError(
                    f"request {output.request_id} ended by {output.finish_reason.value}, not by "
                    f"its length: {output.error or 'no reason given'}"
                )
            gaps_s += self._take(arrived_s, output)
        some = np.asarray(gaps_s or [0.0])
        return Gaps(len(gaps_s), *(float(np.quantile(some, share)) for share in (0.5, 0.99, 1.0)))

    def _take(self, arrived_s: float, output: Output) -> list[float]:
        """The gaps before its tokens."""
        name, num_tokens = output.request_id, len(output.token_ids)
        if name == LONG:
            if self.long_began_s is None:
                self.long_began_s = arrived_s
            self.long_ended |= output.finish_reason is not None
            return []
        last_s = self._last_s.get(name)
        self._last_s[name] = arrived_s
        if output.finish_reason is not None:
            del self._last_s[name]
            self._begin(self._load.num_asked, self._load.num_answered)
        if last_s is None or not num_tokens:
            return []
        return [(arrived_s - last_s) / num_tokens] * num_tokens

    def _begin(self, num_prompt: int, num_tokens: int) -> None:
        self._num_begun += 1
        self._submit(str(self._num_begun), num_prompt, num_tokens)

    def _submit(self, name: str, num_prompt: int, num_tokens: int) -> None:
        vocab = self._engine.info.vocab_size
        prompt = tuple(self._rng.choices(range(vocab), k=num_prompt))
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self._engine.submit(
            GenerateRequest(name, prompt, sampling),
            lambda output: self._arrivals.put((time.perf_counter(), output)),
        )


def _milliseconds(gaps: Gaps) -> list[str]:
    return [f"{1e3 * seconds:.1f} ms" for seconds in (gaps.p50_s, gaps.p99_s, gaps.most_s)]
