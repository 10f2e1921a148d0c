"""Images of pages: whatever mesh reads or writes them, the same bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.pages import Pages
from model.partition import Partition
from serve.page_images import BATCHES, PageImages
from serve.programs import CacheShape, Programs
from sharding.mesh import make_meshes, parse_mesh
from tests.serve.harness import DENSE, LATENT, LIMITS

NUM_PAGES, PAGE_SIZE = 40, 4
PAGES = [3, 39, 1, 17, 20]


def made(model=DENSE, mesh="tensor=1", dtype="float32", first_device=0):
    """Programs of a mesh, and a state whose pages hold numbers of the layer and head that they are
    of."""
    shape = parse_mesh(mesh)
    partition = Partition(model, shape.stage, shape.tensor)
    cache = CacheShape(NUM_PAGES, PAGE_SIZE, jnp.dtype(dtype))
    devices = make_meshes(shape, jax.devices()[first_device:])[0]
    programs = Programs(partition, devices, cache, LIMITS, 8, jnp.dtype("float32"))
    return programs, programs.new_state()


def random_images(images, num, seed=0):
    """Bytes that are numbers of any dtype."""
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 60, (num, images.image_bytes), np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_what_is_written_is_read(dtype):
    programs, state = made(dtype=dtype)
    images = PageImages(programs)
    written = random_images(images, len(PAGES))
    state = images.write(state, PAGES, written)
    read = images.read(state, PAGES[::-1]).wait()
    np.testing.assert_array_equal(read, written[::-1])


@pytest.mark.parametrize("num", [1, BATCHES[0], BATCHES[0] + 1, BATCHES[-1], BATCHES[-1] + 3])
def test_any_number_of_pages_moves_and_the_others_stay(num):
    programs, state = made()
    images = PageImages(programs)
    before = random_images(images, NUM_PAGES - 1)
    state = images.write(state, range(1, NUM_PAGES), before)
    written = random_images(images, num, seed=1)
    state = images.write(state, range(1, num + 1), written)
    read = images.read(state, range(1, NUM_PAGES)).wait()
    np.testing.assert_array_equal(read, written + before[num:])


@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=8", "stage=2", "stage=2,tensor=4"])
@pytest.mark.parametrize("model", [DENSE, LATENT], ids=["dense", "latent"])
def test_meshes_read_what_others_wrote(model, mesh):
    """Five layers, which two stages don't divide; two kv heads, repeated over more devices."""
    programs, state = made(model, mesh)
    images = PageImages(programs)
    written = random_images(images, len(PAGES))
    state = images.write(state, PAGES, written)
    np.testing.assert_array_equal(images.read(state, PAGES).wait(), written)
    alone, its_state = made(model)
    of_one = PageImages(alone)
    assert of_one.image_bytes == images.image_bytes
    its_state = of_one.write(its_state, PAGES, written)
    np.testing.assert_array_equal(layers_of(programs, state), layers_of(alone, its_state))


def layers_of(programs, state):
    """Keys as a model of one device has them: [layers, P, p, K, C]."""
    partition = programs.partition
    places = np.stack([np.asarray(pages.keys) for pages in state.pages])
    layers = places.swapaxes(0, 1).reshape(-1, *places.shape[2:])[: partition.config.num_layers]
    copies = layers.reshape(*layers.shape[:3], -1, partition.kv_repeat, layers.shape[-1])
    assert (copies == copies[:, :, :, :, :1]).all(), "copies of a kv head are equal"
    return copies[:, 1:, :, :, 0]


def test_image_is_each_parts_layers_one_after_the_other():
    programs, state = made()
    pages = [
        Pages(
            keys=jnp.full_like(one.keys, layer),
            values=jnp.full_like(one.values, 100 + layer),
        )
        for layer, one in enumerate(state.pages)
    ]
    images = PageImages(programs)
    [image] = images.read(dataclasses.replace(state, pages=pages), [5]).wait()
    layer_size = PAGE_SIZE * DENSE.num_kv_heads * DENSE.head_dim
    expected = [layer for layer in range(DENSE.num_layers) for _ in range(layer_size)]
    keys, values = np.split(image.view(np.float32), 2)
    assert keys.tolist() == expected
    assert values.tolist() == [100 + layer for layer in expected]


def test_reading_shows_the_pages_as_they_were_when_it_began():
    programs, state = made()
    images = PageImages(programs)
    first, second = random_images(images, 1), random_images(images, 1, seed=1)
    state = images.write(state, [7], first)
    reading = images.read(state, [7])
    state = images.write(state, [7], second)
    jax.block_until_ready(state)
    np.testing.assert_array_equal(reading.wait(), first)


@pytest.mark.parametrize("destination", ["tensor=1", "tensor=4", "stage=2,tensor=2"])
@pytest.mark.parametrize("model", [DENSE, LATENT], ids=["dense", "latent"])
def test_pages_move_between_meshes_without_the_host(model, destination):
    """From two devices, which divide the kv heads, to others of the same process."""
    programs, state = made(model, "tensor=2")
    images = PageImages(programs)
    pages = list(range(1, BATCHES[-1] + 3))
    written = random_images(images, len(pages))
    state = images.write(state, pages, written)
    others, its_state = made(model, destination, first_device=2)
    there = PageImages(others)
    moved = images.read(state, pages, there).wait()
    # In two parts, as they may be landed.
    its_state = there.write(its_state, pages[:5], moved[:5])
    its_state = there.write(its_state, pages[5:], moved[5:])
    np.testing.assert_array_equal(there.read(its_state, pages).wait(), written)
