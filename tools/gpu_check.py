"""Compiles the steps for H200s that are not there, and fails when one costs more than its budget.

    make gpu-check                          # all, against configs/budgets/h200.toml
    make gpu-check ARGS=--update            # rewrites that file from what is found
    make gpu-check ARGS='--list "decode 64"'   # one layer's work, in order

It can't time anything (`plan/described.py`): launches and bytes are what it holds the steps to.
"""

import argparse
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from model.kernel_choice import kernels_for
from model.partition import Partition
from model.step import StepShape
from plan.compiled import Kind, Operation, Program, examine, launches
from plan.described import CompilerMissing, compile_described, described_mesh
from plan.models import load_model
from serve.limits import Limits
from serve.page_images import PageImages
from serve.programs import CacheShape, Programs
from sharding.mesh import MeshShape
from sharding.rules import REPLICATED
from tools.budgets import (
    BudgetError,
    Case,
    Cost,
    Traffic,
    could_shrink,
    exceeded,
    read_budgets,
    write_budgets,
)

BUDGETS = Path(__file__).parents[1] / "configs" / "budgets" / "h200.toml"

LIMITS = Limits(
    max_batch=64, token_budget=2048, chunk=512, max_steps=8, max_queue=1, max_context=8192
)
CACHE = CacheShape(num_pages=8192, page_size=64, dtype=jnp.bfloat16)
MODELS = (
    "llama-3.1-8b",
    "llama-3.1-8b int8",
    "llama-3.1-8b fp8",
    "llama-3.1-8b fp8 xla_8bit",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
)
"""Files in configs/models, some with weights quantized, and then with a kernel for products."""
MESHES = {
    str(shape): shape for shape in (MeshShape(), MeshShape(tensor=8), MeshShape(stage=2, tensor=4))
}
STEPS = {
    "decode 1": StepShape(1, 0, LIMITS.chunk, 1),
    "decode 64": StepShape(64, 0, LIMITS.chunk, 1),
    "loop 64": StepShape(64, 0, LIMITS.chunk, LIMITS.max_steps),
    "prefill": StepShape(0, 4, LIMITS.chunk, 1),
    "mixed": StepShape(64, 4, LIMITS.chunk, 1),
    "narrow": StepShape(64, 1, LIMITS.chunk // 16, 1),
}
"""Decode rows, or prefill rows of 512 tokens (one of 32 where it is narrow), or both."""
MOVES = ("copy pages", "read pages", "write pages")
"""What goes on between steps: up to as many copies as a step admits, and pages to tiers and other
engines, or from them. Of one model, since they know nothing of it but a page's size."""
NUM_MOVED = 4

ALONE = {
    "llama-3.1-8b int8": ("decode 1", "decode 64", "prefill"),
    "llama-3.1-8b fp8": ("decode 1", "decode 64", "prefill"),
    "llama-3.1-8b fp8 xla_8bit": ("decode 64", "prefill"),
    "qwen3-30b-a3b": ("decode 64",),
}
"""Models that differ from others in products or experts alone, and so are checked on one device in
these steps: that is minutes less."""


def _is_checked(model: str, mesh: str, step: str) -> bool:
    if step in MOVES:
        return model == MODELS[0]
    if model in ALONE:
        return mesh == str(MeshShape()) and step in ALONE[model]
    return mesh == str(MeshShape()) or step not in ("decode 1", "loop 64", "narrow")


CASES = [case for case in product(MODELS, MESHES, (*STEPS, *MOVES)) if _is_checked(*case)]
"""One row and the loop differ from 64 rows in what one device shows."""

FEW, MORE = 2, 4
"""Layers of a stage in the two programs that are compiled for each case. What one more layer costs
is half their difference; the rest is outside of layers. All layers are alike."""

LARGE = 64 * 2**10
"""Bytes from which a copy or slice counts. A step's packed metadata is smaller."""

TABLE = "{:26} {:17} {:10} {:>9} {:>11} {:>9} {:>9} {:>6} {:>9}   {}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    models, meshes = arguments.model or MODELS, arguments.mesh or list(MESHES)
    try:
        if arguments.list:
            case = (models[0], meshes[0], arguments.list)
            print("\n".join(listing(*(compile_case(case, layers) for layers in (FEW, MORE)))))
            return 0
        chosen = product(models, meshes, arguments.step or (*STEPS, *MOVES))
        return check([case for case in chosen if case in CASES], BUDGETS, arguments.update)
    except (BudgetError, CompilerMissing) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1


def check(cases: Sequence[Case], path: Path, update: bool) -> int:
    """Finds the cost of every case, as many at once as there are cores; a line for each."""
    budgets = read_budgets(path)
    if not cases:
        raise BudgetError(f"none is checked of the steps asked for; {len(CASES)} others are")
    print(_header(), flush=True)
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    found: dict[Case, Cost] = {}
    with ProcessPoolExecutor(min(len(cases), len(os.sched_getaffinity(0))), context) as pool:
        for case, cost in zip(cases, pool.map(case_cost, cases), strict=True):
            found[case] = cost
            print(row(case, cost), flush=True)
    print(f"{len(cases)} steps compiled in {time.monotonic() - started:.0f} s")
    if update:
        budgets |= found
        write_budgets(path, {case: budgets[case] for case in CASES if case in budgets})
        print(f"wrote {path}")
    complaints, remarks = judge(found, budgets)
    print("\n".join([*complaints, *remarks]) or "each within its budget")
    return 1 if complaints else 0


def judge(found: dict[Case, Cost], budgets: dict[Case, Cost]) -> tuple[list[str], list[str]]:
    """What is wrong, and what may be worth knowing."""
    complaints: list[str] = []
    loose: list[Case] = []
    for case, cost in found.items():
        name = ", ".join(case)
        if cost.lost_bytes:
            complaints.append(
                f"{name}: {cost.lost_bytes:,} donated bytes are not taken over by an output"
            )
        if case not in budgets:
            complaints.append(f"{name}: has no budget; add it by {_command([case])}")
            continue
        budget = replace(budgets[case], lost_bytes=cost.lost_bytes)
        complaints += [f"{name}: {part}" for part in exceeded(cost, budget)]
        if could_shrink(cost, budget):
            loose.append(case)
    if not loose:
        return complaints, []
    return complaints, [f"{len(loose)} could be lower; lower them by {_command(loose)}"]


def case_cost(case: Case) -> Cost:
    return cost_of(compile_case(case, FEW), compile_case(case, MORE))


def compile_case(case: Case, layers: int) -> Program:
    """The step with `layers` layers on each stage."""
    model, mesh, step = case
    shape = MESHES[mesh]
    name, _, form = model.partition(" ")
    quantization, _, products = form.partition(" ")
    config = replace(load_model(name, layers * shape.stage), quantization=quantization or None)
    partition = Partition(config, shape.stage, shape.tensor)
    programs = Programs(
        partition,
        described_mesh(shape),
        CACHE,
        LIMITS,
        table_width=LIMITS.max_context // CACHE.page_size,
        dtype=jnp.bfloat16,
        asked_kernels=kernels_for("gpu", {"small_matmul": products or "auto"}),
    )
    return examine(compile_described(*_program(programs, step)))


def _program(programs: Programs, step: str) -> tuple[Any, Any, Any]:
    """What is jitted, and its arguments as shapes and where they lie."""
    state, cut = programs.abstract_state(), programs.shardings(programs.argument_cuts()[1])
    whole = programs.shardings(REPLICATED)
    numbers = jax.ShapeDtypeStruct((NUM_MOVED,), jnp.int32)
    images = PageImages(programs)
    match step:
        case "copy pages":
            most = jax.ShapeDtypeStruct((LIMITS.max_chunk_rows,), jnp.int32)
            num = jax.ShapeDtypeStruct((), jnp.int32)
            return programs.jit_copy(), (state, most, most, num), (cut, whole, whole, whole)
        case "read pages":
            return images.jit_read, (state.pages, numbers), (cut.pages, whole)
        case "write pages":
            arguments = (state, numbers, images.whole_shapes(NUM_MOVED))
            return images.jit_write, arguments, (cut, whole, images.whole)
        case _:
            shape = STEPS[step]
            if 0 < shape.num_decode < programs.partition.stages:
                # A row for each micro-batch.
                shape = replace(shape, num_decode=programs.partition.stages)
            arguments = programs.abstract_arguments(shape)
            return programs.jit_step(shape), arguments, programs.shardings(programs.argument_cuts())


def cost_of(few: Program, more: Program) -> Cost:
    """What a step costs, from its programs of FEW and of MORE layers."""

    def layer_and_rest(count: Callable[[Program], int]) -> tuple[int, int]:
        layer = math.ceil((count(more) - count(few)) / (MORE - FEW))
        return max(layer, 0), max(count(more) - MORE * layer, 0)

    layer_launches, launched = layer_and_rest(lambda program: program.num_launches)
    layer_loops, loops = layer_and_rest(_num_loops)
    layer_traffic: Traffic = {}
    traffic: Traffic = {}
    for kind in more.collectives:
        runs, sent = (
            layer_and_rest(lambda program, kind=kind, i=i: program.collectives.get(kind, (0, 0))[i])
            for i in (0, 1)
        )
        layer_traffic |= {kind: (runs[0], sent[0])} if runs[0] else {}
        traffic |= {kind: (runs[1], sent[1])} if runs[1] else {}
    return Cost(
        layer_launches=layer_launches,
        layer_loops=layer_loops,
        layer_collectives=layer_traffic,
        launches=launched,
        loops=loops,
        collectives=traffic,
        copy_bytes=more.moved_bytes(Kind.COPY, LARGE),
        slice_bytes=more.moved_bytes(Kind.SLICE, LARGE),
        sorts=len(more.of(Kind.SORT)),
        callbacks=len(more.of(Kind.CALLBACK)),
        temp_bytes=more.temp_bytes,
        lost_bytes=more.donated_bytes - more.aliased_bytes,
    )


def _num_loops(program: Program) -> int:
    return sum(op.runs for op in program.of(Kind.LOOP, Kind.BRANCH) if not op.optional)


def listing(few: Program, more: Program) -> list[str]:
    """The work of one layer in order, then that of the step but for its layers."""
    operations = more.operations
    most = (len(operations) - len(few.operations)) // (MORE - FEW)
    layer = repeated(operations, most)
    if not layer:
        title = f"no stretch of {most} operations repeats; the whole step of {MORE} layers:"
        return [title, *_lines(operations)]
    rest = Counter(operations)
    rest.subtract({op: MORE * count for op, count in Counter(layer).items()})
    outside: list[Operation] = []
    for operation in operations:
        if rest[operation] > 0:
            rest[operation] -= 1
            outside.append(operation)
    return [
        f"one layer, from where the pattern begins: {_num_launches(layer)} launches",
        *_lines(layer),
        "",
        f"the rest of the step: {_num_launches(outside)} launches, and those of branches",
        *_lines(outside),
    ]


def repeated(operations: Sequence[Operation], most: int) -> Sequence[Operation]:
    """The longest stretch, of more than half of `most` operations, that comes twice in a row."""
    for length in range(most, most // 2, -1):
        for start in range(len(operations) - 2 * length + 1):
            middle, end = start + length, start + 2 * length
            if operations[start:middle] == operations[middle:end]:
                return operations[start:middle]
    return ()


def _lines(operations: Iterable[Operation]) -> list[str]:
    return [
        f"{'  ' * op.depth + op.kind:16} {op.what:34.34} {op.place:36} {op.num_bytes:>15,}"
        f"{f' x{op.runs}' if op.runs > 1 else ''}{' (in a branch)' if op.optional else ''}"
        for op in operations
    ]


def _num_launches(operations: Iterable[Operation]) -> int:
    return sum(op.runs for op in operations if launches(op) and not op.optional)


def _header() -> str:
    names = ("copied", "sliced", "sorts", "temp")
    return TABLE.format(
        "model", "mesh", "step", "per layer", "other", *names, "collectives per layer; other"
    )


def row(case: Case, cost: Cost) -> str:
    """A line of the table: launches and, after a plus, loops and branches."""
    sizes = (cost.copy_bytes, cost.slice_bytes)
    return TABLE.format(
        *case,
        f"{cost.layer_launches}+{cost.layer_loops}",
        f"{cost.launches}+{cost.loops}",
        *(_size(size) for size in sizes),
        cost.sorts,
        _size(cost.temp_bytes),
        f"{_shown(cost.layer_collectives)}; {_shown(cost.collectives)}",
    )


def _size(num_bytes: int) -> str:
    if not num_bytes:
        return "0"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def _shown(traffic: Traffic) -> str:
    shown = [f"{runs} {kind} of {_size(sent)}" for kind, (runs, sent) in traffic.items()]
    return ", ".join(shown) or "none"


def _command(cases: Sequence[Case]) -> str:
    """What rewrites the budgets of `cases` alone."""
    chosen = [sorted(set(part)) for part in zip(*cases, strict=True)]
    every = [sorted(MODELS), sorted(MESHES), sorted((*STEPS, *MOVES))]
    words = ["--update"]
    for option, some, whole in zip(("--model", "--mesh", "--step"), chosen, every, strict=True):
        if some != whole:
            words += [word for name in some for word in (option, name)]
    return f"make gpu-check ARGS={shlex.quote(shlex.join(words))}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--mesh", action="append", choices=MESHES)
    parser.add_argument("--step", action="append", choices=(*STEPS, *MOVES))
    parser.add_argument("--update", action="store_true", help=f"rewrite {BUDGETS.name}")
    parser.add_argument(
        "--list", metavar="STEP", choices=(*STEPS, *MOVES), help="print a layer's work"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
