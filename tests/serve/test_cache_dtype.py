"""Keys and values in 8 bits: what they cost in exactness, and that nothing else changes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from serve.programs import CacheShape
from sharding.mesh import MeshShape, parse_mesh
from tests.serve.harness import (
    DENSE,
    compile_few,
    generate,
    greedy,
    make_parts,
    next_logits,
    random_prompts,
    random_weights,
)

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.15, "float8_e4m3fn": 0.6}
"""How far log probabilities of this model may move. They were seen to by up to 0.06, 0.08 and 0.37
where numbers are rounded to 8, 7 and 4 bits: each bit less is about twice as much."""
NUM_TOKENS = 14


@functools.cache
def weights():
    return random_weights(DENSE)


@functools.cache
def answers(dtype, mesh=""):
    """Prompts and answers; the longest prompt takes two steps, the second beside decode rows."""
    prompts = random_prompts(DENSE, (1, 70, 17, 33))
    shape = parse_mesh(mesh) if mesh else MeshShape()
    parts = make_parts(DENSE, weights(), shape, cache_dtype=dtype)
    compile_few(parts.runner)
    requests = [greedy(f"r{i}", prompt, NUM_TOKENS, logprobs=1) for i, prompt in enumerate(prompts)]
    found = generate(parts.engine(), requests)
    return [(request.prompt_ids, found[request.request_id]) for request in requests]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_log_probabilities_move_by_no_more_than_the_dtype_rounds(dtype):
    for prompt, answer in answers(dtype):
        logits = next_logits(DENSE, weights(), prompt, answer.token_ids)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logits[np.arange(NUM_TOKENS), answer.token_ids]
        found = np.array([place.logprob for place in answer.logprobs])
        assert np.abs(found - expected).max() < TOLERANCES[dtype]


@pytest.mark.parametrize("mesh", ["tensor=2", "stage=2", "stage=2,tensor=4"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_every_mesh_writes_the_same_tokens(dtype, mesh):
    on_one = [answer.token_ids for _, answer in answers(dtype)]
    assert [answer.token_ids for _, answer in answers(dtype, mesh)] == on_one


def test_pages_of_8_bits_take_half_and_scales_a_number_for_each_head():
    partition = make_parts(DENSE, weights()).runner.programs.partition
    wide, fp8, int8 = (
        CacheShape(8, 16, jnp.dtype(dtype)).page_bytes(partition)
        for dtype in ("bfloat16", "float8_e4m3fn", "int8")
    )
    assert fp8 * 2 == wide
    scales = 2 * 16 * DENSE.num_kv_heads * DENSE.num_layers * 4
    assert int8 == fp8 + scales
