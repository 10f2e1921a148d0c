"""What another form of a model costs in quality: both score the same tokens, position by position.

    weft bench quality MODEL --set cache.dtype=int8

It does not know in what the forms differ.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.outputs import outputs_of
from serve.build import build_engine
from serve.commands.devices import ensure_devices, keep_compiled_programs
from serve.commands.text import load_text
from serve.config import ServeConfig, make_config, override_config
from serve.errors import RequestError
from serve.request import GenerateRequest, Output, SamplingParams

LENGTH = 256
"""Tokens of a sequence at most; each is scored from its own begin."""


@dataclass(frozen=True)
class Scores:
    """What one form said of every position."""

    best_ids: np.ndarray
    """The tokens that it holds most likely."""
    logprobs: np.ndarray
    """Of the tokens that stand there."""

    @property
    def perplexity(self) -> float:
        return math.exp(-self.logprobs.mean())


@dataclass(frozen=True)
class Quality:
    model: str
    other: str
    num_positions: int
    agreement: float
    """Share of the positions for which both hold the same token most likely."""
    perplexity: float
    other_perplexity: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_markdown(self) -> str:
        rows = [
            ("", self.model, self.other),
            ("---", "---:", "---:"),
            ("perplexity", f"{self.perplexity:.4f}", f"{self.other_perplexity:.4f}"),
            ("same most likely token", "", f"{self.agreement:.2%} of {self.num_positions:,}"),
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(
    model: Path,
    other: Path | None = None,
    overrides: Sequence[str] = (),
    text: Path | None = None,
    num_positions: int = 1_000,
) -> Quality:
    """Compare `model` with `other`, or with itself, as it is served with `overrides`.

    They score the tokens of the file `text`; without one, what `model` writes itself at
    temperature 1. Raises RequestError, and what building an engine raises.
    """
    config = _config(model, num_positions)
    changed = override_config(_config(other or model, num_positions), overrides)
    if changed == config:
        raise RequestError("both forms are the same; name another model, or --set what differs")
    tokens = None if text is None else _tokens(model, text)
    ensure_devices(changed.mesh)
    keep_compiled_programs()
    with _Engine(config) as engine:
        length = min(LENGTH, engine.max_context - 1)
        num_sequences = -(-num_positions // (length - 1))
        if tokens is None:
            sequences = engine.write(num_sequences, length)
        else:
            needed = num_positions + num_sequences
            if len(tokens) < needed:
                raise RequestError(
                    f"{text} has {len(tokens):,} tokens, and {num_positions:,} positions need "
                    f"{needed:,}; give a longer text, or lower --positions"
                )
            sequences = [list(part) for part in itertools.batched(tokens[:needed], length)]
        scores = engine.score(sequences, num_positions)
        vocab_size = engine.vocab_size
    with _Engine(changed) as engine:
        if engine.vocab_size != vocab_size:
            raise RequestError(
                f"{other} has a vocabulary of {engine.vocab_size:,} tokens, {model} of "
                f"{vocab_size:,}; only models of one vocabulary can be compared"
            )
        other_scores = engine.score(sequences, num_positions)
    return Quality(
        model=model.absolute().name,
        other=" ".join([*([other.absolute().name] if other else []), *overrides]),
        num_positions=num_positions,
        agreement=float(np.mean(scores.best_ids == other_scores.best_ids)),
        perplexity=scores.perplexity,
        other_perplexity=other_scores.perplexity,
    )


def _config(model: Path, num_positions: int) -> ServeConfig:
    # All sequences wait at once, and each has a position or more.
    tables = {"model": {"path": str(model.absolute())}, "schedule": {"max_queue": num_positions}}
    return make_config(tables, "weft bench quality")


def _tokens(model: Path, text: Path) -> Sequence[int]:
    tokenizer = load_text(model).tokenizer
    if tokenizer is None:
        raise RequestError(f"{model} has no tokenizer to read {text} with; leave out --text")
    try:
        return tokenizer.encode(text.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise RequestError(f"{text} is not text in UTF-8; give --text one that is") from None


class _Engine:
    """An engine that runs while the context lasts."""

    def __init__(self, config: ServeConfig) -> None:
        self._engine = build_engine(config, compile_ahead=False)
        self.vocab_size = self._engine.info.vocab_size
        self.max_context = self._engine.info.max_context

    def __enter__(self) -> "_Engine":
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def write(self, num_sequences: int, length: int) -> list[list[int]]:
        """Sequences that begin with any token and go on as the model would."""
        firsts = np.random.default_rng(0).integers(self.vocab_size, size=num_sequences).tolist()
        outputs = self._answers(
            [[first] for first in firsts],
            {"temperature": 1.0, "max_tokens": length - 1, "seed": 0},
        )
        written = [[token for output in some for token in output.token_ids] for some in outputs]
        return [[first, *tokens] for first, tokens in zip(firsts, written, strict=True)]

    def score(self, sequences: Sequence[Sequence[int]], num_positions: int) -> Scores:
        """Of the first `num_positions` positions; a sequence's first token has none."""
        asked = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1}
        places = [
            place
            for outputs in self._answers(sequences, asked)
            for output in outputs
            for place in output.prompt_logprobs
        ][:num_positions]
        return Scores(
            best_ids=np.array([place.top_ids[0] for place in places]),
            logprobs=np.array([place.logprob for place in places]),
        )

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any]
    ) -> list[list[Output]]:
        """What came for each prompt."""
        params = SamplingParams(ignore_eos=True, **sampling)
        requests = [
            GenerateRequest(str(i), tuple(prompt), params) for i, prompt in enumerate(prompts)
        ]
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for _, output in outputs_of(self._engine, requests):
            outputs[output.request_id].append(output)
        return list(outputs.values())
