"""Hugging Face transformers on a GPU: one batch of requests, with random weights of a given shape.

    echo '{"engine": "transformers-compiled", ...}' | python -m bench.peers.transformers_gpu_worker

It runs once, in whatever Python the machine has, for `plan/peers.py`: JSON on stdin, whose end is
the parent's, and JSON as the last line of stdout. It knows nothing of Weft.
"""

# torch and transformers are in the machine's Python, which the type checker does not see.
# pyright: reportMissingImports=false

import json
import os
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    engine: str
    model: str
    concurrency: int
    prompt: int
    output: int
    dtype: str
    limit_s: float
    config: str
    """A config.json in TOML."""
    device: str


def main() -> None:
    task = Task(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_watch, daemon=True).start()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answer:
        # What libraries print goes to stderr.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        print(json.dumps(run(task)), file=answer)
    sys.stderr.flush()
    # Engines leave threads behind.
    os._exit(0)


def run(task: Task) -> dict[str, Any]:
    started = time.perf_counter()
    import torch
    import transformers

    model, prompts = load(task)
    figures = ENGINES[task.engine](model, prompts, task)
    figures["start_s"] = time.perf_counter() - started - figures["total_s"]
    figures["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    tokens = task.concurrency * task.output
    figures["output_tokens_per_s"] = tokens / figures["total_s"]
    if task.output > 1:
        later = tokens - task.concurrency
        figures["decode_tokens_per_s"] = later / (figures["total_s"] - figures["ttft_s"])
    return figures


def load(task: Task) -> tuple[Any, Any]:
    """A model that nobody trained, made where it will run, and prompts."""
    import torch
    import transformers

    values = tomllib.loads(Path(task.config).read_text(encoding="utf-8"))
    values.pop("dtype", None)
    architecture = getattr(transformers, values["architectures"][0])
    config = architecture.config_class(**values)
    torch.manual_seed(0)
    with torch.device(task.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, task.dtype), attn_implementation="sdpa"
        ).eval()
        prompts = torch.randint(0, config.vocab_size, (task.concurrency, task.prompt))
    return model, prompts


def compiled(model: Any, prompts: Any, task: Task) -> dict[str, Any]:
    """`generate` over a static cache, its decode steps by torch.compile."""
    import torch
    import transformers

    def answer(num_tokens: int) -> float:
        config = transformers.GenerationConfig(
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=num_tokens,
            cache_implementation="static",
            # One size of cache for all calls, so that nothing is compiled twice.
            max_cache_len=task.prompt + task.output,
        )
        _wait(task)
        started = time.perf_counter()
        found = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=config
        )
        _wait(task)
        assert found.shape == (task.concurrency, task.prompt + num_tokens), found.shape
        return time.perf_counter() - started

    answer(task.output)  # compiles
    return {
        "ttft_s": answer(1),
        "total_s": answer(task.output),
        "settings": "generate(), greedy, static cache, torch.compile as generate() does, sdpa",
    }


def paged(model: Any, prompts: Any, task: Task) -> dict[str, Any]:
    """Paged continuous batching, at its default settings."""
    import transformers

    config = transformers.GenerationConfig(
        do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=task.output
    )

    def answer() -> tuple[float, float]:
        started = time.perf_counter()
        outputs = model.generate_batch(
            inputs=prompts.tolist(),
            generation_config=config,
            record_timestamps=True,
            persistent_manager=True,
        )
        found = list(outputs.values())
        lengths = {len(output.generated_tokens) for output in found}
        if len(found) != task.concurrency or lengths != {task.output}:
            errors = {output.error for output in found}
            raise RuntimeError(f"{len(found)} answers of {lengths} tokens; errors: {errors}")
        firsts = max(output.timestamps[0] for output in found)
        lasts = max(output.timestamps[-1] for output in found)
        return firsts - started, lasts - started

    answer()  # makes the cache and captures graphs
    ttft_s, total_s = answer()
    attention = model.config._attn_implementation
    settings = f"generate_batch(), greedy, paged continuous batching, {attention}"
    return {"ttft_s": ttft_s, "total_s": total_s, "settings": settings}


ENGINES = {"transformers-compiled": compiled, "transformers-paged": paged}


def _wait(task: Task) -> None:
    import torch

    if task.device == "cuda":
        torch.cuda.synchronize()


def _watch() -> None:
    """Our end is that of the parent."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
