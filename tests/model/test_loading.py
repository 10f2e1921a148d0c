"""How weights are read onto a mesh: in bounded memory, each region once, all or nothing."""

import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.host_memory import aligned_empty
from model.loading import load_weights, stream_weights
from model.partition import Partition, abstract_weights
from sharding.mesh import MeshShape, make_meshes
from tests.serve.harness import DENSE, random_weights

CONFIG = replace(DENSE, hidden_size=256, mlp_size=1024, vocab_size=96, layers=DENSE.layers[:1] * 8)
"""Feed-forward weights are the largest, and there are more of them than devices or loaders."""


class WatchedSource:
    """Arrays of which it is counted how many bytes are in use at once, and how often each is read.

    Reading takes a while, as from a disk.
    """

    def __init__(self, arrays):
        self.arrays = arrays
        self.reads: Counter[tuple[str, str]] = Counter()
        self.peak_bytes = self._bytes = 0
        self._counting = threading.Lock()

    def read(self, name, index):
        part = self.arrays[name][index].copy()
        self._count(part.nbytes)
        weakref.finalize(part, self._count, -part.nbytes)
        time.sleep(0.002)
        with self._counting:
            self.reads[name, str(index)] += 1
        return part

    def _count(self, num_bytes):
        with self._counting:
            self._bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._bytes)


@pytest.fixture(scope="module")
def arrays():
    return random_weights(CONFIG)


ONE_DEVICE = MeshShape()


def load(source, shape=ONE_DEVICE, progress=lambda name, num_bytes: None):
    partition = Partition(CONFIG, shape.stage, shape.tensor)
    # Another dtype than the source's, whose arrays then don't become the devices'.
    return load_weights(
        partition, source, make_meshes(shape)[0], jnp.dtype("bfloat16"), progress=progress
    )


@pytest.mark.parametrize("shape", [ONE_DEVICE, MeshShape(tensor=2), MeshShape(stage=2, tensor=2)])
def test_host_memory_holds_one_shard_of_the_largest_weight_for_each_device(arrays, shape):
    source = WatchedSource(arrays)
    found = load(source, shape)
    largest = max(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(found))
    assert source.peak_bytes <= largest * 4 * shape.num_devices  # the source's are of 4 bytes
    assert source.peak_bytes >= largest * 4 * min(2, shape.num_devices), "several at once"


def test_what_several_devices_hold_is_read_once(arrays):
    source = WatchedSource(arrays)
    load(source, MeshShape(tensor=2))
    assert set(source.reads.values()) == {1}


def test_progress_tells_every_weight_and_all_bytes(arrays):
    told: list[tuple[str, int]] = []
    found = load(WatchedSource(arrays), MeshShape(tensor=2), lambda *weight: told.append(weight))
    leaves = jax.tree.leaves(found)
    assert len(told) == len({name for name, _ in told}) == len(leaves)
    assert sum(num_bytes for _, num_bytes in told) == sum(leaf.nbytes for leaf in leaves)


def test_an_error_of_the_source_ends_the_loading(arrays):
    class Broken(WatchedSource):
        def read(self, name, index):
            if name.startswith("layers.1."):
                raise OSError("the disk is gone")
            return super().read(name, index)

    source = Broken(arrays)
    with pytest.raises(OSError, match="the disk is gone"):
        load(source)
    assert len(source.reads) < len(arrays) / 2, "what was still to be read is not"


def test_a_weight_that_nobody_keeps_is_gone_before_the_next_arrives(arrays):
    source = WatchedSource(arrays)
    partition, mesh = Partition(CONFIG, 1, 1), make_meshes(ONE_DEVICE)[0]
    _, abstract = abstract_weights(partition, jnp.dtype("float32"))
    dropped: list[weakref.ref[jax.Array]] = []
    for _, weight in stream_weights(partition, source, mesh, abstract):
        assert not any(earlier() is not None for earlier in dropped)
        dropped.append(weakref.ref(weight))
        del weight
    assert len(dropped) == len(jax.tree.leaves(abstract))


def test_aligned_weights_of_the_right_dtype_are_not_copied_on_a_cpu(arrays):
    class Aligned(WatchedSource):
        def read(self, name, index):
            array = aligned_empty(self.arrays[name].shape, np.dtype(jnp.bfloat16))
            array[...] = self.arrays[name]
            self.addresses.add(array.ctypes.data)
            return array

    source = Aligned(arrays)
    source.addresses = set()
    products = [leaf for leaf in jax.tree.leaves(load(source)) if leaf.ndim > 2]
    assert {leaf.unsafe_buffer_pointer() for leaf in products} <= source.addresses
