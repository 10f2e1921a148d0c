"""What `weft serve` is told: a TOML file and `--set`, as frozen models whose errors name the key.

It does not know which machine it will run on (`serve/build.py`) and imports no JAX.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"]
Kernel = Literal["auto", "xla", "xla_8bit", "cpu", "pallas", "pallas_interpreted"]
Tables = dict[str, Any]
"""A TOML file as read: mostly tables in a table, until it is checked."""

Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; says where it is wrong and what would be right."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )


class ModelSection(Section):
    path: str = Field(min_length=1)
    """A converted or Hugging Face directory. Relative to the folder of the file that says so; in
    `--set`, to the current directory. Absolute once loaded."""
    name: str = ""
    """What clients see; the folder's name unless told otherwise."""
    dtype: Dtype = "auto"
    """auto: the checkpoint's."""
    max_context: Count | None = None
    """Tokens of prompt and answer together, where less than the model's is wanted."""

    @property
    def served_name(self) -> str:
        return self.name or Path(self.path).name


class MeshSection(Section):
    data: Count = 1
    stage: Count = 1
    tensor: Count = 1


class CacheSection(Section):
    pages: Count | None = None
    """Pages of the pool, instead of a share of the memory."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each device's memory for weights and pages together; see `memory_share`."""
    page_size: Count | None = None
    """Tokens of a page, a power of two; see `tokens_per_page`."""
    prefix_caching: bool = True
    """Whether a prompt shares the pages of what was computed before of the same tokens."""
    dtype: CacheDtype = "auto"
    """auto: the model's; fp8: float8_e4m3fn; int8: with a scale for each head of each token."""

    def memory_share(self, platform: str) -> float:
        """On a CPU the memory is shared with everything else on the machine."""
        return self.memory_fraction or (0.3 if platform == "cpu" else 0.9)

    def tokens_per_page(self, platform: str) -> int:
        """Large pages suit a GPU's wide loads; small ones waste less at a sequence's end."""
        return self.page_size or (16 if platform == "cpu" else 64)

    @field_validator("page_size")
    @classmethod
    def _power_of_two(cls, size: int | None) -> int | None:
        if size is not None and size & (size - 1):
            raise ValueError("a power of two, such as 16 or 64")
        return size

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.pages is not None and self.memory_fraction is not None:
            raise ValueError("set with either pages or memory_fraction, not both")
        return self


class ScheduleSection(Section):
    max_batch: Count = 64
    """Requests that run at once."""
    token_budget: Count = 512
    """New tokens of one step, decode rows and prefill chunks together."""
    max_queue: Count = 1024
    """Requests that may wait; those beyond are refused."""
    max_steps: Count = 8
    """Tokens a row advances in one device call when nobody waits."""
    chunk: Count = 64
    """Most prompt tokens of one prefill row."""
    max_slowdown: Annotated[float, Field(gt=1)] = 2.0
    """Where some decode, how many times as long as without it a step with prompt may take: more
    lets prompts be done sooner, less keeps streams even. inf: token_budget alone bounds it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of requests that bring none."""

    @model_validator(mode="after")
    def _budget_for_all(self) -> Self:
        least = max(self.chunk, self.max_batch + 1)
        if self.token_budget < least:
            raise ValueError(
                f"such that token_budget ({self.token_budget}) is above max_batch "
                f"({self.max_batch}), or a full batch would leave none for prefill, and at least "
                f"chunk ({self.chunk})"
            )
        return self


class KernelsSection(Section):
    """Which kernel computes each operation; auto: the one chosen for the devices."""

    decode_attention: Kernel = "auto"
    prefill_attention: Kernel = "auto"
    rotate_and_write: Kernel = "auto"
    small_matmul: Kernel = "auto"
    experts: Kernel = "auto"


