"""Pages of a replica's devices as bytes, and back, in a form that no mesh decides.

An image is one page's keys of all layers, then its values, then the scales of both where pages have
them; each [layers, tokens of a page, kv heads, ...] as the checkpoint has layers and heads. So what
one mesh wrote another reads. It does not know names, or where images are kept.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import bitcast_convert_type
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import NDArray

from cache.pages import NULL_PAGE
from model.pages import Pages
from model.step import State
from serve.programs import Programs
from sharding.mesh import STAGE, TENSOR
from sharding.rules import REPLICATED

FORM = 1
"""Of images; another when what is said above is."""
BATCHES = (4, 32)
"""Pages that a program moves: few beside a step, more where there are more."""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class _Part:
    """One of the arrays that a page has in each layer."""

    name: str
    """The field of `Pages`."""
    shape: tuple[int, ...]
    """[layers, tokens, kv heads, ...] of one page."""
    dtype: np.dtype[Any]
    """Of the pages."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bits(self) -> np.dtype[Any]:
        """Unsigned integers of its width."""
        return np.dtype(f"u{self.dtype.itemsize}")


def page_fingerprint(weights: bytes, programs: Programs) -> bytes:
    """16 bytes that differ where an image would mean something else: for another model, other
    `weights` (`model/checkpoint/identity.py`), another data type or page size."""
    cache = programs.cache
    meant = (
        FORM,
        weights,
        programs.partition.config,
        np.dtype(programs.dtype).name,
        np.dtype(cache.dtype).name,
        cache.page_size,
    )
    return blake2b(repr(meant).encode(), digest_size=16).digest()


class DevicePage(NamedTuple):
    """An image that never left devices: one page of those in whole arrays (`PageImages`)."""

    arrays: list[jax.Array]
    place: int


