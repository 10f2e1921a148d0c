"""One engine beside a split one: long prompts among others' streams, what moving pages costs, and
whether requests that end at any moment, and processes that are killed, leave anything behind.

    weft bench split

All engines but one are in this process and are timed in turn, round by round; the one that is not
computes prompts for one that is. It does not know how pages travel (`serve/prefill`).
"""

import gc
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import Tell
from bench.offline import describe
from bench.outputs import outputs_of
from bench.random_model import random_model
from bench.report import this_machine
from bench.split_load import Load, Played, figures_of, measure_alone, play
from bench.split_moving import Moving, measure_moving
from bench.split_report import ONE, Difference, Mixed, Report
from bench.split_server import PrefillServer
from bench.split_soak import RANDOM_MODEL, Soak, Soaked, soak
from plan.machine import ROOT
from serve.build import build_engine
from serve.commands.devices import ensure_devices, keep_compiled_programs
from serve.commands.serve import SWITCH_INTERVAL_S
from serve.config import MeshSection, ServeConfig, make_config, override_config
from serve.engine import ModelInfo
from serve.errors import RequestError
from serve.progress import Progress
from serve.request import GenerateRequest, SamplingParams

MODEL = ROOT / "models" / "demo"
PAGE_SIZE = 16
NUM_MOVED = 7
"""Prompts whose medians say what moving costs."""
HERE, THERE = "split, one process", "split, two processes"
ARMS = {
    ONE: [],
    "one engine, one device, max_slowdown inf": ["schedule.max_slowdown=inf"],
    "one engine, tensor=2": ["mesh.tensor=2"],
    "one engine, tensor=2, max_slowdown inf": ["mesh.tensor=2", "schedule.max_slowdown=inf"],
    HERE: ["split.role=decode", "split.prefill_tensor=1"],
    THERE: ["split.role=decode"],
}
"""What is set for each."""
LEAST_TOKENS = 64
"""Long prompts are longer, those of streams aren't."""
SOAK_PAGES = 64
"""Too few for all requests that are open: some are preempted."""


def run(
    model: Path | None,
    overrides: Sequence[str],
    load: Load,
    rounds: int,
    soaking: Soak,
    *,
    cache: Path = Path(".cache"),
    tell: Tell = lambda line: None,
) -> Report:
    """`rounds` of `load`, if any, and `soaking`, if it has requests.

    Raises RequestError where a request does not fit or ends otherwise than by its length,
    ValueError where there is no model, and what building an engine raises.
    """
    machine = this_machine(ROOT)
    if model is None and not MODEL.is_dir():
        raise ValueError("no MODEL is named, and models/demo, of a checkout, is not here; name one")
    directory = model or MODEL
    asked = [
        *([] if model is None else [str(model)]),
        f"--prompt={load.num_prompt}",
        f"--prompts={load.num_prompts}",
        f"--streams={load.num_streams}",
        f"--spacing={load.spacing:g}",
        f"--rounds={rounds}",
        f"--soak={soaking.num_requests}",
        *(f"--set={override}" for override in overrides),
    ]
    # Before JAX is used: one device for each side of a split.
    ensure_devices(MeshSection(tensor=2))
    keep_compiled_programs()
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as what serves has it
    mixed, moving, page_bytes = None, [], 0
    if rounds:
        mixed, moving, page_bytes = _measure(directory, overrides, load, rounds, tell)
    soaked: list[Soaked] = []
    if soaking.num_requests:
        soaked = _soak(random_model(RANDOM_MODEL, cache, tell), soaking, tell)
    return Report(
        model=describe(directory),
        command=shlex.join(["weft", "bench", "split", *asked]),
        machine=machine,
        mixed=mixed,
        moving=moving,
        page_bytes=page_bytes,
        soaked=soaked,
    )


def _measure(
    directory: Path, overrides: Sequence[str], load: Load, rounds: int, tell: Tell
) -> tuple[Mixed, list[Moving], int]:
    num_open = load.num_streams + load.num_prompts
    base = {
        "model": {"path": str(directory.absolute()), "dtype": "float32"},
        "schedule": {"max_batch": num_open},
        "cache": {
            "page_size": PAGE_SIZE,
            "pages": load.num_cached // PAGE_SIZE + 2 * num_open,
        },
    }
    config = override_config(make_config(base, "weft bench split"), overrides)
    check = partial(_check, load.longest)
    with _started(config, ARMS, check) as started:
        engines = started.engines
        for name, engine in engines.items():
            tell(f"{name}: a first round, which is not counted")
            play(engine, replace(load, num_prompts=2), "warm-up", gap_s=0.1)
        alone = measure_alone(engines[ONE], load)
        gap_s = load.spacing * alone.long_first
        played: dict[str, list[Played]] = {name: [] for name in engines}
        for i in range(rounds):
            # Each begins as often as the others.
            order = [*engines][i % len(engines) :] + [*engines][: i % len(engines)]
            for name in order:
                played[name].append(play(engines[name], load, f"round {i}", gap_s))
                found = figures_of(played[name][-1], alone)
                tell(
                    f"round {i + 1} of {rounds}, {name}: p99 {1e3 * found.gap_p99:.1f} ms between "
                    f"tokens, {1e3 * found.long_p50:.0f} ms to first tokens of long prompts"
                )
        num_compared, differences = _compare(engines[ONE], played)
        outcomes = {
            name: {outcome.value: num for outcome, num in counts.outcomes.items()}
            for name, engine in engines.items()
            for counts in engine.transfers()
        }
        tell("what moving pages costs")
        moving = [
            measure_moving(engines[ONE], engines[arm], load, way, NUM_MOVED)
            for arm, way in (
                (HERE, "in one process"),
                (THERE, f"between two, by {config.split.carrier}"),
            )
        ]
        wired = engines[THERE].transfers()[0]
        mixed = Mixed(
            load=load,
            alone=alone,
            rounds={name: [figures_of(one, alone) for one in own] for name, own in played.items()},
            num_compared=num_compared,
            differences=differences,
            outcomes=outcomes,
            compiled_late=sum(engine.load().compiles_after_warmup for engine in engines.values()),
        )
        return mixed, moving, wired.bytes // max(wired.pages, 1)


