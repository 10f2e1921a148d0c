"""Two small engines, of which one computes prompts for the other, and one that does all itself."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cache.tiers.record import RecordFormat
from model.config import ModelConfig
from serve.engine import Engine
from serve.prefill.local import LocalPrefill
from serve.request import GenerateRequest
from sharding.mesh import parse_mesh
from tests.serve.harness import (
    DENSE,
    Answer,
    Parts,
    compile_few,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

WEIGHTS = random_weights(DENSE)
TIMEOUT_S = 60.0
LEAST_TOKENS = 20
FORM_KEY = b"tests of prefill"


@dataclass(frozen=True)
class Sides:
    decode: Engine
    prefill: Engine

    def answers(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        """Of requests that are there together, by the engine that decodes."""
        answers = [Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            self.decode.submit(request, answer)
        assert self.decode.wait_idle(TIMEOUT_S)
        return answers

    def flush(self) -> None:
        """Also reaches who prefills, in one process."""
        self.decode.flush_cache()

    def assert_all_let_go(self) -> None:
        """No page has an owner on either side, soon."""
        for engine in (self.decode, self.prefill):
            assert engine.wait_idle(TIMEOUT_S)
            wait_until(lambda engine=engine: engine.load().pages_used == 0)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


def local_sides(
    decode_mesh: str, prefill_mesh: str, num_pages: int = 64, lease_s: float = TIMEOUT_S
) -> Sides:
    """Both started, on devices of their own."""
    shape = parse_mesh(decode_mesh)
    decode = make_parts(DENSE, WEIGHTS, shape, num_pages=num_pages, moves_pages=True)
    assert decode.mover is not None
    prefill = make_parts(
        DENSE,
        WEIGHTS,
        parse_mesh(prefill_mesh),
        prefills_only=True,
        destination=decode.mover.images,
        first_device=shape.num_devices,
    )
    for parts in (decode, prefill):
        compile_few(parts.runner)
    engine = prefill.engine(page_form=form_of(prefill))
    side = decode.engine(prefill=LocalPrefill(engine, LEAST_TOKENS, lease_s))
    side.start()
    return Sides(side, engine)


def form_of(parts: Parts) -> RecordFormat:
    assert parts.mover is not None
    return RecordFormat(FORM_KEY, parts.mover.images.image_bytes)


def alone(config: ModelConfig = DENSE) -> Engine:
    """Who does all itself, not started."""
    parts = make_parts(config, WEIGHTS)
    compile_few(parts.runner)
    return parts.engine()


def mixed_requests(num: int, seed: int = 0) -> list[GenerateRequest]:
    """Prompts of many lengths, some of which begin alike, with all that sampling has."""
    rng = random.Random(seed)
    common = random_prompts(DENSE, [50], seed=99)[0]
    requests: list[GenerateRequest] = []
    for i in range(num):
        own = random_prompts(DENSE, [rng.randint(1, 60)], seed=1000 * seed + i)[0]
        prompt = [*common[: rng.choice([0, 0, 17, 32, 50])], *own]
        sampling: dict[str, Any] = rng.choice(
            [
                {},
                {"temperature": 0.8, "seed": i, "top_k": 20},
                {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
                {"logprobs": 2},
                {"prompt_logprobs": 1},
            ]
        )
        requests.append(greedy(f"r{i}", prompt, rng.randint(1, 8), **sampling))
    return requests
