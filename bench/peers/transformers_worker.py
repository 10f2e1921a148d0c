"""Hugging Face transformers behind the bench's protocol, on PyTorch for the CPU.

    python -m bench.peers.transformers_worker MODEL --dtype float32

It runs in the peer's environment (`bench/peers/registry.py`): of Weft it knows the protocol only.
"""

# torch and transformers are in the peer's environment, which the type checker does not see.
# pyright: reportMissingImports=false

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers.protocol import Answer, Generate, Job, Ready, answer_jobs


@contextmanager
def start(model: Path, dtype: str) -> Iterator[tuple[Ready, Generate]]:
    """The model as `generate` runs it best on a CPU without compiling it."""
    started = time.perf_counter()
    import torch
    import transformers

    num_threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
    ).eval()
    # No end id, so that nothing ends early; the padding id is asked for and never used.
    loaded.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    ready = Ready(
        device="cpu",
        vocab_size=loaded.config.vocab_size,
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        settings="generate(), greedy, dynamic cache, sdpa attention, inference_mode, "
        f"{num_threads} threads",
        start_s=time.perf_counter() - started,
    )
    yield ready, partial(generate, loaded)


class Observer:
    """A logits processor that changes nothing. It notes when each step's logits were there.

    Reading the clock costs a microsecond a step; streamers and subtracting two runs cost more, in
    time or in noise.
    """

    def __init__(self, margins: bool):
        self.times: list[float] = []
        self.margins: list[Any] | None = [] if margins else None

    def __call__(self, input_ids: Any, logits: Any) -> Any:
        self.times.append(time.perf_counter())
        if self.margins is not None:
            best = logits.float().topk(2, dim=-1).values
            self.margins.append(best[:, 0] - best[:, 1])
        return logits


def generate(model: Any, job: Job) -> Answer:
    """Prompts of one length need no padding."""
    import torch

    observer = Observer(job.margins)
    started = time.perf_counter()
    with torch.inference_mode():
        prompts = torch.tensor(job.prompts)
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=job.num_tokens,
            logits_processor=[observer],
        )
        token_ids = output[:, prompts.shape[1] :].tolist()
    total_s = time.perf_counter() - started
    margins = torch.stack(observer.margins, 1).tolist() if observer.margins else []
    return Answer(token_ids, observer.times[0] - started, 1, total_s, margins)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the bench's jobs with transformers.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    answer_jobs(partial(start, args.model, args.dtype))


if __name__ == "__main__":
    main()