class StoreSection(Section):
    """A disk or an object store."""

    name: str = Field(min_length=1)
    """In metrics."""
    url: str = Field(min_length=1)
    """A folder, or s3://bucket/path or gs://bucket/path. A relative folder is the file's, as
    model.path is."""
    gib: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TiersSection(Section):
    """Where pages go that the devices have no room for; a tier is read only when that is faster
    than computing."""

    host_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of host memory; 0: no tiers at all."""
    stores: list[StoreSection] = []
    """Nearest first."""
    write_through: bool = False
    """Pages go to the stores as soon as they are computed: a crash loses none. Else when host
    memory needs room, and when the server stops."""

    @model_validator(mode="after")
    def _host_first(self) -> Self:
        if self.stores and not self.host_gib:
            raise ValueError("given host_gib, some GiB of host memory, for pages pass through it")
        return self

    @field_validator("stores")
    @classmethod
    def _names_differ(cls, stores: list[StoreSection]) -> list[StoreSection]:
        names = [store.name for store in stores]
        if len({*names, "host", "device"}) < len(names) + 2:
            raise ValueError('given names that differ, and from "host" and "device", too')
        return stores


class SplitSection(Section):
    """Prompts computed elsewhere than where their answers are decoded."""

    role: Literal["all", "prefill", "decode"] = "all"
    """all: one engine does both; prefill: it computes prompts for engines that decode, and serves
    nobody else; decode: it asks others, and computes what is short, or all if nobody answers."""
    peers: list[str] = []
    """decode: host:port of each engine that prefills, as it listens for gRPC."""
    prefill_tensor: Count | None = None
    """decode: instead of peers, as many further devices of this process prefill for each replica,
    times prefill_stage."""
    prefill_stage: Count = 1
    prefill_pages: Count | None = None
    """Of these devices' pool; as many as the replica's unless told otherwise."""
    carrier: Literal["grpc", "jax"] = "grpc"
    """How pages travel between processes. grpc: through the memory of both hosts; jax, where both
    sides say so: from device to device by jax.experimental.transfer, which can't be called off
    (docs/disaggregation.md)."""
    least_tokens: Count = 256
    """decode: a prompt of which fewer are to be computed is computed where it is decoded."""
    lease_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """When nothing comes for as long, a prompt is computed where it is decoded; when nothing is
    taken for as long, whoever prefills lets go of what it has."""

    def prefill_mesh(self, mesh: MeshSection) -> MeshSection | None:
        """Of this process's devices that prefill for the replicas of `mesh`, each with its own."""
        if self.prefill_tensor is None:
            return None
        return MeshSection(data=mesh.data, stage=self.prefill_stage, tensor=self.prefill_tensor)

    @field_validator("peers")
    @classmethod
    def _addresses(cls, peers: list[str]) -> list[str]:
        for address in peers:
            host, _, port = address.rpartition(":")
            if not (host and port.isdecimal() and 0 < int(port) < 2**16):
                raise ValueError('addresses "host:port", such as ["127.0.0.1:8501"]')
        if len(set(peers)) < len(peers):
            raise ValueError("addresses that differ")
        return peers

    @model_validator(mode="after")
    def _somebody_prefills(self) -> Self:
        is_here = self.prefill_tensor is not None
        if self.role == "decode" and bool(self.peers) == is_here:
            raise ValueError(
                "given either peers or prefill_tensor where role is decode: who prefills"
            )
        if not is_here and (self.prefill_stage > 1 or self.prefill_pages is not None):
            raise ValueError("given prefill_tensor, too, where prefill_stage or prefill_pages is")
        if self.carrier == "jax" and self.role != "prefill" and not self.peers:
            raise ValueError(
                "between processes, of role prefill or with peers, where carrier is jax"
            )
        if self.role != "decode" and (self.peers or is_here):
            raise ValueError(
                f"of role decode, not {self.role}, where peers or prefill_tensor are set"
            )
        return self


class ContextsSection(Section):
    """Prompts that clients name and keep (`ContextCache`)."""

    folder: str = ""
    """Where they are kept over a restart, which needs tiers.stores; "": nowhere. Relative as
    model.path is."""
    max_contexts: Count = 10_000
    max_tenant_contexts: Count = 1_000
    default_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600.0
    max_ttl_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 7 * 24 * 3600.0


class ListenSection(Section):
    grpc: str = "127.0.0.1:8500"
    """host:port; at port 0 the system chooses one. So it is with http."""
    http: str = "127.0.0.1:8000"
    """/metrics and /health; "" turns it off."""
    grace_s: Annotated[float, Field(ge=0)] = 30.0
    """How long running requests may take to finish after SIGTERM."""

    @field_validator("grpc", "http")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address and not (host and port.isdecimal() and int(port) < 2**16):
            raise ValueError('"host:port", such as "127.0.0.1:8500"')
        return address

    @field_validator("grpc")
    @classmethod
    def _not_off(cls, address: str) -> str:
        if not address:
            raise ValueError('"host:port"; gRPC cannot be turned off')
        return address


class ServeConfig(Section):
    """An endpoint: one table of the TOML file for each field."""

    model: ModelSection
    mesh: MeshSection = MeshSection()
    cache: CacheSection = CacheSection()
    schedule: ScheduleSection = ScheduleSection()
    tiers: TiersSection = TiersSection()
    kernels: KernelsSection = KernelsSection()
    split: SplitSection = SplitSection()
    contexts: ContextsSection = ContextsSection()
    listen: ListenSection = ListenSection()

    @model_validator(mode="after")
    def _contexts_have_stores(self) -> Self:
        if self.contexts.folder and not self.tiers.stores:
            raise ValueError(
                "such that tiers.stores has one where contexts.folder is set: it keeps the pages"
            )
        return self

    @model_validator(mode="after")
    def _tiers_have_prefixes(self) -> Self:
        if self.tiers.host_gib and not self.cache.prefix_caching:
            raise ValueError("such that cache.prefix_caching is true where tiers.host_gib is set")
        return self

    @model_validator(mode="after")
    def _split_has_prefixes(self) -> Self:
        if self.split.role != "all" and not self.cache.prefix_caching:
            raise ValueError(
                "such that cache.prefix_caching is true where split.role is set: pages travel by "
                "their names"
            )
        return self


