"""How vocabularies of texts spell the bytes that are not text.

It does not know which vocabulary uses which spelling.
"""

import re

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_piece(piece: str) -> bytes | None:
    """The byte that a byte-fallback piece such as <0x0A> names; None for any other piece."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print in Latin-1 stand for themselves, the others
    for the characters from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printing))
    return {chr(b): b for b in printing} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[c] for c in token])
    except KeyError:  # an added token, which is spelled as it is
        return token.encode()
