"""A context as it lies in a file: a header, its description as JSON, and its token ids.

Reading verifies all of it and says what is wrong. It does not know where files lie.
"""

import json
import struct
import zlib
from array import array
from dataclasses import dataclass, fields

from cache.contexts.context import Context, page_keys
from cache.keys import TOKEN, TOKEN_BYTES
from cache.tiers.counts import Miss
from cache.tiers.record import FINGERPRINT_BYTES

MAGIC = b"weftctxt"
VERSION = 2
_HEADER = struct.Struct("<8sI16sII")
"""Magic, version, fingerprint, bytes of the description, token ids."""
_CHECKSUM = struct.Struct("<I")
"""CRC-32 of all else."""
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_DESCRIBED = {field.name for field in fields(Context)} - {"token_ids", "keys"}


@dataclass(frozen=True)
class RecordFormat:
    """Records of one model's contexts."""

    fingerprint: bytes
    """16 bytes: of whatever decides what a token id means."""
    page_size: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(
                f"a fingerprint of {len(self.fingerprint)} bytes; it must have {FINGERPRINT_BYTES}"
            )

    def encode(self, context: Context) -> bytes:
        described = {name: getattr(context, name) for name in _DESCRIBED}
        description = json.dumps(described, sort_keys=True).encode()
        header = _HEADER.pack(
            MAGIC, VERSION, self.fingerprint, len(description), context.num_tokens
        )
        body = description + context.token_ids.tobytes()
        checksum = zlib.crc32(body, zlib.crc32(header))
        return b"".join((header, _CHECKSUM.pack(checksum), body))

    def decode(self, name: str, record: bytes) -> Context | Miss:
        """The context, or why the record is not that of `name`."""
        if len(record) < HEADER_BYTES:
            return Miss.TRUNCATED
        magic, version, fingerprint, num_described, num_tokens = _HEADER.unpack_from(record)
        if magic != MAGIC:
            return Miss.CORRUPT
        if version != VERSION:
            return Miss.OTHER_VERSION
        body = record[HEADER_BYTES:]
        if len(body) < num_described + num_tokens * TOKEN_BYTES:
            return Miss.TRUNCATED
        [checksum] = _CHECKSUM.unpack_from(record, _HEADER.size)
        if checksum != zlib.crc32(body, zlib.crc32(record[: _HEADER.size])):
            return Miss.CORRUPT
        if fingerprint != self.fingerprint:
            return Miss.FOREIGN
        described = json.loads(body[:num_described])
        if described["name"] != name:
            return Miss.OTHER_KEY
        token_ids = array(TOKEN, body[num_described:])
        keys = page_keys(described["tenant"], described["cache_salt"], token_ids, self.page_size)
        described["messages"] = tuple(described["messages"])
        return Context(**described, token_ids=token_ids, keys=keys)
