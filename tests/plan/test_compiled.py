"""Programs compiled for the CPU, and the text of one that was compiled for an H200."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from plan.compiled import Kind, examine, read_operations, type_bytes
from sharding.collectives import from_last_stage, gather_vocab, sum_over_tensor, to_next_stage
from sharding.mesh import STAGE, TENSOR, MeshShape, make_meshes


def compiled(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile()


def test_bytes_of_arguments_outputs_and_donation_are_the_arrays():
    def step(state, x):
        return state.at[0].add(x), x[:2]

    kept = examine(compiled(step, (64, 8), (8,)))
    donated = examine(compiled(step, (64, 8), (8,), donate_argnums=0))
    assert kept.argument_bytes == donated.argument_bytes == 4 * (64 * 8 + 8)
    assert (kept.donated_bytes, kept.aliased_bytes) == (0, 0)
    assert donated.donated_bytes == donated.aliased_bytes == 4 * 64 * 8


def test_a_donation_that_no_output_takes_over_is_seen():
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        program = examine(compiled(lambda x: x.sum(), (64,), donate_argnums=0))
    assert (program.donated_bytes, program.aliased_bytes) == (256, 0)


def test_products_are_counted_with_their_flops():
    program = examine(compiled(lambda a, b, c: (a @ b) @ c, (8, 32), (32, 64), (64, 16)))
    assert [op.num_bytes for op in program.of(Kind.PRODUCT)] == [4 * 8 * 64, 4 * 8 * 16]
    assert program.flops == pytest.approx(2 * 8 * 64 * (32 + 16), rel=0.01)


def test_a_loop_of_known_length_counts_all_its_turns():
    def known(x, w):
        return lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    program = examine(compiled(known, (8, 32), (32, 32)))
    assert sum(op.runs for op in program.of(Kind.PRODUCT)) == 5
    assert not program.of(Kind.LOOP)


def test_a_loop_of_unknown_length_counts_one_turn_and_is_named():
    def unknown(x, w):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w), x)

    program = examine(compiled(unknown, (8, 32), (32, 32)))
    assert len(program.of(Kind.LOOP)) == 1
    assert [(op.runs, op.depth) for op in program.of(Kind.PRODUCT)] == [(1, 1)]


def test_work_on_a_side_of_a_branch_is_not_always_launched():
    def branch(x, w):
        return lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: jnp.sort(x))

    program = examine(compiled(branch, (8, 32), (32, 32)))
    assert len(program.of(Kind.BRANCH)) == 1
    assert all(op.optional for op in program.of(Kind.PRODUCT, Kind.SORT))
    assert program.of(Kind.SORT)
    always = [op for op in program.operations if op.kind != Kind.BRANCH and not op.optional]
    assert program.num_launches == len(always)


def test_a_call_to_the_host_is_seen():
    def calls(x):
        jax.debug.callback(lambda x: None, x.sum())
        return x + 1

    assert len(examine(compiled(calls, (8,))).of(Kind.CALLBACK)) == 1


def test_collectives_have_the_bytes_that_one_device_puts_in():
    mesh = make_meshes(MeshShape(stage=2, tensor=4))[0]

    def talk(x):
        y = sum_over_tensor(x)
        return gather_vocab(to_next_stage(from_last_stage(y)))

    spec = PartitionSpec(None, (STAGE, TENSOR))
    whole = PartitionSpec()
    function = jax.shard_map(talk, mesh=mesh, in_specs=spec, out_specs=whole, check_vma=False)
    sharding = NamedSharding(mesh, spec)
    program = examine(compiled(function, (4, 8 * 16), in_shardings=sharding))
    piece = 4 * 4 * 16
    assert program.collectives == {
        "all-gather": (2, piece + 4 * piece),  # over tensor, then over stages
        "all-reduce": (2, 2 * piece),
        "collective-permute": (1, piece),
    }


@pytest.mark.parametrize(
    ("hlo_type", "num_bytes"),
    [
        ("bf16[8,16]{1,0}", 256),
        ("(f32[4]{0}, pred[3]{0}, /*index=5*/s32[])", 23),
        ("f8e4m3fn[10]{0}", 10),
        ("s4[10]{0}", 5),
        ("f32[1,0,128]{2,1,0}", 0),
        ("token[]", 0),
    ],
)
def test_a_types_bytes_are_those_of_its_arrays(hlo_type, num_bytes):
    assert type_bytes(hlo_type) == num_bytes


# What XLA 0.11 made of a small step for an H200, cut down to what is read.
CUDA = """\
HloModule jit_f, is_scheduled=true

