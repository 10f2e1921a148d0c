"""What the bench and the engines it times say to each other: a JSON object a line.

It knows no engine, and needs the standard library of Python 3.11 only: peers' workers import it.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TextIO


@dataclass(frozen=True)
class Ready:
    """What a worker says once its model is loaded and its programs are compiled."""

    device: str
    """cpu or gpu."""
    vocab_size: int
    versions: dict[str, str]
    settings: str
    """How the engine was set up, in words."""
    start_s: float
    """To import the engine, load the model and compile."""


@dataclass(frozen=True)
class Job:
    """Prompts to continue together, greedily, each by `num_tokens` whatever they are."""

    prompts: list[list[int]]
    num_tokens: int
    margins: bool = False
    """Also say how far the two best logits were apart; such a job is not for timing."""


@dataclass(frozen=True)
class Answer:
    """What came of a job, by the worker's clock, which starts when it hands the job in."""

    token_ids: list[list[int]]
    first_s: float
    """When the first tokens had come, of any prompt."""
    num_first: int
    """How many tokens of that prompt had come by then: an engine may return several at once."""
    total_s: float
    """When the last token of the last prompt had come."""
    margins: list[list[float]] = field(default_factory=list)
    """For each token, the best logit less the second best, when the job asked."""


Generate = Callable[[Job], Answer]
Start = Callable[[], AbstractContextManager[tuple[Ready, Generate]]]


def answer_jobs(start: Start) -> None:
    """Start an engine and answer the jobs on stdin until it closes.

    Only replies are written to the process's stdout: what libraries print goes to stderr.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            with start() as (ready, generate):
                _reply(replies, ready=asdict(ready))
                _answer(sys.stdin, replies, generate)
        except Exception as error:
            _reply_error(replies, error)
            sys.exit(1)


def _answer(jobs: Iterable[str], replies: TextIO, generate: Generate) -> None:
    for line in jobs:
        try:
            _reply(replies, answer=asdict(generate(Job(**json.loads(line)))))
        except Exception as error:
            _reply_error(replies, error)


def _reply_error(replies: TextIO, error: Exception) -> None:
    traceback.print_exc()
    _reply(replies, error=f"{type(error).__name__}: {error}")


def _reply(replies: TextIO, **message: object) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
