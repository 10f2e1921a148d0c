"""tokenizer.json, read and run by Hugging Face's tokenizers.

It does not know the other files that state a vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from model.tokenizer.byte_spellings import byte_level_bytes, byte_of_piece
from model.tokenizer.settings import Settings
from model.tokenizer.tokenizer import Tokenizer


class _UnknownStep(ValueError):
    """A decoder's step whose bytes can't be told token by token."""


def load(path: Path, settings: Settings) -> Tokenizer:
    """The tokenizer in a tokenizer.json."""
    library = _open(path)
    vocabulary = library.get_vocab(with_added_tokens=True)
    texts = [""] * (max(vocabulary.values(), default=-1) + 1)
    for text, i in vocabulary.items():
        texts[i] = text
    state = library.decoder.__getstate__() if library.decoder else b"null"
    try:
        to_bytes, leading_spaces = _read_decoder(json.loads(state))
    except _UnknownStep as error:
        raise ValueError(
            f"{path} decodes with {error}, which Weft cannot stream; it knows ByteLevel, Metaspace,"
            " WordPiece, ByteFallback with Replace, Fuse and Strip of leading spaces, and none"
        ) from None
    return Tokenizer(
        _Encoder(library),
        tuple(to_bytes(text) if text else b"" for text in texts),
        frozenset(i for i, t in library.get_added_tokens_decoder().items() if t.special),
        bos_id=next(iter(settings.ids_of("bos_token", vocabulary)), None),
        eos_ids=settings.ids_of("eos_token", vocabulary),
        leading_spaces=leading_spaces,
    )


@dataclass(frozen=True)
class _Encoder:
    library: tokenizers.Tokenizer

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """One that leaves special tokens in the text alone: there, a setting, not an argument."""
        plain = tokenizers.Tokenizer.from_str(self.library.to_str())
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        library = self.library if parse_special else self.plain
        return library.encode(text, add_special_tokens=add_special_tokens).ids


def _open(path: Path) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer ({error}); fetch it again") from error
    # Files saved after training may cut or pad texts; a server must see the prompt as it is.
    library.no_truncation()
    library.no_padding()
    return library


def _read_decoder(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], int]:
    """How a token becomes bytes, and the leading spaces dropped from the whole text."""
    if decoder is None:
        return lambda token: f" {token}".encode(), 1
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replacements: list[tuple[str, str]] = []
    leading_spaces = 0
    byte_fallback = fused = False
    for step in steps:
        match step:
            case {"type": "ByteLevel"} if len(steps) == 1:
                return byte_level_bytes, 0
            case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup} if len(steps) == 1:
                return lambda token: _wordpiece_bytes(token, prefix, cleanup), 1
            case {"type": "Metaspace", "replacement": mark}:
                replacements.append((mark, " "))
                leading_spaces = 0 if step.get("prepend_scheme") == "never" else 1
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": leading_spaces, "stop": 0} if fused:
                pass
            case _:
                raise _UnknownStep(json.dumps(step))

    def to_bytes(token: str) -> bytes:
        if byte_fallback and (byte := byte_of_piece(token)):
            return byte
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes, leading_spaces


def _wordpiece_bytes(token: str, prefix: str, cleanup: bool) -> bytes:
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    closes_up = cleanup and token in (".", "?", "!", ",")
    return (token if closes_up else f" {token}").encode()
