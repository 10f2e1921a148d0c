import math

import jax.numpy as jnp
import pytest

from model.partition import Partition
from serve.programs import CacheShape
from tests.serve.harness import DENSE, LATENT


@pytest.mark.parametrize("config", [DENSE, LATENT], ids=lambda config: config.architecture)
@pytest.mark.parametrize(("stages", "tensor"), [(1, 1), (1, 8), (2, 4)])
def test_a_pages_bytes_are_those_of_the_arrays_it_lies_in(config, stages, tensor):
    cache = CacheShape(num_pages=5, page_size=16, dtype=jnp.dtype("bfloat16"))
    partition = Partition(config, stages, tensor)
    layer_slot = sum(math.prod(array.shape) * 2 for array in cache.arrays(partition))
    on_each_device = partition.layers_per_stage * layer_slot // (stages * tensor)
    assert cache.page_bytes(partition) * cache.num_pages == on_each_device
