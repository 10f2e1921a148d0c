"""One model's records in a key-value store: their names, which are there, in which order of use.

Operations here wait for the store, `timeout_s` at most for each answer. It does not know budgets.
"""

import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import tensorstore as ts

from cache.keys import KEY_BYTES, Key
from cache.tiers.record import FINGERPRINT_BYTES

OPEN_S = 10.0
FOREIGN_S = 7 * 24 * 3600.0
"""Another model's pages are deleted when its folder was not in use for a week."""
PREFIX = "weft-kv-"
"""Of a model's folder: what else lies in the store is not ours to delete."""
USED = "used"
"""In each folder: when it was last in use, then its keys, the least recently used first."""
_TIME = struct.Struct("<d")


class Answer(Protocol):
    """What is asked of a `tensorstore.Future`."""

    def result(self, timeout: float | None = None) -> Any: ...
    def done(self) -> bool: ...
    def add_done_callback(self, callback: Callable[[Any], None], /) -> None: ...


class Store(Protocol):
    """What is asked of a `tensorstore.KvStore`."""

    def read(self, key: str, *, byte_range: slice | None = None) -> Answer: ...
    def write(self, key: str, value: bytes | None) -> Answer: ...
    def list(self) -> Answer: ...
    def delete_range(self, range: ts.KvStore.KeyRange) -> Answer: ...


def open_store(url: str) -> Store:
    """The store at `file:///folder`, `memory://`, `s3://bucket/path` or `gs://bucket/path`.

    Raises ValueError where the URL is none of these.
    """
    # Nothing is lost when a page is: so no waiting until the disk has it, for which the checksum
    # stands in, and no locks, since a page has one content.
    context = ts.Context({"file_io_sync": False, "file_io_locking": {"mode": "none"}})
    try:
        opened = ts.KvStore.open(url if url.endswith("/") else f"{url}/", context=context)
        return opened.result(timeout=OPEN_S)
    except ValueError as error:
        raise ValueError(
            f"there is no store at {url!r} ({error}); give file:///folder, memory://, "
            "s3://bucket/path or gs://bucket/path"
        ) from error


class Folder:
    """A folder named by a model's fingerprint, so that nobody else's pages are ever read."""

    def __init__(self, store: Store, fingerprint: bytes) -> None:
        self._store, self._name = store, f"{PREFIX}{fingerprint.hex()}"

    def path(self, key: Key) -> str:
        """Sharded: file systems are slow with very many files in one folder."""
        name = key.hex()
        return f"{self._name}/{name[:2]}/{name}"

    def list(self, timeout_s: float) -> tuple[list[Key], list[str]]:
        """The keys of the records, the least recently used first, and other models' folders."""
        found: dict[Key, None] = {}
        others: set[str] = set()
        for name in self._store.list().result(timeout=timeout_s):
            folder, _, rest = name.decode("ascii", "replace").partition("/")
            if folder != self._name:
                if folder.startswith(PREFIX) and _is_hex(folder[len(PREFIX) :], FINGERPRINT_BYTES):
                    others.add(folder)
            elif _is_hex(rest[3:], KEY_BYTES):
                found[bytes.fromhex(rest[3:])] = None
        used = self._store.read(f"{self._name}/{USED}").result(timeout=timeout_s).value
        order = [
            used[at : at + KEY_BYTES]
            for at in range(_TIME.size, len(used) - KEY_BYTES + 1, KEY_BYTES)
        ]
        known = [key for key in order if key in found]
        # Those written since the order was saved are newer than all in it.
        return [*known, *(found.keys() - set(known))], sorted(others)

    def save_order(self, keys: Iterable[Key], now_s: float, timeout_s: float) -> None:
        """Remembers when the folder was last in use, and in which order its pages were."""
        value = b"".join((_TIME.pack(now_s), *keys))
        self._store.write(f"{self._name}/{USED}", value).result(timeout=timeout_s)

    def remove_unused(self, folder: str, now_s: float, timeout_s: float) -> None:
        """Deletes another model's folder if it was in use long ago, by the wall clock."""
        path = f"{folder}/{USED}"
        read = self._store.read(path, byte_range=slice(0, _TIME.size))
        value: bytes = read.result(timeout=timeout_s).value
        if len(value) != _TIME.size:
            return  # a model's folder says so from its first moment: this is somebody else's
        if now_s - _TIME.unpack(value)[0] > FOREIGN_S:
            both = ts.KvStore.KeyRange(f"{folder}/", f"{folder}0")  # "0" comes after "/"
            self._store.delete_range(both).result(timeout=timeout_s)


def _is_hex(name: str, num_bytes: int) -> bool:
    return len(name) == 2 * num_bytes and set(name) <= set("0123456789abcdef")