def _soak(directory: Path, asked: Soak, tell: Tell) -> list[Soaked]:
    base = {
        "model": {"path": str(directory.absolute())},
        "schedule": {"max_batch": asked.num_open, "max_queue": asked.num_requests},
        "cache": {"page_size": PAGE_SIZE, "pages": SOAK_PAGES},
    }
    config = make_config(base, "weft bench split")
    arms = {name: ARMS[name] for name in (ONE, HERE, THERE)}
    with _started(config, arms, partial(_check, asked.longest)) as started:
        engines, server = started.engines, started.server
        tell(f"{asked.num_requests:,} requests, by one engine")
        requests = asked.requests(engines[ONE].info.vocab_size)
        expected: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for _, output in outputs_of(engines[ONE], requests):
            expected[output.request_id] += output.token_ids
        tell("the same, with cancels")
        beside = engines[HERE].prefill.engine
        here = soak(
            engines[HERE],
            expected,
            asked,
            {"decode": engines[HERE].load, "prefill": beside.load},
            "one process",
        )
        tell("the same, with cancels and kills")
        there = soak(
            engines[THERE],
            expected,
            asked,
            {"decode": engines[THERE].load, "prefill": server.load},
            "two processes",
            server,
        )
        return [here, there]


@dataclass(frozen=True)
class _Started:
    engines: dict[str, Any]
    """By arm."""
    server: PrefillServer
    """Who computes prompts for THERE."""


@contextmanager
def _started(
    config: ServeConfig, arms: Mapping[str, Sequence[str]], check: Callable[[ModelInfo], None]
) -> Iterator[_Started]:
    split = [f"split.least_tokens={LEAST_TOKENS}"]
    engines: dict[str, Any] = {}
    with PrefillServer(override_config(config, ["split.role=prefill"])) as server:
        try:
            for name, own in arms.items():
                peers = [f'split.peers=["{server.address}"]'] if name == THERE else []
                changes = [*own, *peers, *(split if name in (HERE, THERE) else [])]
                engine = build_engine(override_config(config, changes), Progress, check=check)
                engine.start()
                engines[name] = engine
            # As in what serves: a collection that went through all of it would stop every step.
            gc.collect()
            gc.freeze()
            yield _Started(engines, server)
        finally:
            gc.unfreeze()
            for engine in engines.values():
                engine.stop()


def _check(longest: int, info: ModelInfo) -> None:
    """Refuses what an engine would, before weights are read and steps compiled."""
    if longest > info.max_context:
        raise RequestError(
            f"a request has up to {longest:,} tokens with its answer, and {info.name} has a "
            f"context of {info.max_context:,}; lower --prompt, or name another model"
        )
    held = info.num_pages * info.page_size
    if longest > held:
        raise RequestError(
            f"a request of {longest:,} tokens doesn't fit the cache, which holds {held:,}; leave "
            "cache.pages to the bench, or lower --prompt"
        )


def _compare(one: Any, played: Mapping[str, Sequence[Played]]) -> tuple[int, list[Difference]]:
    """How many answers of others were compared with those of the first arm, and which differ."""
    expected = {s.request.request_id: s.token_ids for p in played[ONE] for s in p.served}
    num_compared = 0
    differences: list[Difference] = []
    for arm, own in played.items():
        if arm == ONE:
            continue
        for served in (served for p in own for served in p.served):
            name = served.request.request_id
            pairs = list(zip(expected.get(name, ()), served.token_ids, strict=False))
            num_compared += bool(pairs)
            parted = (i for i, (theirs, its) in enumerate(pairs) if theirs != its)
            if (position := next(parted, None)) is not None:
                margin = _margin(one, served.request, expected[name][:position])
                differences.append(Difference(arm, name, position, margin))
    return num_compared, differences


def _margin(engine: Any, request: GenerateRequest, token_ids: Sequence[int]) -> float:
    """By how much the best logit is above the second after these tokens of the answer."""
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=2)
    again = GenerateRequest("margin", (*request.prompt_ids, *token_ids), sampling)
    [(_, output)] = outputs_of(engine, [again])
    best, second = output.logprobs[0].top_logprobs[:2]
    return best - second
