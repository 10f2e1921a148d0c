"""vLLM's build for the CPU behind the bench's protocol, its engine stepped in this process.

    python -m bench.peers.vllm_cpu_worker MODEL --dtype float32

It runs in the peer's environment (`bench/peers/registry.py`): of Weft it knows the protocol only.
"""

# vllm is in the peer's environment, which the type checker does not see.
# pyright: reportMissingImports=false

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.peers.protocol import Answer, Generate, Job, Ready, answer_jobs

KV_CACHE_GIB = 4
_request_ids = (f"bench-{i}" for i in itertools.count())


def environment(cores: set[int], prefix: Path) -> dict[str, str]:
    """What vLLM and the OpenMP under it read when a process starts."""
    return {
        "LD_PRELOAD": str(prefix / "lib" / "libiomp5.so"),
        "OMP_NUM_THREADS": str(len(cores)),
        # What vLLM sets for a worker process of its own. Its own choice of cores would keep one of
        # them for its scheduler, which here runs between steps.
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist={sorted(cores)}".replace(" ", ""),
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CACHE_ROOT": str(prefix / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(prefix / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def start(model: Path, dtype: str) -> Iterator[tuple[Ready, Generate]]:
    """The engine, compiled, as `vllm.LLM` sets it up."""
    started = time.perf_counter()
    import torch
    import vllm

    llm = vllm.LLM(
        model=str(model),
        dtype=dtype,
        skip_tokenizer_init=True,
        # No prompt comes twice.
        enable_prefix_caching=False,
    )
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    ready = Ready(
        device="cpu",
        vocab_size=llm.llm_engine.model_config.get_vocab_size(),
        versions={"vllm-cpu": version("vllm-cpu"), "torch": torch.__version__},
        settings=f"in one process, torch.compile, {KV_CACHE_GIB} GiB of cache, "
        f"{scheduler.max_num_batched_tokens} tokens a step, no prefix caching, Intel OpenMP "
        f"preloaded (tcmalloc not), {os.environ['OMP_NUM_THREADS']} threads, "
        f"KMP_AFFINITY={os.environ['KMP_AFFINITY']}, KMP_BLOCKTIME={os.environ['KMP_BLOCKTIME']}",
        start_s=time.perf_counter() - started,
    )
    yield ready, partial(generate, llm.llm_engine)


def generate(engine: Any, job: Job) -> Answer:
    """The prompts submitted one after another, then steps until all are done."""
    import vllm

    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=job.num_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=2 if job.margins else None,
    )
    request_ids = [next(_request_ids) for _ in job.prompts]
    first_s, num_first = 0.0, 0
    finished: dict[str, Any] = {}
    started = time.perf_counter()
    for request_id, prompt in zip(request_ids, job.prompts, strict=True):
        engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if outputs and not num_first:
            first_s = time.perf_counter() - started
            num_first = len(outputs[0].outputs[0].token_ids)
        finished |= {output.request_id: output.outputs[0] for output in outputs if output.finished}
    total_s = time.perf_counter() - started
    completions = [finished[request_id] for request_id in request_ids]
    return Answer(
        token_ids=[list(completion.token_ids) for completion in completions],
        first_s=first_s,
        num_first=num_first,
        total_s=total_s,
        margins=[[_margin(place) for place in completion.logprobs] for completion in completions]
        if job.margins
        else [],
    )


def _margin(logprobs: dict[int, Any]) -> float:
    """Log probabilities differ by what the logits differ by."""
    best, second = sorted((found.logprob for found in logprobs.values()), reverse=True)[:2]
    return best - second


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer the bench's jobs with vLLM for the CPU.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    wanted = environment(os.sched_getaffinity(0), Path(sys.prefix))
    if wanted.items() <= os.environ.items():
        answer_jobs(partial(start, args.model, args.dtype))
    else:
        # A library is preloaded only when a process starts.
        command = [sys.executable, "-m", "bench.peers.vllm_cpu_worker", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | wanted)


if __name__ == "__main__":
    main()