FileNames
1 "/home/someone/weft/model/linear.py"
2 "/home/someone/weft/model/kernels/attention.py"

FunctionNames
1 "matmul"

FileLocations
1 {file_name_id=1 function_name_id=1 line=15 end_line=15 column=8 end_column=8}
2 {file_name_id=2 function_name_id=1 line=40 end_line=40 column=8 end_column=8}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}


%gemm_fusion_dot_computation (p0: bf16[128,8,16], p1: bf16[2,128,128]) -> f32[8,128,128] {
  %p1 = bf16[2,128,128]{2,1,0} parameter(1)
  %slice.8 = bf16[1,128,128]{2,1,0} slice(%p1), slice={[1:2], [0:128], [0:128]}
  %bitcast.25 = bf16[8,16,128]{2,1,0} bitcast(%slice.8)
  %p0 = bf16[128,8,16]{2,1,0} parameter(0)
  ROOT %dot.2 = f32[8,128,128]{2,1,0} dot(%bitcast.25, %p0), lhs_batch_dims={0}
}

%fused_scatter (p0: bf16[512,128], p1: s32[128], p2: bf16[128,128]) -> bf16[1,512,128] {
  %p0 = bf16[512,128]{1,0} parameter(0)
  %p1 = s32[128]{0} parameter(1)
  %p2 = bf16[128,128]{1,0} parameter(2)
  %scatter.1 = bf16[512,128]{1,0} scatter(%p0, %p1, %p2), to_apply=%region
  ROOT %bitcast.9 = bf16[1,512,128]{2,1,0} bitcast(%scatter.1)
}

%wrapped_transpose (p0: bf16[128,64]) -> bf16[64,128] {
  %p0 = bf16[128,64]{1,0} parameter(0)
  ROOT %transpose.7 = bf16[64,128]{1,0} transpose(%p0), dimensions={1,0}
}

