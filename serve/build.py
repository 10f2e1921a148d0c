"""From a configuration to an engine: mesh, weights, pages, compiled programs.

It does not know the command line; what takes long is told to a Reporter.
"""

import logging
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from cache.contexts.context import ContextLimits
from cache.contexts.registry import Contexts
from cache.events import EventLog
from cache.pages import PagePool
from cache.tables import PageTables
from cache.tiers.folder import open_store
from cache.tiers.host import HostTier
from cache.tiers.record import HEADER_BYTES, RecordFormat
from cache.tiers.stack import TierStack
from cache.tiers.store import StoreTier
from model.checkpoint import CheckpointError, TensorSource, open_checkpoint
from model.checkpoint.identity import identity
from model.families import read_model_config
from model.kernel_choice import Kernels
from model.loading import load_weights
from model.partition import Partition, abstract_weights
from serve.config import ConfigError, ServeConfig, SplitSection, TiersSection
from serve.engine import Engine, ModelInfo
from serve.fit import Fit, Served, device_memory_bytes, fit, num_devices_of
from serve.page_images import PageImages, page_fingerprint
from serve.page_mover import PageMover
from serve.prefill.local import LocalPrefill
from serve.prefill.remote import RemotePrefill
from serve.program_cache import ProgramCache, beside_jax
from serve.programs import Programs
from serve.progress import Reporter, Silent
from serve.remedies import Change, Remedy, refusal, remedies
from serve.replicas import Replicas
from serve.runner import Runner
from serve.scheduler import Scheduler
from serve.tier_traffic import TierTraffic
from sharding.mesh import MeshError, MeshShape, make_meshes

log = logging.getLogger("weft")

GIB = 2**30


def build_engine(
    config: ServeConfig,
    progress: Reporter = Silent,
    clock: Callable[[], float] = time.monotonic,
    compile_ahead: bool = True,
    check: Callable[[ModelInfo], None] = lambda info: None,
) -> Engine | Replicas:
    """Loads and compiles what `config` asks for; the caller starts and stops it.

    Without `compile_ahead` each program is compiled when a step first needs it: for work whose
    time doesn't matter, such as a few prompts offline. Before weights are read, `check` is told
    what each replica will serve, and may end the start by raising.

    Raises ConfigError, CheckpointError, UnsupportedModel or MeshError, which say what to change.
    """
    directory = Path(config.model.path)
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no model directory {directory}; give model.path a converted or "
            "Hugging Face directory"
        )
    model = read_model_config(directory)
    shape = MeshShape(config.mesh.data, config.mesh.stage, config.mesh.tensor)
    partition = Partition(model, shape.stage, shape.tensor)
    meshes = make_meshes(shape)
    source = open_checkpoint(directory)
    _check_stores(config)
    # Only pages that leave the process ask whose they are.
    leaves = config.tiers.stores or config.split.role == "prefill" or config.split.peers
    weights = identity(directory) if leaves else b""
    events = EventLog(uuid.uuid4().hex)
    builder = _Builder(
        config,
        partition,
        source,
        progress,
        compile_ahead,
        check,
        beside_jax(),
        weights,
        events,
        clock,
    )
    beside = builder.prefilling()
    others = beside.meshes(jax.devices()[shape.num_devices :]) if beside else meshes
    engines = [
        builder.engine(mesh, i, beside, other)
        for i, (mesh, other) in enumerate(zip(meshes, others, strict=True))
    ]
    return engines[0] if len(engines) == 1 else Replicas(engines)


def build_contexts(config: ServeConfig, info: ModelInfo) -> Contexts | None:
    """The registry of contexts, with those that an earlier start has left; None where no prefixes
    are cached, or nobody is served."""
    if not config.cache.prefix_caching or config.split.role == "prefill":
        return None
    section = config.contexts
    limits = ContextLimits(
        max_tokens=info.max_context - 2,  # one of the request's own, and one of the answer
        max_contexts=section.max_contexts,
        max_tenant_contexts=section.max_tenant_contexts,
        default_ttl_s=section.default_ttl_s,
        max_ttl_s=section.max_ttl_s,
    )
    if not section.folder:
        return Contexts(limits, info.page_size)
    weights = identity(Path(config.model.path))
    return Contexts(limits, info.page_size, Path(section.folder), weights)


