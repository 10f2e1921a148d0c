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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
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
MOVED = PartitionSpec(None, STAGE, None, None, TENSOR)
"""How pages on their way lie: [places of a stage, stages, N, tokens, kv heads, ...]."""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class _Part:
    """One of the arrays that a page has in each layer."""

    name: str
    """The field of `Pages`."""
    shape: tuple[int, ...]
    """[layers, tokens, kv heads, ...] of one page."""
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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


class PageImages:
    """Reads and writes pages of a state that `Programs.new_state` made."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    @property
    def image_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts)

    def read(self, state: State, pages: Sequence[int]) -> "Reading":
        """Starts to read `pages` as they are after the steps submitted so far."""
        batches: list[tuple[int, list[jax.Array]]] = []
        for some in _batches(pages):
            arrays = self._read_program(state.pages, _padded(some))
            for array in arrays:
                array.copy_to_host_async()
            batches.append((len(some), arrays))
        return Reading(self, batches)

    def write(self, state: State, pages: Sequence[int], images: Sequence[Image]) -> State:
        """The state, donated, in which `pages` are those of `images`."""
        at = 0
        for some in _batches(pages):
            arrays = self._to_device_form(images[at : at + len(some)], len(_padded(some)))
            at += len(some)
            state = self._write_program(state, _padded(some), arrays)
        return state

    def to_images(self, arrays: Sequence[NDArray[Any]], num: int) -> list[Image]:
        """The first `num` pages of arrays [places, stages, N, tokens, kv heads, ...]."""
        partition = self._programs.partition
        found: list[NDArray[Any]] = []
        for array in arrays:
            # A layer is its stage's times the places of a stage, and its place.
            layers = array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
            heads = layers[: partition.config.num_layers, :num, :, :: partition.kv_repeat]
            by_page = np.ascontiguousarray(heads.swapaxes(0, 1))
            found.append(by_page.reshape(num, -1).view(np.uint8))
        # Each in memory of its own, so that it can be let go alone.
        return [np.concatenate(page) for page in zip(*found, strict=True)]

    def _to_device_form(self, images: Sequence[Image], size: int) -> list[NDArray[Any]]:
        """The inverse, with nothing in the places of further pages, up to `size`."""
        partition = self._programs.partition
        padded_layers = partition.stages * partition.layers_per_stage
        whole = np.stack(images)
        at = 0
        arrays: list[NDArray[Any]] = []
        for part in self._parts:
            own = np.ascontiguousarray(whole[:, at : at + part.num_bytes]).view(part.dtype)
            at += part.num_bytes
            layers = own.reshape(len(images), *part.shape).swapaxes(0, 1)
            heads = np.repeat(layers, partition.kv_repeat, axis=3)
            array = np.zeros((padded_layers, size, *heads.shape[2:]), part.dtype)
            array[: len(heads), : len(images)] = heads
            by_stage = array.reshape(partition.stages, partition.layers_per_stage, *array.shape[1:])
            arrays.append(by_stage.swapaxes(0, 1))
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
    def _read_program(self) -> Any:
        def read(layers: list[Pages], page_N: jax.Array) -> list[jax.Array]:
            return [
                jnp.stack([getattr(pages, part.name)[:, page_N] for pages in layers])
                for part in self._parts
            ]

        state = self._programs.shardings(self._programs.argument_cuts()[1])
        moved = self._programs.shardings([MOVED] * len(self._parts))
        whole = self._programs.shardings(REPLICATED)
        return jax.jit(read, in_shardings=(state.pages, whole), out_shardings=moved)

    @cached_property
    def _write_program(self) -> Any:
        def write(state: State, page_N: jax.Array, arrays: list[jax.Array]) -> State:
            layers = [
                replace(
                    pages,
                    **{
                        part.name: getattr(pages, part.name).at[:, page_N].set(array[place])
                        for part, array in zip(self._parts, arrays, strict=True)
                    },
                )
                for place, pages in enumerate(state.pages)
            ]
            return replace(state, pages=layers)

        state = self._programs.shardings(self._programs.argument_cuts()[1])
        moved = self._programs.shardings([MOVED] * len(self._parts))
        whole = self._programs.shardings(REPLICATED)
        return jax.jit(
            write,
            in_shardings=(state, whole, moved),
            out_shardings=state,
            donate_argnums=0,
        )


@dataclass(frozen=True)
class Reading:
    """Pages on their way to the host."""

    _images: PageImages
    _batches: list[tuple[int, list[jax.Array]]]

    def wait(self) -> list[Image]:
        """The images, in the order of the pages; from any thread."""
        return [
            image
            for num, arrays in self._batches
            for image in self._images.to_images([np.asarray(array) for array in arrays], num)
        ]


def _batches(pages: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(pages), BATCHES[-1]):
        yield pages[first : first + BATCHES[-1]]


def _padded(pages: Sequence[int]) -> NDArray[np.int32]:
    """With the null page, up to the next of BATCHES."""
    size = next(batch for batch in BATCHES if batch >= len(pages))
    return np.array([*pages, *[NULL_PAGE] * (size - len(pages))], np.int32)