EXCLUSIVE = {("cache", "pages"): "memory_fraction", ("cache", "memory_fraction"): "pages"}
"""Setting one with `--set` takes back the other."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ServeConfig:
    """The configuration in `path`, with `overrides` such as "mesh.tensor=2" applied in order.

    A value is read as TOML, and as plain text where that fails. Raises ConfigError.
    """
    path = Path(path)
    values = _read(path)
    for make_absolute in ABSOLUTE.values():
        make_absolute(values, path.absolute().parent)
    return _overridden(values, overrides, str(path))


def override_config(config: ServeConfig, overrides: Sequence[str]) -> ServeConfig:
    """`config` with `overrides`, as in `load_config`. Raises ConfigError."""
    return _overridden(config.model_dump(exclude_unset=True), overrides, "the configuration")


def _overridden(values: Tables, overrides: Sequence[str], origin: str) -> ServeConfig:
    origins: dict[str, str] = {}
    for override in overrides:
        key = _apply(values, override)
        origins[key] = f"--set {override}"
        if make_absolute := ABSOLUTE.get(key):
            make_absolute(values, Path.cwd())
    return make_config(values, origin, origins)


def make_config(
    values: Mapping[str, Any], origin: str, origins: Mapping[str, str] | None = None
) -> ServeConfig:
    """The configuration in `values`, which errors say came from `origin`, or by key from `origins`.

    Raises ConfigError.
    """
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        problems: list[str] = []
        for details in error.errors(include_url=False):
            place = [str(part) for part in details["loc"]]
            where = (origins or {}).get(".".join(place), origin)
            problems.append(f"{where}: {_explain(place, details)}")
        raise ConfigError("\n".join(problems)) from None


def _read(path: Path) -> Tables:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a TOML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8; give a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        # Python 3.12 tells the line in the message only.
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{path}{f':{line[1]}' if line else ''}: {error}") from None


def _make_path_absolute(name: str, key: str, values: Tables, folder: Path) -> None:
    section: Tables | None = values.get(name)
    if isinstance(section, dict) and isinstance(path := section.get(key), str) and path:
        section[key] = str((folder / Path(path).expanduser()).resolve())


def _make_stores_absolute(values: Tables, folder: Path) -> None:
    section: Tables | None = values.get("tiers")
    stores: list[Tables | None] | None = None
    if isinstance(section, dict):
        stores = section.get("stores")
    for store in stores if isinstance(stores, list) else []:
        url = store.get("url") if isinstance(store, dict) else None
        if store and isinstance(url, str) and url and "://" not in url:
            store["url"] = (folder / Path(url).expanduser()).resolve().as_uri()


ABSOLUTE = {
    "model.path": partial(_make_path_absolute, "model", "path"),
    "tiers.stores": _make_stores_absolute,
    "contexts.folder": partial(_make_path_absolute, "contexts", "folder"),
}
"""By key, what makes its paths absolute."""


def _apply(values: Tables, override: str) -> str:
    """Sets the key that `override` names, and returns it."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"--set {override}: write section.key=value, such as mesh.tensor=2")
    if not isinstance(values.setdefault(section, {}), dict):
        found = values[section]
        raise ConfigError(f"--set {override}: {section} is {found!r} in the file, not a section")
    table: Tables = values[section]
    table.pop(EXCLUSIVE.get((section, name), ""), None)
    table[name] = _parse(text.strip())
    return f"{section}.{name}"


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(place: Sequence[str], details: Mapping[str, Any]) -> str:
    key, given = ".".join(place), details["input"]
    match details["type"]:
        case "extra_forbidden":
            return _unknown(place)
        case "missing":
            if key.startswith("tiers.stores."):
                return f"{key} is missing; a store has {', '.join(_STORE_KEYS)}"
            return f"{key} is missing; [model] needs path, the directory of a checkpoint"
        case "model_type":
            return f"{key} is {given!r}; it must be a section, [{key}], of {', '.join(_keys(key))}"
        case _:
            expected = re.sub(r"^(Input should be|Value error,) ", "", details["msg"])
            shown = f"{key} is {given!r}; it"
            if isinstance(given, Mapping):
                shown = f"[{key}]" if key else "the configuration"
            return f"{shown} must be {expected}"


def _unknown(place: Sequence[str]) -> str:
    """Names the nearest key: of the same section, else one that another section has."""
    section, name = ".".join(place[:-1]), place[-1]
    if section.startswith("tiers.stores."):
        return f"{section}.{name} is not a known key; a store has {', '.join(_STORE_KEYS)}"
    valid = _keys(section)
    near = difflib.get_close_matches(name, valid, n=1)
    elsewhere = [f"{other}.{name}" for other in _keys() if name in _keys(other)]
    guess = f"did you mean {(near or elsewhere)[0]}? " if near or elsewhere else ""
    where = f"[{section}] has" if section else "the sections are"
    return f"{'.'.join(place)} is not a known key; {guess}{where} {', '.join(valid)}"


_STORE_KEYS = tuple(StoreSection.model_fields)


def _keys(section: str = "") -> list[str]:
    """The keys of a section, or the sections."""
    if not section:
        return list(ServeConfig.model_fields)
    model: Any = ServeConfig.model_fields[section].annotation
    return list(model.model_fields)
