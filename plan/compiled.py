"""What a compiled program does on one device: its work in order, its memory, what it sends.

It is read from the optimised module, on any back end and for devices that are not there. It does
not know what the program is for, or how long anything takes.
"""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import Any

import jax
from jax.stages import Compiled


class Kind(StrEnum):
    PRODUCT = "product"
    """A matrix product, by whatever means."""
    FUSION = "fusion"
    """Anything else that XLA makes itself."""
    KERNEL = "kernel"
    """Pallas: ours."""
    CALL = "call"
    """Into a library."""
    COPY = "copy"
    """An array written again as it is, in whatever order."""
    SLICE = "slice"
    """A part of a larger array written out as it is."""
    SORT = "sort"
    CALLBACK = "callback"
    """To the host."""
    COLLECTIVE = "collective"
    LOOP = "loop"
    """Of unknown length: after each turn the host may have to ask whether to go on."""
    BRANCH = "branch"
    """Only one side of it runs; which, the host may have to ask."""


NO_LAUNCH = {Kind.LOOP, Kind.BRANCH, Kind.CALLBACK}


@dataclass(frozen=True)
class Operation:
    """One piece of work, such as a kernel."""

    kind: Kind
    what: str
    """A kernel's name, a collective's kind, or the operation that was traced."""
    place: str
    """Where in the source, as folder/file.py:line; empty where the module doesn't say."""
    num_bytes: int
    """What one run writes; of a collective, what one device puts in."""
    runs: int
    """Over loops of known length; one of unknown length counts as one turn."""
    depth: int
    """Loops and branches around it."""
    optional: bool
    """On one side of a branch."""


@dataclass(frozen=True)
class Program:
    """All bytes are of one device."""

    operations: tuple[Operation, ...]
    """In the order they are started."""
    argument_bytes: int
    output_bytes: int
    donated_bytes: int
    aliased_bytes: int
    """Of the donated, those that an output takes over."""
    temp_bytes: int
    flops: float | None
    """As XLA counts them, whole loops as one turn; None where it doesn't count."""
    accessed_bytes: float | None

    def of(self, *kinds: Kind) -> list[Operation]:
        return [operation for operation in self.operations if operation.kind in kinds]

    @property
    def num_launches(self) -> int:
        """Kernels, copies and calls that run whatever the data."""
        return sum(op.runs for op in self.operations if launches(op) and not op.optional)

    def moved_bytes(self, kind: Kind, larger_than: int = 0) -> int:
        """Bytes of all runs of a kind, of operations of more than `larger_than` bytes."""
        return sum(op.num_bytes * op.runs for op in self.of(kind) if op.num_bytes > larger_than)

    @property
    def collectives(self) -> dict[str, tuple[int, int]]:
        """By kind, how often they run and the bytes that one device puts in."""
        found: dict[str, tuple[int, int]] = {}
        for op in self.of(Kind.COLLECTIVE):
            count, sent = found.get(op.what, (0, 0))
            found[op.what] = (count + op.runs, sent + op.runs * op.num_bytes)
        return dict(sorted(found.items()))


def launches(operation: Operation) -> bool:
    """Whether it is something that the device is given to run."""
    return operation.kind not in NO_LAUNCH


def examine(compiled: Compiled) -> Program:
    """What `compiled` holds."""
    memory: Any = compiled.memory_analysis()
    # XLA doesn't count for a device that is not there.
    cost = compiled.cost_analysis() or {}
    return Program(
        operations=read_operations(compiled.as_text() or ""),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        donated_bytes=_donated_bytes(compiled),
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=cost.get("flops"),
        accessed_bytes=cost.get("bytes accessed"),
    )


def read_operations(module: str) -> tuple[Operation, ...]:
    """The work in the text of an optimised, scheduled HLO module."""
    reader = _Reader(module)
    reader.walk(reader.entry, 1, 0, False)
    return tuple(reader.found)


COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
TO_HOST = {"infeed", "outfeed", "recv", "send"}
NO_WORK = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
REORDERS = {"bitcast", "copy", "reshape", "transpose"}
CUTS = {"dynamic-slice", "slice"}
PALLAS = {"__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2", "tpu_custom_call"}