class PageImages:
    """Reads and writes pages of a state that `Programs.new_state` made.

    Between mesh and image pages are whole: [layers, N, tokens, kv heads, ...], layers and heads as
    the checkpoint has them, cut where the mesh divides them. They are bits: XLA may gather them by
    adding zeros, which would lose the smallest floats.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    @property
    def image_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts)

    def read(
        self, state: State, pages: Sequence[int], destination: "PageImages | None" = None
    ) -> "Reading":
        """Starts to read `pages` as they are after the steps submitted so far, to the host or to
        the devices of `destination`, which serves the same model."""
        batches: list[tuple[int, list[jax.Array]]] = []
        for some in _batches(pages):
            arrays = self.jit_read(state.pages, _padded(some))
            if destination is not None:
                # From mesh to mesh, each cut as it needs to be.
                arrays = jax.device_put(arrays, destination.whole)
            else:
                for array in arrays:
                    array.copy_to_host_async()
            batches.append((len(some), arrays))
        return Reading(self, batches, destination is not None)

    def write(
        self, state: State, pages: Sequence[int], images: Sequence[Image | DevicePage]
    ) -> State:
        """The state, donated, in which `pages` are those of `images`."""
        here: list[tuple[int, Image]] = []
        moved: dict[int, tuple[list[jax.Array], dict[int, int]]] = {}
        for page, image in zip(pages, images, strict=True):
            if isinstance(image, DevicePage):
                _, places = moved.setdefault(id(image.arrays), (image.arrays, {}))
                places[image.place] = page
            else:
                here.append((page, image))
        for arrays, places in moved.values():
            targets = [places.get(place, NULL_PAGE) for place in range(arrays[0].shape[1])]
            state = self.jit_write(state, np.array(targets, np.int32), arrays)
        for some in _batches(here):
            targets = _padded([page for page, _ in some])
            arrays = self._to_whole([image for _, image in some], len(targets))
            state = self.jit_write(state, targets, arrays)
        return state

    def whole_shapes(self, num_places: int) -> list[jax.ShapeDtypeStruct]:
        """Whole arrays of so many pages."""
        return [
            jax.ShapeDtypeStruct((part.shape[0], num_places, *part.shape[1:]), part.bits)
            for part in self._parts
        ]

    def on_one_device(self, num_places: int) -> list[jax.ShapeDtypeStruct]:
        """The same, on the mesh's first device."""
        device = SingleDeviceSharding(self._programs.mesh.devices.flat[0])
        return [shape.update(sharding=device) for shape in self.whole_shapes(num_places)]

    def to_mesh(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Whole arrays as they lie on the mesh."""
        return jax.device_put(list(arrays), self.whole)

    def compile_checksums(self, num_places: int) -> None:
        shapes = self.on_one_device(num_places)
        zeros = [np.zeros(shape.shape, shape.dtype) for shape in shapes]
        self.checksums(jax.device_put(zeros, [shape.sharding for shape in shapes]))

    @staticmethod
    def checksums(arrays: Sequence[jax.Array]) -> list[int]:
        """32 bits of each page in whole arrays, whose loss or exchange of numbers they tell."""
        return np.asarray(_checksums(list(arrays))).tolist()

    def to_images(self, arrays: Sequence[NDArray[Any]], num: int) -> list[Image]:
        """The first `num` pages of whole arrays."""
        found = [
            np.ascontiguousarray(array[:, :num].swapaxes(0, 1)).reshape(num, -1).view(np.uint8)
            for array in arrays
        ]
        # Each in memory of its own, so that it can be let go alone.
        return [np.concatenate(page) for page in zip(*found, strict=True)]

    def _to_whole(self, images: Sequence[Image], size: int) -> list[NDArray[Any]]:
        """The inverse, with nothing in the places of further pages, up to `size`."""
        both = np.stack(images)
        at = 0
        arrays: list[NDArray[Any]] = []
        for part in self._parts:
            own = np.ascontiguousarray(both[:, at : at + part.num_bytes]).view(part.bits)
            at += part.num_bytes
            array = np.zeros((part.shape[0], size, *part.shape[1:]), part.bits)
            array[:, : len(images)] = own.reshape(len(images), *part.shape).swapaxes(0, 1)
            arrays.append(array)
        return arrays

    @cached_property
    def _parts(self) -> list[_Part]:
        model = self._programs.partition.config
        pages = self._programs.cache.pages(self._programs.partition)
        return [
            _Part(
                field.name,
                (model.num_layers, leaf.shape[2], model.num_kv_heads, *leaf.shape[4:]),
                np.dtype(leaf.dtype),
            )
            for field in fields(Pages)
            if (leaf := getattr(pages, field.name)) is not None
        ]

    @cached_property
    def whole(self) -> list[NamedSharding]:
        """How whole arrays lie on the mesh, by part."""
        partition = self._programs.partition
        layers = None if partition.config.num_layers % partition.stages else STAGE
        heads = None if partition.config.num_kv_heads % partition.tensor else TENSOR
        cut = PartitionSpec(layers, None, None, heads)
        return self._programs.shardings([cut] * len(self._parts))

    @cached_property
    def jit_read(self) -> Any:
        """(pages of all places, numbers of N pages) -> whole arrays."""
        partition = self._programs.partition

        def whole(places: list[jax.Array]) -> jax.Array:
            # A layer is its stage's times the places of a stage, and its place.
            layers = jnp.stack(places, axis=1).reshape(-1, *places[0].shape[1:])
            L, N, T, _, *rest = layers.shape
            copies = layers.reshape(L, N, T, -1, partition.kv_repeat, *rest)
            return copies[: partition.config.num_layers, :, :, :, 0]

        def read(layers: list[Pages], page_N: jax.Array) -> list[jax.Array]:
            return [
                whole(
                    [
                        bitcast_convert_type(getattr(pages, part.name)[:, page_N], part.bits)
                        for pages in layers
                    ]
                )
                for part in self._parts
            ]

        state = self._programs.shardings(self._programs.argument_cuts()[1])
        numbers = self._programs.shardings(REPLICATED)
        return jax.jit(read, in_shardings=(state.pages, numbers), out_shardings=self.whole)

    @cached_property
    def jit_write(self) -> Any:
        """(state, numbers of N pages, whole arrays) -> state, donated."""
        partition = self._programs.partition
        stages, places = partition.stages, partition.layers_per_stage

        def by_stage(whole: jax.Array) -> jax.Array:
            """[stages, places of a stage, N, tokens, kv heads on the mesh, ...]."""
            heads = jnp.repeat(whole, partition.kv_repeat, axis=3)
            padding = [(0, stages * places - len(whole)), *[(0, 0)] * (whole.ndim - 1)]
            return jnp.pad(heads, padding).reshape(stages, places, *heads.shape[1:])

        def write(state: State, page_N: jax.Array, arrays: list[jax.Array]) -> State:
            moved = {
                part.name: bitcast_convert_type(by_stage(array), part.dtype)
                for part, array in zip(self._parts, arrays, strict=True)
            }
            layers = [
                replace(
                    pages,
                    **{
                        name: getattr(pages, name).at[:, page_N].set(array[:, place])
                        for name, array in moved.items()
                    },
                )
                for place, pages in enumerate(state.pages)
            ]
            return replace(state, pages=layers)

        state = self._programs.shardings(self._programs.argument_cuts()[1])
        numbers = self._programs.shardings(REPLICATED)
        return jax.jit(
            write,
            in_shardings=(state, numbers, self.whole),
            out_shardings=state,
            donate_argnums=0,
        )


@dataclass(frozen=True)
class Reading:
    """Pages on their way."""

    _images: PageImages
    _batches: list[tuple[int, list[jax.Array]]]
    _stays_on_devices: bool

    def wait(self) -> list[Image] | list[DevicePage]:
        """The images, in the order of the pages; from any thread."""
        if self._stays_on_devices:
            jax.block_until_ready([arrays for _, arrays in self._batches])
            return [
                DevicePage(arrays, place) for num, arrays in self._batches for place in range(num)
            ]
        return [
            image
            for num, arrays in self._batches
            for image in self._images.to_images([np.asarray(array) for array in arrays], num)
        ]


@jax.jit
def _checksums(arrays: list[jax.Array]) -> jax.Array:
    def of_part(array: jax.Array) -> jax.Array:
        by_page = array.swapaxes(0, 1).reshape(array.shape[1], -1).astype(jnp.uint32)
        # Odd, so that no bit of any number is lost.
        weights = 2 * jnp.arange(by_page.shape[1], dtype=jnp.uint32) + 1
        return (by_page * weights).sum(1, dtype=jnp.uint32)

    return jnp.stack([31**i * of_part(array) for i, array in enumerate(arrays)]).sum(0)


def _batches[T](pages: Sequence[T]) -> Iterator[Sequence[T]]:
    for first in range(0, len(pages), BATCHES[-1]):
        yield pages[first : first + BATCHES[-1]]


def _padded(pages: Sequence[int]) -> NDArray[np.int32]:
    """With the null page, up to the next of BATCHES."""
    size = next(batch for batch in BATCHES if batch >= len(pages))
    return np.array([*pages, *[NULL_PAGE] * (size - len(pages))], np.int32)
