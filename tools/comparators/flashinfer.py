"""FlashInfer's kernels, whose sources come in its wheel: XQA and FlashAttention 3."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.environment import ensure_environment
from plan.comparator_trial import GROUP_SIZE, HEAD_DIM, PAGE_SIZE
from plan.kinds.kernel import Kernel
from plan.machine import ROOT
from tools.comparators.source import Source

PACKAGE = "flashinfer-python==0.7.2.post1"


@dataclass(frozen=True)
class FlashInfer(Source):
    theirs: tuple[str, ...]
    """In csrc/xqa."""
    macros: Mapping[str, int]

    def fetch(self) -> Path:
        folder = ROOT / ".cache" / "comparators" / "flashinfer"
        # It is read, not run: without what it depends on, PyTorch above all.
        ensure_environment(folder, "3.12", [("--no-deps", "--no-compile", PACKAGE)])
        return folder / "lib" / "python3.12" / "site-packages" / "flashinfer" / "data"

    def words(self, fetched: Path) -> list[str]:
        xqa = fetched / "csrc" / "xqa"
        headers = (
            xqa,
            fetched / "include",
            fetched / "cutlass" / "include",
            fetched / "cccl" / "libcudacxx" / "include",
        )
        return [
            # As FlashInfer compiles them.
            "-use_fast_math",
            "--expt-relaxed-constexpr",
            *(f"-I{folder}" for folder in headers),
            *(f"-D{macro}={value}" for macro, value in self.macros.items()),
            *(str(xqa / file) for file in self.theirs),
        ]


# csrc/xqa/defines.h says what they mean.
XQA = {
    "BEAM_WIDTH": 1,
    "HEAD_ELEMS": HEAD_DIM,
    "HEAD_GRP_SIZE": GROUP_SIZE,
    "INPUT_FP16": 0,
    "LOW_PREC_OUTPUT": 0,
    "SLIDING_WINDOW": 0,
    "SPEC_DEC": 0,
    "TOKENS_PER_PAGE": PAGE_SIZE,
    "USE_CUSTOM_BARRIER": 1,
    "USE_INPUT_KV": 0,
}
FLASHINFER: Mapping[str, Source] = {
    # Of bfloat16 pages FlashInfer gives Hopper the kernel that it has for Ampere.
    "xqa_bfloat16": FlashInfer(
        "xqa.cu",
        Kernel("decode_attention", "flashinfer"),
        ("mha.cu",),
        {**XQA, "CACHE_ELEM_ENUM": 0},
    ),
    "xqa_float8_e4m3fn": FlashInfer(
        "xqa.cu",
        Kernel("decode_attention", "flashinfer", cache_dtype="float8_e4m3fn"),
        ("mha_sm90.cu", "tensorMap.cpp"),
        {**XQA, "CACHE_ELEM_ENUM": 2},
    ),
    "fa3": FlashInfer(
        "fa3.cu",
        Kernel("prefill_attention", "flashinfer", prompt=1024, context=0),
        (),
        {"CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED": 1},
    ),
}