@dataclass(frozen=True)
class _Instruction:
    name: str
    is_root: bool
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, *attributes: str) -> list[str]:
        """The computations that attributes such as body= name."""
        pattern = rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|(%[^\s,]+))"
        named = " ".join("".join(match) for match in re.findall(pattern, self.attributes))
        return re.findall(r"%([^\s,]+)", named)

    def attribute(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Body = dict[str, _Instruction]


@dataclass
class _Reader:
    module: str
    found: list[Operation] = field(default_factory=list)
    bodies: dict[str, Body] = field(default_factory=dict)
    entry: str = ""

    def __post_init__(self) -> None:
        head, _, _ = self.module.partition("\n\n%")
        self._places = _places(head)
        body: Body = {}
        for line in self.module.splitlines():
            if match := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
                body = self.bodies[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry
            elif match := re.match(r"  (ROOT )?%(\S+) = (.+?) ([a-z][a-z-]*)\(([^)]*)(.*)", line):
                root, name, type_, op, operands, attributes = match.groups()
                names = tuple(re.findall(r"%([^\s,]+)", operands))
                body[name] = _Instruction(name, bool(root), type_, op, names, attributes)

    def walk(self, computation: str, runs: int, depth: int, optional: bool) -> None:
        body = self.bodies[computation]
        for instruction in body.values():
            op = instruction.op.removesuffix("-start")
            if op in NO_WORK or op.endswith(("-done", "-update")):
                continue
            if op in ("call", "async"):
                for inner in instruction.called("to_apply", "calls"):
                    self.walk(inner, runs, depth, optional)
                continue
            if op == "while":
                trips = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
                if not trips:
                    self._add(Kind.LOOP, instruction, 0, runs, depth, optional)
                # The condition of a loop of known length isn't asked.
                for inner in instruction.called(*([] if trips else ["condition"]), "body"):
                    self.walk(inner, runs * int(trips or 1), depth + 1, optional)
                continue
            if op == "conditional":
                self._add(Kind.BRANCH, instruction, 0, runs, depth, optional)
                sides = ("branch_computations", "true_computation", "false_computation")
                for inner in instruction.called(*sides):
                    self.walk(inner, runs, depth + 1, True)
                continue
            fused = self.bodies[instruction.called("calls")[0]] if op == "fusion" else body
            kind = _kind(op, instruction, fused)
            num_bytes = _moved_bytes(kind, instruction, body, fused)
            if num_bytes or kind not in (Kind.COPY, Kind.SLICE):
                self._add(kind, instruction, num_bytes, runs, depth, optional)

    def _add(
        self,
        kind: Kind,
        instruction: _Instruction,
        num_bytes: int,
        runs: int,
        depth: int,
        optional: bool,
    ) -> None:
        place = self._places.get(instruction.attribute(r"stack_frame_id=(\d+)"), "")
        what = _what(kind, instruction)
        self.found.append(Operation(kind, what, place, num_bytes, runs, depth, optional))


def _kind(op: str, instruction: _Instruction, fused: Body) -> Kind:
    """`fused` is the body of a fusion, or else the computation the instruction stands in."""
    if op in COLLECTIVES:
        return Kind.COLLECTIVE
    if op in TO_HOST:
        return Kind.CALLBACK
    if op == "custom-call":
        return _call_kind(instruction.attribute(r'custom_call_target="([^"]*)"'))
    inside = {i.op for i in fused.values()} if op == "fusion" else {op}
    if inside & {"sort", "topk"}:
        return Kind.SORT
    if inside & {"dot", "convolution"}:
        return Kind.PRODUCT
    if op != "fusion":
        return Kind.SLICE if op in CUTS else Kind.COPY if op in REORDERS else Kind.FUSION
    steps = [_steps_from_parameter(i, fused) for i in _written(fused)]
    if not steps or any(step is None for step in steps):
        return Kind.FUSION
    return Kind.SLICE if any(step & CUTS for step in steps if step) else Kind.COPY


def _call_kind(target: str) -> Kind:
    if target in PALLAS:
        return Kind.KERNEL
    if "callback" in target:
        return Kind.CALLBACK
    if "cublas" in target or "matmul" in target:
        return Kind.PRODUCT
    if "TopK" in target or "Sort" in target:
        return Kind.SORT
    return Kind.CALL


def _written(fused: Body) -> list[_Instruction]:
    """What a fusion writes: its root, or the parts of its root."""
    root = next(i for i in fused.values() if i.is_root)
    return [fused[name] for name in root.operands] if root.op == "tuple" else [root]


def _steps_from_parameter(instruction: _Instruction, fused: Body) -> set[str] | None:
    """The operations between a parameter and this; None if they are more than moving data."""
    steps: set[str] = set()
    while instruction.op in REORDERS | CUTS:
        steps.add(instruction.op)
        instruction = fused[instruction.operands[0]]
    return steps if instruction.op == "parameter" else None


def _moved_bytes(kind: Kind, instruction: _Instruction, body: Body, fused: Body) -> int:
    if kind == Kind.COLLECTIVE:
        return sum(type_bytes(body[name].type) for name in instruction.operands)
    if instruction.op == "custom-call":
        return _call_bytes(instruction)
    if fused is body:
        return _written_bytes(instruction, body)
    return sum(_written_bytes(i, fused) for i in _written(fused))


def _call_bytes(instruction: _Instruction) -> int:
    """Without the arrays that are updated in place: the module doesn't say how much of them is."""
    aliased = instruction.attribute(r"output_to_operand_aliasing=\{(.*?\)\})")
    in_place = {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(", "{" + aliased)}
    outputs = re.findall(r"[a-z]\w*\[[\d,]*\]", instruction.type)
    return sum(type_bytes(type_) for i, type_ in enumerate(outputs) if i not in in_place)


def _written_bytes(instruction: _Instruction, body: Body) -> int:
    """An update in place writes the update alone."""
    while instruction.op == "bitcast" and instruction.operands[0] in body:
        instruction = body[instruction.operands[0]]
    updates = {"dynamic-update-slice": 1, "scatter": -1}
    if instruction.op in updates:
        return type_bytes(body[instruction.operands[updates[instruction.op]]].type)
    return type_bytes(instruction.type)


def _what(kind: Kind, instruction: _Instruction) -> str:
    traced = instruction.attribute(r'op_name="([^"]*)"').split("/")
    if kind == Kind.COLLECTIVE:
        return instruction.op.removesuffix("-start")
    if kind == Kind.KERNEL and len(traced) > 2 and "(" not in traced[-2]:
        return traced[-2]
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    return target or re.sub(r"\.\d+$", "", traced[-1] or instruction.name)


def _places(head: str) -> dict[str, str]:
    """By stack frame, its innermost line of source."""
    files = dict(re.findall(r'^(\d+) "(.*)"$', head.partition("FunctionNames")[0], re.MULTILINE))
    located = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", head, re.MULTILINE)
    lines = {
        id_: f"{'/'.join(PurePath(files[file]).parts[-2:])}:{line}" for id_, file, line in located
    }
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", head, re.MULTILINE)
    return {frame: lines[location] for frame, location in frames}


def type_bytes(hlo_type: str) -> int:
    """Bytes of an HLO type such as (bf16[8,2048]{1,0}, s32[])."""
    bits = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", hlo_type):
        width = re.search(r"\d+", dtype)
        size = 8 if dtype == "pred" else int(width[0]) if width else 0
        bits += size * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8


def _donated_bytes(compiled: Compiled) -> int:
    """Of the arguments that are donated and used."""
    arguments = jax.tree.leaves(compiled.args_info, is_leaf=lambda leaf: leaf is None)
    shardings = jax.tree.leaves(compiled.input_shardings, is_leaf=lambda leaf: leaf is None)
    return sum(
        math.prod(sharding.shard_shape(argument.shape)) * argument.dtype.itemsize
        for argument, sharding in zip(arguments, shardings, strict=True)
        if sharding is not None and argument.donated
    )
