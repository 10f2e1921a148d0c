"""A sentencepiece ModelProto (tokenizer.model), with the added tokens that it does not know.

It does not know the other files that state a vocabulary.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from model.tokenizer.byte_spellings import byte_of_piece
from model.tokenizer.settings import Settings
from model.tokenizer.tokenizer import Tokenizer

# Generated code, which has no types.
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]


def load(path: Path, settings: Settings) -> Tokenizer:
    """The tokenizer in a sentencepiece model."""
    model = _ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        if not model.pieces:
            raise DecodeError("it has no pieces")
        library = rest = _open(model)
    except (DecodeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is neither a sentencepiece model nor tiktoken ranks ({error}); fetch it again"
        ) from error
    leading_spaces = 0
    if model.normalizer_spec.remove_extra_whitespaces:
        leading_spaces = sys.maxsize
    elif model.normalizer_spec.add_dummy_prefix:
        leading_spaces = 1
    if not settings.legacy:
        model.normalizer_spec.add_dummy_prefix = False
        rest = _open(model)

    kind = _ModelProto.SentencePiece
    pieces = [_bytes_of(p.piece, p.type == kind.BYTE) for p in model.pieces]
    special = {
        n: p.piece for n, p in enumerate(model.pieces) if p.type in (kind.CONTROL, kind.UNKNOWN)
    }
    ids = {p.piece: n for n, p in enumerate(model.pieces)}
    added = {}
    for i, token in settings.added.items():
        pieces += [b""] * (i + 1 - len(pieces))
        pieces[i] = token.text.encode()
        ids[token.text] = i
        (special if token.special else added)[i] = token.text
    bos_ids = settings.ids_of("bos_token", ids) or _if_any(library.bos_id())
    eos_ids = settings.ids_of("eos_token", ids) or _if_any(library.eos_id())
    return Tokenizer(
        _Encoder(
            library,
            rest,
            added=_any_of(added.values()),
            parsed=_any_of([*added.values(), *special.values()]),
            ids=ids,
            # What transformers' LlamaTokenizer does where the settings say nothing.
            prefix=list(bos_ids) if settings.add_bos is not False else [],
            suffix=list(eos_ids) if settings.add_eos else [],
        ),
        tuple(pieces),
        frozenset(special),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=eos_ids,
        leading_spaces=leading_spaces,
    )


@dataclass(frozen=True)
class _Encoder:
    first: sentencepiece.SentencePieceProcessor
    rest: sentencepiece.SentencePieceProcessor
    """For text after a matched token: the same, or without the dummy prefix."""
    added: re.Pattern[str]
    parsed: re.Pattern[str]
    """Matches added tokens, or added and special tokens, as the one group."""
    ids: dict[str, int]
    prefix: list[int]
    suffix: list[int]

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids: list[int] = []
        library = self.first
        for part, is_token in _split(self.parsed if parse_special else self.added, text):
            ids += [self.ids[part]] if is_token else library.encode(part)
            library = self.rest
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids


def _split(pattern: re.Pattern[str], text: str) -> list[tuple[str, bool]]:
    """The parts of `text`, none empty, and whether each is a match of `pattern`'s one group."""
    parts = pattern.split(text)
    return [(part, n % 2 == 1) for n, part in enumerate(parts) if part]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `texts`; nothing when there are none."""
    alternatives = sorted(map(re.escape, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(alternatives) or '(?!)'})")


def _open(model: Any) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _if_any(token_id: int) -> tuple[int, ...]:
    """Sentencepiece says -1 for no token."""
    return (token_id,) if token_id >= 0 else ()


def _bytes_of(piece: str, is_byte: bool) -> bytes:
    if is_byte and (byte := byte_of_piece(piece)):
        return byte
    return piece.replace("▁", " ").encode()
