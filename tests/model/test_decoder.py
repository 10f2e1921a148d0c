"""The JAX decoder by itself, over fresh pages, against transformers and the reference."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from model.attention import Tokens
from model.loading import load_weights
from model.pages import empty_pages
from model.partition import Partition, abstract_weights
from sharding.mesh import MeshShape, make_meshes
from tests.assets import needs_assets
from tests.model.reference import FAMILY_NAMES, load_expected, load_family, logits
from tests.serve.harness import LATENT, ArraySource, random_prompts, random_weights

# Float32 moves these logits by up to 2.4e-4 in transformers, and by as much here (Gemma 3; most by
# half of it). The reference computes in float64, so there ours is the only rounding.
TRANSFORMERS_TOLERANCE = 1e-3
REFERENCE_TOLERANCE = 3e-4

PAGE_SIZE = 16
LONGEST = 130

# With a window, alternating windows and two ropes, sinks, norms over all heads, experts, latents.
CHUNKED_FAMILIES = ("mistral", "gemma3_text", "gpt_oss", "olmo2", "qwen3_moe", "deepseek_v3")


def all_logits(config, arrays, prompts, chunk):
    """[T, V] for each prompt: prefilled together, `chunk` tokens a call."""
    partition = Partition(config, 1, 1)
    (mesh,) = make_meshes(MeshShape())
    graph, _ = abstract_weights(partition, jnp.dtype("float32"))
    weights = load_weights(partition, ArraySource(arrays), mesh, jnp.dtype("float32"))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[0] if path[0].key == "layers" else leaf, weights
    )

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def forward(weights, pages, token_ids_N, places):
        decoder = nnx.merge(graph, weights)
        tokens = Tokens(*places, num_decode=0, chunk=chunk)
        x_ND, pages = decoder.run(decoder.embed(token_ids_N), pages, tokens)
        return decoder.logits(x_ND), pages

    R, W = len(prompts), -(-LONGEST // PAGE_SIZE)
    tables_RW = 1 + np.arange(R * W).reshape(R, W)
    shape = (1 + R * W, PAGE_SIZE, config.num_kv_heads)
    heads = (*shape, config.head_dim), (*shape, config.value_dim)
    pages = [empty_pages(*heads, jnp.float32) for _ in config.layers]
    found = [np.zeros((0, config.vocab_size), np.float32) for _ in prompts]
    for start in range(0, LONGEST, chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts]
        token_ids_RT = np.array([part + [0] * (chunk - len(part)) for part in parts])
        at_T = np.arange(start, start + chunk)
        lengths_R = np.array([len(part) for part in parts])
        page_RT = tables_RW[:, np.minimum(at_T // PAGE_SIZE, W - 1)]
        page_RT = np.where(np.arange(chunk) < lengths_R[:, None], page_RT, 0)
        places = (
            np.tile(at_T, R),
            page_RT.reshape(-1),
            tables_RW,
            np.full(R, start),
            lengths_R,
        )
        places = tuple(place.astype(np.int32) for place in places)
        logits_NV, pages = forward(weights, pages, token_ids_RT.reshape(-1), places)
        logits_RTV = np.asarray(logits_NV).reshape(R, chunk, -1)
        found = [
            np.concatenate([before, new[:length]])
            for before, new, length in zip(found, logits_RTV, lengths_R, strict=True)
        ]
    return found


@needs_assets
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_logits_are_those_of_transformers_and_of_the_reference(family):
    config, arrays = load_family(family)
    prompts, _, expected = load_expected(family)
    found = all_logits(config, arrays, prompts, chunk=LONGEST)
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        last = ours[-len(theirs) :]
        np.testing.assert_allclose(last, theirs, rtol=0, atol=TRANSFORMERS_TOLERANCE)
        exact = logits(config, arrays, prompt)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=REFERENCE_TOLERANCE)


@needs_assets
@pytest.mark.parametrize("family", CHUNKED_FAMILIES)
def test_logits_over_a_cached_prefix_are_those_of_the_whole_prompt(family):
    config, arrays = load_family(family)
    prompts, _, _ = load_expected(family)
    found = all_logits(config, arrays, prompts, chunk=45)
    for prompt, ours in zip(prompts, found, strict=True):
        exact = logits(config, arrays, prompt)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=REFERENCE_TOLERANCE)


def test_queries_of_latent_attention_may_come_straight_from_x():
    assert LATENT.latent
    config = replace(LATENT, latent=replace(LATENT.latent, q_rank=None))
    arrays, prompts = random_weights(config), random_prompts(config, (40, 3))
    for prompt, ours in zip(prompts, all_logits(config, arrays, prompts, LONGEST), strict=True):
        exact = logits(config, arrays, prompt)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=REFERENCE_TOLERANCE)
