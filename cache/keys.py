"""Names of pages: a hash chain over tenant, salt and tokens, the same wherever a page lies.

A page's name is `hash(parent's name, token ids)`, so equal names mean equal tokens from the start
on, and whoever knows a prompt can name its pages. It does not know where a page lies.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16
"""128 bits: two prompts that somebody makes collide take 2**64 attempts."""
TOKEN = "I"
"""Token ids are hashed as 32-bit integers in the machine's order, which is little-endian wherever
XLA runs. Python fills an array of unsigned ones 2.5 times as fast as of signed ones."""
TOKEN_BYTES = array(TOKEN).itemsize

Key = bytes


def root_key(tenant: str = "", salt: str = "") -> Key:
    """The parent of a first page: different for each tenant and salt, so nothing is shared."""
    named = f"{len(tenant)}:{tenant}{salt}".encode("utf-8", "surrogatepass")
    return blake2b(named, digest_size=KEY_BYTES, person=b"weft page root").digest()


def page_key(parent: Key, block: bytes) -> Key:
    """The name of the page that holds `block` after the page `parent`."""
    return blake2b(parent + block, digest_size=KEY_BYTES).digest()


def block_of(tokens: Sequence[int]) -> bytes:
    """Token ids as they are hashed."""
    return array(TOKEN, tokens).tobytes()


class PageNames:
    """The names of a growing sequence's full pages, and the tokens in them."""

    __slots__ = ("_page_size", "blocks", "keys", "root")

    def __init__(self, root: Key, page_size: int) -> None:
        self.root = root
        self.keys: list[Key] = []
        """Of the full pages, in order."""
        self.blocks: list[bytes] = []
        """Their token ids."""
        self._page_size = page_size

    def __len__(self) -> int:
        return len(self.keys)

    def parent(self, page: int) -> Key:
        """The name before that of the sequence's page number `page`."""
        return self.keys[page - 1] if page else self.root

    def extend(self, tokens: Sequence[int]) -> None:
        """Names the further pages that `tokens`, the sequence from its start, fill."""
        size, keys, blocks = self._page_size, self.keys, self.blocks
        first = len(keys)
        if len(tokens) < (first + 1) * size:
            return
        last = len(tokens) // size
        data = block_of(tokens[first * size : last * size])
        width = size * TOKEN_BYTES
        parent = self.parent(first)
        for at in range(0, len(data), width):
            block = data[at : at + width]
            # What page_key does: its call would take a fifth as long as the hash.
            parent = blake2b(parent + block, digest_size=KEY_BYTES).digest()
            keys.append(parent)
            blocks.append(block)
