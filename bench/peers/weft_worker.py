"""Weft behind the bench's protocol: the engine alone, without text and without the wire.

    python -m bench.peers.weft_worker MODEL --dtype float32

It knows of the engine what `serve/front.py` knows of it.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.outputs import outputs_of
from bench.peers.protocol import Answer, Generate, Job, Ready, answer_jobs
from serve.request import GenerateRequest, Output, SamplingParams

SCHEDULE = {"max_batch": 16, "token_budget": 1024 + 16, "chunk": 128}
"""The widest batch asked for, a budget that takes the longest prompt in one step, and rows as long
as the shortest prompt."""
PAGES = 512
"""Enough for that batch at either backend's page size; the default would take a share of memory."""

_request_ids = (f"bench-{i}" for i in itertools.count())


@contextmanager
def start(model: Path, dtype: str) -> Iterator[tuple[Ready, Generate]]:
    """The engine, compiled and running; stopped at the end."""
    started = time.perf_counter()
    import jax

    from serve.build import build_engine
    from serve.config import make_config

    config = make_config(
        {
            "model": {"path": str(model.absolute()), "dtype": dtype},
            "cache": {"pages": PAGES},
            "schedule": SCHEDULE,
        },
        "weft bench",
    )
    engine = build_engine(config)
    # As `weft serve` does: what was built is never garbage, and looking through it takes long.
    gc.freeze()
    engine.start()
    try:
        ready = Ready(
            device=jax.default_backend(),
            vocab_size=engine.info.vocab_size,
            versions={"jax": jax.__version__},
            settings=", ".join(
                [
                    *(f"schedule.{name}={value}" for name, value in SCHEDULE.items()),
                    f"cache.pages={PAGES}",
                    f"{engine.info.page_size} tokens a page",
                ]
            ),
            start_s=time.perf_counter() - started,
        )
        yield ready, partial(generate, engine)
    finally:
        engine.stop()


def generate(engine: Any, job: Job) -> Answer:
    """The prompts submitted one after another, as clients would."""
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=job.num_tokens,
        ignore_eos=True,
        logprobs=2 if job.margins else None,
    )
    requests = [
        GenerateRequest(next(_request_ids), tuple(prompt), sampling) for prompt in job.prompts
    ]
    started = time.perf_counter()
    outputs = outputs_of(engine, requests)
    return _answer(job, started, outputs, [request.request_id for request in requests])


def _answer(
    job: Job, started: float, outputs: Sequence[tuple[float, Output]], request_ids: Sequence[str]
) -> Answer:
    carrying = [(arrived_s, output) for arrived_s, output in outputs if output.token_ids]
    first_s, first = carrying[0]
    last_s, _ = carrying[-1]
    token_ids: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
    margins: dict[str, list[float]] = {request_id: [] for request_id in request_ids}
    for _, output in carrying:
        token_ids[output.request_id] += output.token_ids
        # Log probabilities differ by what the logits differ by.
        margins[output.request_id] += [
            place.top_logprobs[0] - place.top_logprobs[1] for place in output.logprobs
        ]
    return Answer(
        token_ids=list(token_ids.values()),
        first_s=first_s - started,
        num_first=len(first.token_ids),
        total_s=last_s - started,
        margins=list(margins.values()) if job.margins else [],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the bench's jobs with Weft.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    answer_jobs(partial(start, args.model, args.dtype))


if __name__ == "__main__":
    main()
