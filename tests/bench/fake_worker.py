"""An engine that counts: the tokens after a prompt are its last id + 1, + 2, ...

`python -m tests.bench.fake_worker` speaks the bench's protocol. --wrong-from says at which token it
miscounts, --fault how it fails.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bench.peers.protocol import Answer, Generate, Job, Ready, answer_jobs

VOCAB_SIZE = 1000


@contextmanager
def start(fault: str, device: str, wrong_from: int | None) -> Iterator[tuple[Ready, Generate]]:
    if fault == "start":
        raise FileNotFoundError("there is no such model")
    if fault == "print":
        print("a library greets")
        os.system("echo and so does its C code")
    yield (
        Ready(device, VOCAB_SIZE, {"fake": "1.0"}, "counting", 0.5),
        partial(generate, fault=fault, wrong_from=wrong_from),
    )
    print("stopped in order", file=sys.stderr)


def generate(job: Job, fault: str = "none", wrong_from: int | None = None) -> Answer:
    """Each prompt takes a second, each token after the first a tenth."""
    if fault == "die":
        print("out of memory, or so", file=sys.stderr)
        os._exit(3)
    if fault == "refuse" and len(job.prompts) > 1:
        raise ValueError("one prompt at most")
    first_s = float(len(job.prompts))
    return Answer(
        token_ids=[count(prompt[-1], job.num_tokens, wrong_from) for prompt in job.prompts],
        first_s=first_s,
        num_first=1,
        total_s=first_s + (job.num_tokens - 1) / 10,
        margins=[[0.25] * job.num_tokens for _ in job.prompts] if job.margins else [],
    )


def count(last: int, num_tokens: int, wrong_from: int | None = None) -> list[int]:
    wrong_from = num_tokens if wrong_from is None else wrong_from
    return [last + 1 + i + (i >= wrong_from) for i in range(num_tokens)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wrong-from", type=int)
    args = parser.parse_args()
    answer_jobs(partial(start, args.fault, args.device, args.wrong_from))


if __name__ == "__main__":
    main()