def _check_stores(config: ServeConfig) -> None:
    """Raises ConfigError for a store that can't be, before weights are read."""
    names: dict[str, str] = {}
    for store in config.tiers.stores:
        other = names.setdefault(store.url.rstrip("/"), store.name)
        if other != store.name:
            raise ConfigError(
                f"tiers.stores, {other} and {store.name}: both are {store.url}, and each would "
                "delete what the other keeps; give each a url of its own"
            )
        try:
            open_store(store.url)
        except ValueError as error:
            raise ConfigError(f"tiers.stores, {store.name}: {error}") from None


def _check_budgets(tiers: TiersSection, num_replicas: int, image_bytes: int) -> None:
    """Raises ConfigError for a tier that holds no page, or more than this machine has."""
    record_bytes = HEADER_BYTES + image_bytes
    given = [("tiers.host_gib", tiers.host_gib, image_bytes)] if tiers.host_gib else []
    given += [
        (f"tiers.stores, {store.name}: gib", store.gib, record_bytes) for store in tiers.stores
    ]
    for name, gib, page_bytes in given:
        share_bytes = round(gib * GIB / num_replicas)
        if share_bytes < page_bytes:
            # With what rounding to three digits may take away.
            least = 1.01 * num_replicas * page_bytes / GIB
            raise ConfigError(
                f"{name} is {gib}: {share_bytes:,} bytes for each of {num_replicas} replicas, and "
                f"a page takes {page_bytes:,}; give {least:.3g} or more"
            )
    memory_bytes = psutil.virtual_memory().total
    if tiers.host_gib * GIB > memory_bytes:
        raise ConfigError(
            f"tiers.host_gib is {tiers.host_gib}, this machine has {memory_bytes / GIB:.1f} GiB of "
            "memory in all; give what the server can spare of it, and the rest to tiers.stores"
        )