%fused_slice (p0: bf16[2,128,128], p1: s32[]) -> (bf16[1,128,128], bf16[128]) {
  %p0 = bf16[2,128,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %first = bf16[1,128,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,1}
  %second = bf16[1,1,128]{2,1,0} slice(%p0), slice={[0:1], [0:1], [0:128]}
  %bitcast.1 = bf16[128]{0} bitcast(%second)
  ROOT %tuple.1 = (bf16[1,128,128]{2,1,0}, bf16[128]{0}) tuple(%first, %bitcast.1)
}

%fused_sine (p0: bf16[128,128]) -> bf16[128,128] {
  %p0 = bf16[128,128]{1,0} parameter(0)
  %copy.1 = bf16[128,128]{0,1} copy(%p0)
  ROOT %sine.1 = bf16[128,128]{0,1} sine(%copy.1)
}

%body (p: (s32[], bf16[128,128])) -> (s32[], bf16[128,128]) {
  %p = (s32[], bf16[128,128]{1,0}) parameter(0)
  %x = bf16[128,128]{1,0} get-tuple-element(%p), index=1
  %sine = bf16[128,128]{0,1} fusion(%x), kind=kLoop, calls=%fused_sine, metadata={op_name="sin"}
  %copy.2 = bf16[128,128]{1,0} copy(%sine)
  ROOT %tuple.2 = (s32[], bf16[128,128]{1,0}) tuple(%n, %copy.2)
}

%condition (p: (s32[], bf16[128,128])) -> pred[] {
  %p = (s32[], bf16[128,128]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] fusion(%n), kind=kLoop, calls=%fused_compare
}

%fused_compare (p0: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %constant.1 = s32[] constant(3)
  ROOT %lt.8 = pred[] compare(%p0, %constant.1), direction=LT
}

%true_side (p: (bf16[128,128])) -> (bf16[128,128]) {
  %p = (bf16[128,128]{1,0}) parameter(0)
  %x = bf16[128,128]{1,0} get-tuple-element(%p), index=0
  %keys = (bf16[128,128]{1,0}, u8[64]{0}) custom-call(%x), \
custom_call_target="__cub$DeviceRadixSort"
  ROOT %tuple.3 = (bf16[128,128]{1,0}) tuple(%x)
}

%false_side (p: (bf16[128,128])) -> (bf16[128,128]) {
  ROOT %p = (bf16[128,128]{1,0}) parameter(0)
}

%async (p0: bf16[128,128]) -> bf16[64,128] {
  %p0 = bf16[128,128]{1,0} parameter(0)
  ROOT %scattered = bf16[64,128]{1,0} reduce-scatter(%p0), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (w: bf16[2,128,128], x: bf16[128,128], pages: bf16[512,128], i: s32[128]) -> bf16[] {
  %x = bf16[128,128]{1,0} parameter(1), metadata={op_name="x"}
  %w = bf16[2,128,128]{2,1,0} parameter(0)
  %kernel = bf16[128,128]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/while/body/paged_decode/pallas_call" stack_frame_id=2}
  %append = (bf16[128,64]{1,0}, bf16[512,128]{1,0}) custom-call(%x, %pages), \
custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{1}: (1, {})}, \
metadata={op_name="jit(f)/pallas_call"}
  %gemm = f32[8,128,128]{2,1,0} fusion(%kernel, %w), kind=kCustom, \
calls=%gemm_fusion_dot_computation, metadata={op_name="jit(f)/dot_general" stack_frame_id=1}
  %blas = (bf16[128,128]{1,0}, s8[4194304]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$gemm"
  %sum = ((bf16[128,128]{0,1}), bf16[128,128]{0,1}) all-reduce-start(%x), to_apply=%region
  %sum_done = bf16[128,128]{0,1} all-reduce-done(%sum)
  %part = ((bf16[128,128]{1,0}), bf16[64,128]{1,0}) async-start(%x), calls=%async
  %part_done = bf16[64,128]{1,0} async-done(%part)
  %loop = (s32[], bf16[128,128]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %until = (s32[], bf16[128,128]{1,0}) while(%start), condition=%condition, body=%body
  %turned = bf16[64,128]{1,0} fusion(%x), kind=kInput, calls=%wrapped_transpose
  %cut = (bf16[1,128,128]{2,1,0}, bf16[128]{0}) fusion(%w, %n), kind=kLoop, calls=%fused_slice
  %nothing = f32[1,0,128]{2,1,0} copy(%empty)
  %choice = (bf16[128,128]{1,0}) conditional(%p, %a, %b), true_computation=%true_side, \
false_computation=%false_side
  %written = bf16[1,512,128]{2,1,0} fusion(%pages, %i, %x), kind=kInput, calls=%fused_scatter, \
metadata={op_name="jit(f)/scatter"}
  ROOT %tuple.28 = (bf16[128,128]{1,0}) tuple(%x)
}
"""
KIB = 1024


def found(kind):
    return [op for op in read_operations(CUDA) if op.kind == kind]


def test_a_pallas_kernel_goes_by_its_name_and_place():
    named, unnamed = found(Kind.KERNEL)
    assert (named.what, named.place) == ("paged_decode", "kernels/attention.py:40")
    assert unnamed.what == "mosaic_gpu_v2"


def test_a_call_counts_what_it_writes_but_for_arrays_updated_in_place():
    assert [op.num_bytes for op in found(Kind.KERNEL)] == [32 * KIB, 16 * KIB]


def test_products_are_found_in_fusions_and_library_calls():
    assert [op.what for op in found(Kind.PRODUCT)] == ["dot_general", "__cublas$gemm"]
    assert found(Kind.PRODUCT)[0].place == "model/linear.py:15"


def test_a_scatter_in_place_writes_its_update_alone():
    written = [op for op in found(Kind.FUSION) if op.what == "scatter"]
    assert [op.num_bytes for op in written] == [32 * KIB]


def test_a_transpose_alone_is_a_copy_but_one_on_the_way_to_a_sine_is_not():
    copies = [(op.num_bytes, op.runs, op.depth) for op in found(Kind.COPY)]
    in_loops = [(32 * KIB, 3, 1), (32 * KIB, 1, 1)]
    assert copies == [*in_loops, (16 * KIB, 1, 0)]  # and none of no bytes


def test_parts_written_out_by_one_fusion_are_a_slice_of_both():
    assert [op.num_bytes for op in found(Kind.SLICE)] == [32 * KIB + 256]


def test_collectives_started_in_either_way_are_counted_once():
    assert [(op.what, op.num_bytes) for op in found(Kind.COLLECTIVE)] == [
        ("all-reduce", 32 * KIB),
        ("reduce-scatter", 32 * KIB),
    ]


def test_a_librarys_sort_is_a_sort_of_the_branch_it_is_in():
    assert [(op.optional, op.depth) for op in found(Kind.SORT)] == [(True, 1)]


def test_only_a_loop_of_unknown_length_asks_its_condition():
    assert len(found(Kind.LOOP)) == 1
    asked = [op for op in found(Kind.FUSION) if op.num_bytes == 1]
    assert [(op.runs, op.depth) for op in asked] == [(1, 1)]
