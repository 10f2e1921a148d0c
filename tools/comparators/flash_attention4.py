"""FlashAttention 4, written in CuTe's Python: compiled here, ahead, into an object with its cubin.

Its compiler and PyTorch, which its package imports, stay here. What is linked of NVIDIA's is a
static library of 50 kB; nothing of theirs may be committed (EULA).
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.environment import ensure_environment
from plan.comparator_trial import FA4_PAGE_SIZES, GROUP_SIZE, HEAD_DIM
from plan.kinds.kernel import Kernel
from plan.machine import ROOT
from tools.comparators.source import FOLDER, BuildError, Source

CACHE = ROOT / ".cache" / "comparators"
INSTALLS = (
    ("torch==2.13.0",),
    ("nvidia-cutlass-dsl[cu13]==4.8.1", "numpy==2.4.6"),
    ("einops==0.8.2", "apache-tvm-ffi==0.1.15.post2"),
    # Triton is imported, not run.
    ("--no-deps", "triton==3.9.0", "quack-kernels==0.6.5", "torch-c-dlpack-ext==0.1.5"),
    ("--no-deps", "flash-attn-4==4.0.0b36"),
)


@dataclass(frozen=True)
class FlashAttention4(Source):
    def fetch(self) -> Path:
        return ensure_environment(CACHE / "flash_attention4", "3.11", INSTALLS)

    def words(self, fetched: Path) -> list[str]:
        """`fetched` is its Python. The object is made anew: in some seconds."""
        objects = CACHE / f"fa4_{self.call.page_size}"
        objects.mkdir(parents=True, exist_ok=True)
        shape = HEAD_DIM, GROUP_SIZE, self.call.page_size
        done = subprocess.run(
            [str(fetched), str(FOLDER / "export_fa4.py"), str(objects), *map(str, shape)],
            # Without it, and without a GPU, CuTe compiles for another one.
            env=os.environ | {"CUTE_DSL_ARCH": "sm_90a"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise BuildError(f"CuTe does not compile FlashAttention 4:\n{done.stderr}".strip())
        (libraries,) = fetched.parents[1].glob("lib/python*/site-packages/nvidia_cutlass_dsl/cu13")
        return [
            f"-I{objects}",
            f"-DHEAD_DIM={HEAD_DIM}",
            str(objects / "fa4.o"),
            str(libraries / "lib" / "libcuda_dialect_runtime_static.a"),
        ]


FLASH_ATTENTION4: Mapping[str, Source] = {
    f"fa4_{page_size}": FlashAttention4(
        "fa4.cu",
        Kernel(
            "prefill_attention",
            "flash_attention4",
            prompt=1024,
            context=0,
            page_size=page_size,
        ),
    )
    for page_size in FA4_PAGE_SIZES
}
