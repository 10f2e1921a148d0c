"""Compiles the step for an H200, where there is none, and fails when it copies its cache.

It needs the gpu_aot tool on the path (`make gpu-check`). It cannot time anything: see that tool's
page.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import gpu_aot  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp

from model.config import Layer, ModelConfig, Rope
from model.partition import Partition
from model.step import StepShape
from serve.programs import CacheShape, Programs
from serve.scheduler import Limits

LIMITS = Limits(
    max_batch=64, token_budget=512, chunk=128, max_steps=8, max_queue=1, max_context=8192
)
STEPS = {
    "decode": StepShape(64, 0, 128, 1),
    "decode loop": StepShape(64, 0, 128, 8),
    "mixed": StepShape(64, 4, 128, 1),
}
NUM_PAGES = 8192
"""Enough that a layer's pages are larger than anything else a step may copy, such as logits."""


def llama_8b(num_layers: int) -> ModelConfig:
    """Llama 3.1 8B's shapes; fewer layers compile faster and show the same."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=14336,
        layers=(Layer(Rope(500000.0)),) * num_layers,
        max_context=8192,
        norm_eps=1e-5,
        dtype="bfloat16",
        attention_scale=128**-0.5,
    )


@dataclass(frozen=True)
class Finding:
    step: str
    mesh: str
    copies: int
    copied_bytes: int
    aliased_bytes: int
    page_bytes: int

    @property
    def good(self) -> bool:
        return not self.copied_bytes and self.aliased_bytes >= self.page_bytes


def check(name: str, shape: StepShape, stages: int, tensor: int, num_layers: int) -> Finding:
    partition = Partition(llama_8b(num_layers), stages, tensor)
    cache = CacheShape(num_pages=NUM_PAGES, page_size=64, dtype=jnp.bfloat16)
    mesh = gpu_aot.mesh(stage=stages, tensor=tensor)
    programs = Programs(partition, mesh, cache, LIMITS, 128, jnp.bfloat16)
    step, arguments = programs.jit_step(shape), programs.abstract_arguments(shape)
    shardings = programs.shardings(programs.argument_cuts())
    compiled = gpu_aot.compile_for_h200(step, arguments, in_shardings=shardings)
    keys, _ = cache.arrays(partition)
    layer_bytes = keys.size * keys.dtype.itemsize // (stages * tensor)
    report = gpu_aot.report(compiled, larger_than=layer_bytes // 2)
    return Finding(
        step=name,
        mesh=f"stage={stages},tensor={tensor}",
        copies=len(report.copies),
        copied_bytes=sum(copy.size * copy.runs for copy in report.copies),
        aliased_bytes=report.aliased_bytes,
        page_bytes=cache.page_bytes(partition) * cache.num_pages,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    bad = 0
    for stages, tensor in ((1, 1), (1, 8), (2, 4)):
        for name, shape in STEPS.items():
            started = time.monotonic()
            finding = check(name, shape, stages, tensor, arguments.layers)
            bad += not finding.good
            print(
                f"{'ok ' if finding.good else 'BAD'} {finding.mesh} {finding.step}: "
                f"{finding.copied_bytes:,} bytes copied in {finding.copies} copies, "
                f"{finding.aliased_bytes:,} of {finding.page_bytes:,} bytes of pages aliased "
                f"({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
