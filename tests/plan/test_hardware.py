from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import Experts, Layer, Rope
from plan.hardware import (
    FOLDER,
    NoFloor,
    Precision,
    RowWork,
    UnknownHardware,
    floor_s,
    hardware_names,
    load_hardware,
    read_hardware,
    step_work,
)
from plan.models import load_model

INT8 = Precision(weights="int8")
FP8 = Precision("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn")
BF16 = Precision()
TINY = load_model("tiny")


@pytest.mark.parametrize(
    ("model", "batch", "context", "precision", "milliseconds"),
    [
        ("llama-3.1-8b", 1, 1024, BF16, 3.52),
        ("llama-3.1-8b", 8, 1024, BF16, 3.74),
        ("llama-3.1-8b", 32, 1024, BF16, 4.49),
        ("llama-3.1-8b", 64, 1024, BF16, 5.49),
        ("llama-3.1-8b", 128, 1024, BF16, 7.49),
        ("llama-3.1-8b", 256, 1024, BF16, 12.9),
        ("llama-3.1-8b", 1, 8192, BF16, 3.74),
        ("llama-3.1-8b", 64, 8192, BF16, 19.5),
        ("llama-3.1-8b", 1, 1024, INT8, 1.78),
        ("llama-3.1-8b", 64, 1024, INT8, 3.74),
        ("llama-3.1-8b", 1, 1024, FP8, 1.76),
        ("llama-3.1-8b", 128, 1024, FP8, 3.74),
        ("qwen3-0.6b", 1, 1024, BF16, 0.30),
        ("qwen3-0.6b", 64, 1024, BF16, 2.03),
    ],
)
def test_decode_floors_are_those_worked_out_for_an_h200(
    model, batch, context, precision, milliseconds
):
    work = step_work(load_model(model), [RowWork(1, context - 1)] * batch, precision)
    floor_ms = 1e3 * floor_s(work, load_hardware("h200"), precision.products)
    assert floor_ms == pytest.approx(milliseconds, rel=0.02)  # the figures have three digits or two


@pytest.mark.parametrize(("tokens", "milliseconds"), [(1024, 18.4), (4096, 77.9), (8192, 167)])
def test_prefill_floors_are_those_worked_out_for_an_h200(tokens, milliseconds):
    work = step_work(load_model("llama-3.1-8b"), [RowWork(tokens, 0)])
    floor_ms = 1e3 * floor_s(work, load_hardware("h200"))
    assert floor_ms == pytest.approx(milliseconds, rel=0.01)


rows = st.lists(st.builds(RowWork, st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4)


@given(rows, st.sampled_from([None, 1, 4, 30]))
def test_attention_counts_every_pair_of_query_and_key_that_it_sees(rows, window):
    model = replace(TINY, layers=(Layer(Rope(1e4), window),))
    pairs = moved = 0
    for row in rows:
        visible = set()
        for query in range(row.cached, row.cached + row.new):
            keys = [k for k in range(query + 1) if window is None or query - k < window]
            pairs += len(keys)
            visible |= set(keys)
        moved += len({key for key in visible if key < row.cached}) + row.new
    work = step_work(model, rows)
    assert work.attention_flops == pairs * 2 * model.num_heads * 2 * model.head_dim
    assert work.cache_bytes == moved * 2 * model.num_kv_heads * model.head_dim * 2


def test_tensor_shards_share_all_work_equally():
    whole, shard = (step_work(TINY, [RowWork(1, 99)] * 8, tensor=tensor) for tensor in (1, 8))
    for part in ("weight_bytes", "cache_bytes", "weight_flops", "attention_flops"):
        assert getattr(shard, part) == getattr(whole, part) // 8


def test_kv_heads_are_repeated_where_there_are_fewer_than_shards():
    model = replace(TINY, num_kv_heads=2)
    two, eight = (step_work(model, [RowWork(1, 99)], tensor=tensor) for tensor in (2, 8))
    assert eight.cache_bytes == two.cache_bytes
    assert eight.weight_bytes > two.weight_bytes // 4


def test_stages_share_arithmetic_but_read_weights_for_every_micro_batch():
    whole, stage = (step_work(TINY, [RowWork(1, 99)] * 8, stages=stages) for stages in (1, 4))
    assert stage.weight_bytes == whole.weight_bytes
    assert stage.weight_flops == whole.weight_flops // 4
    assert stage.cache_bytes == whole.cache_bytes // 4


def test_a_model_with_experts_has_no_floor_yet():
    experts = Experts(num_experts=8, top_k=2, size=32, normalize=True)
    model = replace(TINY, layers=(Layer(Rope(1e4), experts=True),), experts=experts)
    with pytest.raises(NoFloor, match="floor of a model with experts is not worked out"):
        step_work(model, [RowWork(1, 9)])


@pytest.mark.parametrize("name", hardware_names())
def test_a_hardware_file_opens_with_what_it_is_and_can_be_read(name):
    assert (FOLDER / f"{name}.toml").read_text().startswith("# ")
    assert load_hardware(name).rate("bfloat16") > 0


def test_unknown_hardware_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownHardware, match=r"no hardware h20; did you mean h200\?"):
        load_hardware("h20")


def test_a_rate_that_hardware_has_not_is_refused():
    with pytest.raises(NoFloor, match="two CPU cores has no rate of int8 products"):
        load_hardware("cpu").rate("int8")


GOOD = """
title = "x"
memory_bytes = 1
copy_bytes_per_s = 2e9
[flops_per_s]
bfloat16 = 3e12
"""


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("memory_bytes", "memory_byte", "no key memory_byte; did you mean memory_bytes"),
        ("memory_bytes = 1", "", "has no memory_bytes"),
        ("memory_bytes = 1", "memory_bytes = 0", "memory_bytes is 0; it must be a positive number"),
        ("2e9", '"fast"', "copy_bytes_per_s is 'fast'; it must be a positive number"),
        ("bfloat16", "bfloat61", r"no key flops_per_s\.bfloat61; did you mean .*bfloat16"),
        ("[flops_per_s]\nbfloat16 =", "flops_per_s =", "flops_per_s is 3.*must be a table"),
        ("[flops_per_s]", "[flops_per_s", "at line 5"),
    ],
)
def test_a_hardware_file_with_a_mistake_is_refused(tmp_path, good, bad, complaint):
    path = tmp_path / "odd.toml"
    path.write_text(GOOD.replace(good, bad))
    with pytest.raises(UnknownHardware, match=complaint):
        read_hardware(path)
