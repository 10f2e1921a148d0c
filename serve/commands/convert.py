"""`weft convert`."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from model.checkpoint.convert import check, convert
from model.config import Quantization
from model.families import read_model_config
from serve.commands.text import Text, load_text
from serve.errors import RequestError
from serve.progress import Progress

LENGTH = 256
"""Tokens of a sequence to calibrate on, at most; each is computed from its own begin."""
NUM_TOKENS = 16_384
"""To calibrate on: four times as many gained nothing sure."""
SEED = 1
"""Other than that of `weft bench quality`, which should not score what was calibrated on."""


@dataclass(frozen=True)
class Calibration:
    """What the model is run on while it is rounded."""

    num_tokens: int
    text: Path | None = None
    """A file in UTF-8; None: what the model writes itself at temperature 1."""


def run(
    source: Path,
    destination: Path,
    dtype: str | None,
    quantization: Quantization | None,
    calibration: Calibration | None,
    to: Literal["orbax", "hf"],
) -> None:
    """Prints the new directory. Raises RequestError, and what `convert` raises."""
    # Told before the time that calibration takes.
    check(source, destination, dtype=dtype, quantization=quantization, to=to)
    token_ids = None if calibration is None else _token_ids(source, calibration)
    with Progress(f"converting {source.name}, twice: write and verify") as progress:
        convert(
            source,
            destination,
            dtype=dtype,
            quantization=quantization,
            calibration=token_ids,
            to=to,
            progress=progress.update,
        )
    print(destination)


def _token_ids(model: Path, calibration: Calibration) -> np.ndarray:
    """Sequences of one length, with the tokens asked for or a few more."""
    text = load_text(model)  # which refuses what is no model
    length = min(LENGTH, read_model_config(model).max_context - 1, calibration.num_tokens)
    num_sequences = -(-calibration.num_tokens // length)
    if calibration.text is None:
        written = _write(model, num_sequences, length)
        gc.collect()  # the engine is in cycles, and would keep its weights and pages meanwhile
        return np.array(written, np.int32)
    token_ids = _encode(calibration.text, text, model)
    needed = num_sequences * length
    if len(token_ids) < needed:
        raise RequestError(
            f"{calibration.text} has {len(token_ids):,} tokens, and {num_sequences} sequences of "
            f"{length} need {needed:,}; give a longer text, or lower --tokens"
        )
    return np.array(token_ids[:needed], np.int32).reshape(num_sequences, length)


def _encode(file: Path, text: Text, model: Path) -> Sequence[int]:
    if text.tokenizer is None:
        raise RequestError(f"{model} has no tokenizer to read {file} with; leave out --text")
    try:
        return text.tokenizer.encode(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise RequestError(f"{file} is not text in UTF-8; give --text one that is") from None


def _write(model: Path, num_sequences: int, length: int) -> list[list[int]]:
    """Sequences that begin with any token and go on as the model would; the same ones each time."""
    from serve.build import build_engine
    from serve.commands.devices import ensure_devices, keep_compiled_programs
    from serve.config import make_config
    from serve.engine import Engine
    from serve.request import GenerateRequest, Output, SamplingParams

    tables = {"model": {"path": str(model.absolute())}, "schedule": {"max_queue": num_sequences}}
    config = make_config(tables, "weft convert --calibrate")
    ensure_devices(config.mesh)
    keep_compiled_programs()
    engine = build_engine(config, Progress, compile_ahead=False)
    assert isinstance(engine, Engine), "one device has one engine"
    firsts = np.random.default_rng(SEED).integers(engine.info.vocab_size, size=num_sequences)
    sequences = [[first] for first in firsts.tolist()]
    title = f"writing {num_sequences * length:,} tokens to calibrate on"
    with Progress(title, num_sequences * (length - 1), "tokens") as progress:

        def take(sequence: list[int]) -> Callable[[Output], None]:
            def sink(output: Output) -> None:
                if output.error:
                    raise RequestError(f"the model did not write: {output.error}")
                sequence.extend(output.token_ids)
                progress.update(progress.done + len(output.token_ids))

            return sink

        for i, sequence in enumerate(sequences):
            sampling = SamplingParams(
                temperature=1.0, max_tokens=length - 1, seed=SEED, ignore_eos=True
            )
            engine.submit(GenerateRequest(str(i), tuple(sequence), sampling), take(sequence))
        # Not started: no thread decides what is computed together, which may decide a token.
        while not engine.wait_idle(0):
            engine.step()
    return sequences
