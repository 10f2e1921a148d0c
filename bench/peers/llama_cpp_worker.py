"""llama.cpp behind the bench's protocol, through the low-level interface of llama-cpp-python.

    python -m bench.peers.llama_cpp_worker MODEL --dtype float32

It runs in the peer's environment (`bench/peers/registry.py`): of Weft it knows the protocol only.
"""

# llama_cpp is in the peer's environment, which the type checker does not see.
# pyright: reportMissingImports=false

import argparse
import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.gguf_model import write_gguf
from bench.peers.protocol import Answer, Generate, Job, Ready, answer_jobs

MAX_SEQUENCES = 16
CONTEXT = 1280
"""Tokens of one sequence: the longest prompt asked for is 1,024."""
BATCH = 2048
"""Tokens in a call, of all sequences: the first round of any job asked for is one call."""


@contextmanager
def start(model: Path, dtype: str) -> Iterator[tuple[Ready, Generate]]:
    """The model as GGUF, loaded; weights and cache as `dtype`."""
    started = time.perf_counter()
    import llama_cpp

    num_threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=sys.prefix) as folder:
        path = Path(folder, "model.gguf")
        write_gguf(model, path, dtype)
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_mmap = False  # the file does not outlive the load
        loaded = llama_cpp.llama_model_load_from_file(bytes(path), model_params)
    if not loaded:
        raise RuntimeError("llama.cpp did not load the model; why is in its log")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = MAX_SEQUENCES * CONTEXT
    params.n_batch = BATCH
    params.n_seq_max = MAX_SEQUENCES
    params.n_threads = params.n_threads_batch = num_threads
    # In float32 no flash attention, parts of which are half precision: it moves logits by
    # thousandths. In bfloat16, llama.cpp's own choices: a cache of bfloat16 is slower.
    exact = dtype == "float32"
    flash, cache_type = ("DISABLED", "F32") if exact else ("AUTO", "F16")
    params.flash_attn_type = getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache_type}")
    context = llama_cpp.llama_init_from_model(loaded, params)
    if not context:
        raise RuntimeError("llama.cpp did not make a context; why is in its log")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    # Such as "CPU : AVX2 = 1 | FMA = 1 | ".
    features = llama_cpp.llama_print_system_info().decode().removeprefix("CPU : ").split("|")
    names = [feature.split()[0] for feature in features if feature.strip()]
    ready = Ready(
        device="cpu",
        vocab_size=vocab_size,
        versions={"llama-cpp-python": version("llama-cpp-python")},
        settings=f"{dtype} weights, {cache_type} cache, flash attention {flash.lower()}, "
        f"one llama_decode a step, argmax by NumPy, {params.n_batch} tokens a batch, "
        f"{params.n_ubatch} a micro-batch, {num_threads} threads, built here with "
        f"{' '.join(names)}",
        start_s=time.perf_counter() - started,
    )
    yield ready, partial(generate, Decoder(context, vocab_size))


class Decoder:
    """A context, and the arrays through which it is handed a batch of tokens."""

    def __init__(self, context: Any, vocab_size: int):
        import llama_cpp

        self._library, self._context, self._vocab_size = llama_cpp, context, vocab_size
        self._tokens, self._positions, self._sequences = np.zeros((3, BATCH), np.int32)
        self._num_sequences = np.ones(BATCH, np.int32)
        self._wanted = np.zeros(BATCH, np.int8)
        # A token may be of several sequences, so each has a pointer to where its own are listed.
        step = self._sequences.itemsize
        self._lists = self._sequences.ctypes.data + step * np.arange(BATCH, dtype=np.uintp)

    def forget(self) -> None:
        """Empty the cache."""
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, False)

    def decode(
        self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wanted: np.ndarray
    ) -> np.ndarray:
        """Logits after the `wanted` tokens, a row each, valid until the next call."""
        num_tokens = len(tokens)
        if num_tokens > BATCH:
            raise ValueError(f"{num_tokens} tokens in one batch; this worker takes {BATCH}")
        self._tokens[:num_tokens] = tokens
        self._positions[:num_tokens] = positions
        self._sequences[:num_tokens] = sequences
        self._wanted[:num_tokens] = wanted
        batch = self._library.llama_batch(
            n_tokens=num_tokens,
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._num_sequences, ctypes.c_int32),
            seq_id=_pointer(self._lists, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {num_tokens} tokens gave {status}")
        logits = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (int(np.sum(wanted)), self._vocab_size))


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def generate(decoder: Decoder, job: Job) -> Answer:
    """All prompts in one call, then a token of each in every further one."""
    num_prompts = len(job.prompts)
    decoder.forget()
    started = time.perf_counter()
    lengths = np.array([len(prompt) for prompt in job.prompts])
    positions = np.concatenate([np.arange(length) for length in lengths])
    sequences = np.repeat(np.arange(num_prompts), lengths)
    wanted = positions == lengths[sequences] - 1
    logits = decoder.decode(np.concatenate(job.prompts), positions, sequences, wanted)
    every = np.arange(num_prompts)
    chosen: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    first_s = 0.0
    for step in range(job.num_tokens):
        if step:
            ones = np.ones(num_prompts)
            logits = decoder.decode(chosen[-1], lengths + step - 1, every, ones)
        chosen.append(logits.argmax(axis=1))
        if job.margins:
            second, best = np.partition(logits, -2, axis=1)[:, -2:].T
            margins.append(best - second)
        if not step:
            first_s = time.perf_counter() - started
    total_s = time.perf_counter() - started
    return Answer(
        token_ids=np.stack(chosen, axis=1).tolist(),
        first_s=first_s,
        num_first=1,
        total_s=total_s,
        margins=np.stack(margins, axis=1).tolist() if margins else [],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the bench's jobs with llama.cpp.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    answer_jobs(partial(start, args.model, args.dtype))


if __name__ == "__main__":
    main()
