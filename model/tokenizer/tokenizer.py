"""A vocabulary of byte strings, and what every library's tokenizer does with it.

It does not know files or libraries.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


class Encoder(Protocol):
    """What only the library behind a tokenizer can do; called from many threads at once."""

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of byte strings, and the library that cuts text into them.

    Decoding joins the ids' bytes, drops the leading space that encoding may have added, and reads
    the rest as UTF-8 with U+FFFD for what is not. That is what every library does, except that
    Hugging Face's ByteFallback spoils the whole run of byte pieces around a bad byte; since no id
    changes the bytes of another, text can be streamed exactly (`model/detokenizer`).
    """

    encoder: Encoder = field(repr=False)
    pieces: tuple[bytes, ...] = field(repr=False)
    """The bytes of each id; none for an id below the highest that names no token."""
    special_ids: frozenset[int] = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """As the tokenizer's files name them; generation_config.json may know more."""
    leading_spaces: int
    """Up to so many spaces are dropped from the beginning of a text."""

    @property
    def vocab_size(self) -> int:
        """The highest id + 1, added tokens included; a model's own may be larger by padding."""
        return len(self.pieces)

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The ids of `text`.

        `add_special_tokens` puts those around it that the model expects (often BOS): True for a
        plain prompt, False for a rendered chat template, which has written them itself.
        `parse_special` False makes special tokens written in the text plain text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate"
                " pair; send whole Unicode characters"
            ) from None
        return self.encoder.encode(text, add_special_tokens, parse_special)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, taken as the beginning of a text."""
        data = b"".join(
            self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.special_ids)
        )
        return drop_spaces(data, self.leading_spaces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What an id adds to a text that has already begun; maybe part of a character."""
        if not 0 <= token_id < len(self.pieces):
            raise ValueError(
                f"token id {token_id} is outside the vocabulary: ids go from 0 to"
                f" {len(self.pieces) - 1}, vocabulary size {len(self.pieces)}"
            )
        return self.pieces[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids


def drop_spaces(data: bytes, most: int) -> bytes:
    """`data` without its leading spaces, `most` of them at most."""
    return data[min(len(data) - len(data.lstrip(b" ")), most) :]
