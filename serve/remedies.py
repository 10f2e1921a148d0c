"""What would make a configuration fit, from the least painful change on.

It says nothing that was not checked; how a changed configuration fits is told to it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from model.config import Quantization
from model.partition import fitting_meshes
from serve.config import ConfigError, override_config
from serve.fit import Fit, Served
from sharding.mesh import MeshError

Check = Callable[[Served], Fit]

MOST_MEMORY = {"cpu": 0.6, "gpu": 0.95}
"""The largest cache.memory_fraction that is proposed, by platform: a CPU's memory is everybody's,
and on a GPU some is lost between arrays."""


@dataclass(frozen=True)
class Change:
    """Of a configuration, by `--set`, or of the checkpoint."""

    overrides: tuple[str, ...] = ()
    quantization: Quantization | None = None

    def apply(self, served: Served) -> Served:
        """Raises ConfigError where the changed configuration can't be."""
        config = override_config(served.config, self.overrides)
        quantization = self.quantization or served.model.quantization
        model = replace(served.model, quantization=quantization)
        return replace(served, config=config, model=model)

    def __str__(self) -> str:
        convert = f"weft convert --quantize {self.quantization}" if self.quantization else ""
        return " and ".join(filter(None, [convert, ", ".join(self.overrides)]))


@dataclass(frozen=True)
class Remedy:
    change: Change
    fit: Fit
    """As it is then."""

    def __str__(self) -> str:
        return f"{self.change} (a pool of {self.fit.num_tokens:,} tokens)"


def remedies(served: Served, found: Fit, check: Check, num_devices: int) -> list[Remedy]:
    """The changes after which it fits, the least painful first: the mildest of each kind.

    A replica may take up to `num_devices`. Two changes at once are tried where no one is enough.
    """

    def mildest(changes: Iterable[Change]) -> Iterator[Remedy]:
        for change in changes:
            # What can't be, or doesn't divide, is no remedy.
            with suppress(ConfigError, MeshError):
                then = check(change.apply(served))
                if not then.short_bytes:
                    yield Remedy(change, then)
                    return

    kinds = (
        _fewer_pages(served, found),
        _more_memory(served),
        _narrower_pages(served),
        _smaller_steps(served),
        _narrower_weights(served),
        _quantized(served),
        _larger_meshes(served, num_devices),
    )
    alone = [remedy for kind in kinds for remedy in mildest(kind)]
    return alone or list(mildest(_quantized_on_larger_meshes(served, num_devices)))


def refusal(found: Fit, remedies: Iterable[Remedy]) -> str:
    """Why a start is refused, and what to change, in one line."""
    fitting = "; or ".join(map(str, remedies))
    return (
        f"it needs {found.needed_bytes:,} bytes of each device ({found.weight_bytes:,} of weights, "
        f"{found.state_bytes:,} of state, {found.step_bytes:,} of activations, "
        f"{found.moving_bytes:,} of pages on their way, {found.pool_bytes:,} of pages) and may "
        f"plan with {found.budget_bytes:,} of "
        f"{found.memory_bytes:,}, {found.short_bytes:,} too few; "
        + (f"it fits with {fitting}" if fitting else "use more devices, or larger ones")
    )


def _fewer_pages(served: Served, found: Fit) -> Iterator[Change]:
    """As many as the estimate of activations leaves room for, then fewer: they may need more."""
    if served.config.cache.pages is not None:
        for num_pages in (found.most_pages, found.most_pages * 99 // 100, found.most_pages // 2):
            if num_pages > 0:
                yield Change((f"cache.pages={num_pages}",))


def _more_memory(served: Served) -> Iterator[Change]:
    cache, most = served.config.cache, MOST_MEMORY.get(served.platform, 0.0)
    if cache.pages is None and cache.memory_share(served.platform) < most:
        yield Change((f"cache.memory_fraction={most}",))


def _narrower_pages(served: Served) -> Iterator[Change]:
    if served.pool(1).dtype.itemsize > 1:
        yield Change(("cache.dtype=fp8",))
        yield Change(("cache.dtype=int8",))


def _smaller_steps(served: Served) -> Iterator[Change]:
    """Half the rows and half the tokens, a quarter, and so on."""
    schedule = served.config.schedule
    rows, tokens, chunk = schedule.max_batch, schedule.token_budget, schedule.chunk
    while rows > 1 or tokens > chunk:
        rows = max(1, rows // 2)
        tokens = max(rows + 1, tokens // 2)
        overrides = [f"schedule.max_batch={rows}", f"schedule.token_budget={tokens}"]
        if tokens < chunk:
            overrides.append(f"schedule.chunk={tokens}")
        yield Change(tuple(overrides))


def _narrower_weights(served: Served) -> Iterator[Change]:
    if served.dtype.itemsize > 2:
        yield Change(("model.dtype=bfloat16",))


def _quantized(served: Served) -> Iterator[Change]:
    if served.model.quantization is None:
        yield Change(quantization="int8")


def _larger_meshes(served: Served, num_devices: int) -> Iterator[Change]:
    """Those of fewest devices first, and of these those with the least of a pipeline."""
    mesh = served.config.mesh
    now = mesh.stage * mesh.tensor
    shapes = fitting_meshes(served.model, num_devices)
    larger = [shape for shape in shapes if shape.devices_per_replica > now]
    for shape in sorted(larger, key=lambda shape: (shape.devices_per_replica, shape.stage)):
        yield Change((f"mesh.stage={shape.stage}", f"mesh.tensor={shape.tensor}"))


def _quantized_on_larger_meshes(served: Served, num_devices: int) -> Iterator[Change]:
    for quantized in _quantized(served):
        for larger in _larger_meshes(served, num_devices):
            yield replace(quantized, overrides=larger.overrides)