@dataclass(frozen=True)
class _Builder:
    """What the replicas of one configuration have in common."""

    config: ServeConfig
    partition: Partition
    source: TensorSource
    progress: Reporter
    compile_ahead: bool
    check: Callable[[ModelInfo], None]
    kept: ProgramCache | None
    weights_identity: bytes
    """Of the weights (`model/checkpoint/identity.py`)."""
    events: EventLog
    clock: Callable[[], float]
    num_others: int = 0
    """Devices of this process that others take."""

    def prefilling(self) -> "_Builder | None":
        """Of engines on further devices that prefill for these, where there are to be some."""
        mesh = self.config.split.prefill_mesh(self.config.mesh)
        if mesh is None:
            return None
        cache = self.config.cache
        if self.config.split.prefill_pages is not None:
            cache = cache.model_copy(
                update={"pages": self.config.split.prefill_pages, "memory_fraction": None}
            )
        changes = {
            "mesh": mesh,
            "cache": cache,
            "tiers": TiersSection(),
            "split": SplitSection(role="prefill"),
        }
        own = self.config.mesh
        return replace(
            self,
            config=self.config.model_copy(update=changes),
            partition=Partition(self.partition.config, mesh.stage, mesh.tensor),
            events=EventLog(uuid.uuid4().hex),
            num_others=own.data * own.stage * own.tensor,
        )

    def meshes(self, devices: Sequence[Any]) -> list[Mesh]:
        mesh = self.config.mesh
        shape = MeshShape(mesh.data, mesh.stage, mesh.tensor)
        try:
            return make_meshes(shape, devices)
        except (MeshError, IndexError):
            needed = shape.num_devices + self.num_others
            raise MeshError(
                f"split.prefill_tensor and split.prefill_stage take {shape.num_devices} devices "
                f"beside the {self.num_others} of [mesh], there are {len(jax.devices())}; lower "
                "one of them, or on a CPU set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
            ) from None

    def engine(
        self,
        mesh: Mesh,
        replica: int,
        beside: "_Builder | None" = None,
        its_mesh: Mesh | None = None,
        destination: PageImages | None = None,
    ) -> Engine:
        """A replica, and the engine of `beside` that prefills for it; its own pages go to
        `destination`, if it prefills for that."""
        config, model = self.config, self.partition.config
        served = Served(config, model, mesh.devices.flat[0].platform)
        limits, dtype, kernels = served.limits, served.dtype, served.kernels
        # Refused, if at all, before the weights are read.
        found = self._fit(served, mesh)
        info = ModelInfo(
            name=config.model.served_name,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_context=limits.max_context,
            dtype=dtype.name,
            mesh=dict(mesh.shape) | {"data": 1},
            num_pages=found.num_pages,
            page_size=found.page_size,
            max_batch=limits.max_batch,
            eos_ids=model.eos_ids,
        )
        self.check(info)
        programs = served.programs(found.num_pages, mesh, kernels)
        split, images = config.split, PageImages(programs)
        _check_budgets(config.tiers, config.mesh.data, images.image_bytes)
        weights = self._load(mesh, dtype, kernels)
        pool = PagePool(found.num_pages + 1, found.page_size, limits.token_cost.at)
        tables = PageTables(pool, limits.max_batch + 1, pool.pages_for(limits.max_context))
        form = RecordFormat(page_fingerprint(self.weights_identity, programs), images.image_bytes)
        moves_pages = config.tiers.host_gib or split.role != "all"
        stays_on_devices = beside is not None or (split.role != "all" and split.carrier == "jax")
        mover = PageMover(images, destination, stays_on_devices) if moves_pages else None
        traffic = self._traffic(programs, mover, form, replica) if mover else None
        prefills_only = split.role == "prefill"
        runner = Runner(programs, weights, tables.array, self.kept, mover, traffic, prefills_only)
        if self.compile_ahead:
            with self.progress("compiling", len(runner.shapes), "programs") as bar:
                runner.compile_all(lambda name, done, kept: bar.update(done, None, name, kept))
            self._check_compiled(replace(found, activation_bytes=runner.activation_bytes))
        prefill = None
        if beside is not None:
            engine = beside.engine(its_mesh or mesh, replica, destination=images)
            prefill = LocalPrefill(engine, split.least_tokens, split.lease_s)
        elif split.peers:
            prefill = RemotePrefill(
                split.peers,
                form,
                found.page_size,
                split.least_tokens,
                split.lease_s,
                images if split.carrier == "jax" else None,
            )
        return Engine(
            info,
            Scheduler(
                limits,
                tables,
                frozenset(model.eos_ids),
                config.cache.prefix_caching,
                traffic,
                prefill,
            ),
            runner,
            random.Random(config.schedule.seed + replica),
            self.clock,
            self.events,
            replica,
            prefill,
            form if prefills_only else None,
        )

    def _traffic(
        self, programs: Programs, mover: PageMover, form: RecordFormat, replica: int
    ) -> TierTraffic | None:
        """The tiers below a replica's devices, where there are some: its share, in folders of its
        own."""
        tiers = self.config.tiers
        if not tiers.host_gib:
            return None
        num_replicas = self.config.mesh.data
        folder = f"/replica-{replica}" if num_replicas > 1 else ""
        stores = [
            StoreTier(
                store.name,
                open_store(f"{store.url}{folder}"),
                form,
                round(store.gib * GIB / num_replicas),
            )
            for store in tiers.stores
        ]
        host = HostTier(round(tiers.host_gib * GIB / num_replicas), form.image_bytes)
        for tier in (host, *stores):
            self.events.add(replica, tier.name, tier.follow)
        stack = TierStack(host, stores, write_through=tiers.write_through)
        size, cost = programs.cache.page_size, programs.limits.token_cost

        def page_cost(number: int) -> float:
            return size * cost.at(number * size)

        return TierTraffic(stack, mover, page_cost)

    def _check_compiled(self, found: Fit) -> None:
        """That what the compiler says of the steps fits, too, where the estimate did."""
        if found.short_bytes:
            most = replace(found, budget_bytes=found.memory_bytes).most_pages
            fewer = Remedy(Change((f"cache.pages={most}",)), replace(found, num_pages=most))
            refused = refusal(found, [fewer] if most > 0 else [])
            raise ConfigError(f"{self.config.model.path} does not fit: {refused}")

    def _load(self, mesh: Mesh, dtype: Any, kernels: Kernels) -> Any:
        _, abstract = abstract_weights(self.partition, dtype, kernels)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        done = 0
        with self.progress("loading weights", total) as bar:

            def count(name: str, num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                bar.update(done, detail=name)

            return load_weights(self.partition, self.source, mesh, dtype, count, kernels)

    def _fit(self, served: Served, mesh: Mesh) -> Fit:
        """What goes into each device. Raises ConfigError, with what would fit, if that is more."""
        device = mesh.devices.flat[0]

        def check(changed: Served) -> Fit:
            num_devices = num_devices_of(changed.config) + self.num_others
            return fit(changed, device_memory_bytes(device, num_devices))

        found = check(served)
        if found.short_bytes:
            num_devices = len(jax.devices()) // self.config.mesh.data
            fitting = remedies(served, found, check, num_devices)
            raise ConfigError(f"{self.config.model.path} does not fit: {refusal(found, fitting)}")
        return found
