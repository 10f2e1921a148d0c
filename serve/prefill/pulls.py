"""Pages that go from one process's devices to another's without the hosts' memory.

By `jax.experimental.transfer`: JAX's, and experimental. It can't be called off: arrays that nobody
pulls stay on the sender's device, and a pull from who is gone never ends (jaxlib 0.11.2, measured).
So it is used only where a configuration asks for it, and a sender that was late once is pulled from
no more.
"""

import threading
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import jax
from jax.experimental import transfer

from cache.tiers.counts import Miss
from cache.transfers.chunks import BrokenTransfer
from serve.page_images import BATCHES, DevicePage, PageImages
from serve.pb import inference_pb2 as pb

_lock = threading.Lock()
_servers: dict[str, Any] = {}
"""By host, since a server ends with its process."""


def _server(host: str) -> Any:
    """JAX's, of this process's devices; listening on a free port of `host`."""
    with _lock:
        if host not in _servers:
            client = jax.devices()[0].client
            _servers[host] = transfer.start_transfer_server(client, f"{host}:0", [f"{host}:0"])
        return _servers[host]


class Offers:
    """One prompt's pages, to be pulled by whom they are sent to."""

    _numbers = count()

    def __init__(self, host: str) -> None:
        self._server = _server(host)
        self._port = int(self._server.address().rpartition(":")[2])
        self._arrays: Sequence[jax.Array] = ()
        self._id = 0
        self._checksums: list[int] = []

    def of(self, page: DevicePage) -> pb.PageOffer:
        """Waits for what is computed of it."""
        if page.arrays is not self._arrays:
            device = min(page.arrays[0].sharding.device_set, key=lambda device: device.id)
            alone = jax.device_put(page.arrays, device)
            self._arrays, self._id = page.arrays, next(self._numbers)
            self._checksums = PageImages.checksums(alone)
            self._server.await_pull(self._id, alone)
        return pb.PageOffer(
            port=self._port,
            id=self._id,
            place=page.place,
            num_places=page.arrays[0].shape[1],
            checksum=self._checksums[page.place],
        )


class Pulls:
    """What one sender offers, brought to the devices of `images`."""

    def __init__(self, host: str, images: PageImages, most_s: float) -> None:
        """`most_s` is how long a pull may take."""
        self._host, self._images, self._most_s = host, images, most_s
        self._id: int | None = None
        self._arrays: list[jax.Array] = []
        self._checksums: list[int] = []

    def take(self, offer: pb.PageOffer) -> DevicePage:
        """Raises BrokenTransfer."""
        if offer.id != self._id:
            self._arrays = self._pull(offer)
            self._checksums = PageImages.checksums(self._arrays)
            self._id = offer.id
            self._arrays = self._images.to_mesh(self._arrays)
        if not offer.place < len(self._checksums):
            raise BrokenTransfer(Miss.CORRUPT, f"place {offer.place} of {len(self._checksums)}")
        if offer.checksum != self._checksums[offer.place]:
            raise BrokenTransfer(Miss.CORRUPT, "a page that was pulled is damaged")
        return DevicePage(self._arrays, offer.place)

    def _pull(self, offer: pb.PageOffer) -> list[jax.Array]:
        if offer.num_places not in BATCHES:
            raise BrokenTransfer(Miss.CORRUPT, f"{offer.num_places} pages are none of {BATCHES}")
        # To block would be for ever, and a thread that does keeps the process from ending well.
        deadline_s = time.monotonic() + self._most_s
        try:
            connection = _server(LOCAL).connect(f"{self._host}:{offer.port}")
            arrays = connection.pull(offer.id, self._images.on_one_device(offer.num_places))
            while not all(array.is_ready() for array in arrays):
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"no pages within {self._most_s} s")
                time.sleep(POLL_S)
        except Exception as error:
            raise BrokenTransfer(Miss.FAILED, f"pages could not be pulled: {error}") from error
        return arrays


POLL_S = 0.0005
LOCAL = "127.0.0.1"
"""Who only pulls lets nobody pull."""
