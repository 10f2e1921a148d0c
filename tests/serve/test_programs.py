import jax.numpy as jnp
import pytest

from model.partition import Partition
from serve.programs import CacheShape
from tests.serve.harness import DENSE, LATENT


@pytest.mark.parametrize(("dtype", "number", "scale"), [("bfloat16", 2, 0), ("int8", 1, 4)])
@pytest.mark.parametrize("config", [DENSE, LATENT], ids=lambda config: config.architecture)
@pytest.mark.parametrize(("stages", "tensor"), [(1, 1), (1, 8), (2, 4)])
def test_a_page_takes_its_tokens_keys_values_and_scales_on_each_device(
    config, stages, tensor, dtype, number, scale
):
    cache = CacheShape(num_pages=5, page_size=16, dtype=jnp.dtype(dtype))
    partition = Partition(config, stages, tensor)
    heads = partition.fitted.num_kv_heads // tensor
    a_head = number * (config.head_dim + config.value_dim) + 2 * scale
    assert cache.page_bytes(partition) == partition.layers_per_stage * 16 * heads * a_head
