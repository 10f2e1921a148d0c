"""Text to token ids and back, with the tokenizer files that checkpoints come with.

It does not know streams (`model/detokenizer`), conversations (`model/chat`) or models.
"""

import base64
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tiktoken
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

# Generated code without type stubs.
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Encoder(Protocol):
    """What only the library behind a tokenizer can do; called from many threads at once."""

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of byte strings, and the library that cuts text into them.

    Decoding joins the ids' bytes, drops the leading space that encoding may have added, and reads
    the rest as UTF-8 with U+FFFD for what is not. That is what every library below does, except
    that Hugging Face's ByteFallback spoils the whole run of byte pieces around a bad byte; since
    no id changes the bytes of another, text can be streamed exactly (`model/detokenizer`).
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


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint's directory; None where there is none: ids in, ids out."""
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory; give a checkpoint's directory")
    settings = Settings.read(directory)
    # tokenizer.json first: of several files it is the one that states everything (normalizer,
    # special tokens, what is added around a text), and the one fine-tunes keep up to date.
    if (path := directory / "tokenizer.json").is_file():
        return _load_huggingface(path, settings)
    if (path := directory / "tokenizer.model").is_file():
        # A ModelProto opens with a field tag; Llama 3 gave the same name to tiktoken's text.
        is_ranks = _RANK_LINE.fullmatch(path.read_bytes().partition(b"\n")[0])
        return (_load_tiktoken if is_ranks else _load_sentencepiece)(path, settings)
    if paths := sorted(directory.glob("*.tiktoken")):
        return _load_tiktoken(paths[0], settings)
    return None


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the library's own algorithm sees the rest."""

    text: str
    special: bool


@dataclass(frozen=True)
class Settings:
    """What is used of tokenizer_config.json, special_tokens_map.json and added_tokens.json."""

    special_tokens: dict[str, str]
    """The texts of bos_token, eos_token and so on, by those names."""
    added: dict[int, AddedToken]
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool
    """Sentencepiece's dummy prefix goes before every stretch of text, not only the first."""
    pattern: str | None
    """How tiktoken splits a text into words."""

    @classmethod
    def read(cls, directory: Path) -> "Settings":
        path = directory / "tokenizer_config.json"
        config = read_json(path)
        names = {**read_json(directory / "special_tokens_map.json"), **config}
        special_tokens = {
            name: text
            for name, value in names.items()
            if name.endswith("_token") and (text := _token_text(value)) is not None
        }
        special = {*special_tokens.values()}
        special |= {_token_text(t) for t in names.get("additional_special_tokens") or []}
        added = {
            i: AddedToken(text, text in special)
            for text, i in read_json(directory / "added_tokens.json").items()
        }
        try:
            for i, entry in (config.get("added_tokens_decoder") or {}).items():
                added[int(i)] = AddedToken(entry["content"], bool(entry.get("special")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"added_tokens_decoder in {path} does not map ids to objects with content"
                f" ({error!r}); fetch the file again"
            ) from error
        return cls(
            special_tokens,
            added,
            add_bos=config.get("add_bos_token"),
            add_eos=config.get("add_eos_token"),
            legacy=config.get("legacy") is not False,
            pattern=config.get("pat_str"),
        )

    def ids_of(self, name: str, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
        """The id of the token that plays a part such as eos_token, where both are known."""
        text = self.special_tokens.get(name)
        return (vocabulary[text],) if text is not None and text in vocabulary else ()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value


def _token_text(value: object) -> str | None:
    """A token in a settings file is its text, or an object with the text as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class _HuggingFaceEncoder:
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


def _load_huggingface(path: Path, settings: Settings) -> Tokenizer:
    library = _open_huggingface(path)
    vocabulary = library.get_vocab(with_added_tokens=True)
    texts = [""] * (max(vocabulary.values(), default=-1) + 1)
    for text, i in vocabulary.items():
        texts[i] = text
    state = library.decoder.__getstate__() if library.decoder else b"null"
    try:
        to_bytes, leading_spaces = _huggingface_decoder(json.loads(state))
    except NotImplementedError as error:
        raise ValueError(
            f"{path} decodes with {error}, which Weft cannot stream; it knows ByteLevel, Metaspace,"
            " WordPiece, ByteFallback with Replace, Fuse and Strip of leading spaces, and none"
        ) from None
    return Tokenizer(
        _HuggingFaceEncoder(library),
        tuple(to_bytes(text) if text else b"" for text in texts),
        frozenset(i for i, t in library.get_added_tokens_decoder().items() if t.special),
        bos_id=next(iter(settings.ids_of("bos_token", vocabulary)), None),
        eos_ids=settings.ids_of("eos_token", vocabulary),
        leading_spaces=leading_spaces,
    )


def _open_huggingface(path: Path) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer ({error}); fetch it again") from error
    # Files saved after training may cut or pad texts; a server must see the prompt as it is.
    library.no_truncation()
    library.no_padding()
    return library


def _huggingface_decoder(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], int]:
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
                return _byte_level_bytes, 0
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
                raise NotImplementedError(json.dumps(step))

    def to_bytes(token: str) -> bytes:
        if byte_fallback and (byte := _BYTE_PIECE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes, leading_spaces


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print in Latin-1 stand for themselves, the others
    for the characters from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printing))
    return {chr(b): b for b in printing} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[c] for c in token])
    except KeyError:  # an added token, which is spelled as it is
        return token.encode()


def _wordpiece_bytes(token: str, prefix: str, cleanup: bool) -> bytes:
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    closes_up = cleanup and token in (".", "?", "!", ",")
    return (token if closes_up else f" {token}").encode()


@dataclass(frozen=True)
class _SentencePieceEncoder:
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


def _load_sentencepiece(path: Path, settings: Settings) -> Tokenizer:
    model = _ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        if not model.pieces:
            raise DecodeError("it has no pieces")
        library = rest = _open_sentencepiece(model)
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
        rest = _open_sentencepiece(model)

    kind = _ModelProto.SentencePiece
    pieces = [_sentencepiece_bytes(p.piece, p.type == kind.BYTE) for p in model.pieces]
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
        _SentencePieceEncoder(
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


def _open_sentencepiece(model: Any) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _if_any(token_id: int) -> tuple[int, ...]:
    """Sentencepiece says -1 for no token."""
    return (token_id,) if token_id >= 0 else ()


def _sentencepiece_bytes(piece: str, is_byte: bool) -> bytes:
    if is_byte and (byte := _BYTE_PIECE.fullmatch(piece)):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


@dataclass(frozen=True)
class _TiktokenEncoder:
    library: tiktoken.Encoding
    added: frozenset[str]
    parsed: frozenset[str]
    prefix: list[int]
    suffix: list[int]

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        tokens = self.parsed if parse_special else self.added
        ids = self.library.encode(text, allowed_special=set(tokens), disallowed_special=())
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids


@dataclass(frozen=True)
class _Ranks:
    """What a rank file leaves out, for one that is known by how many ranks it has."""

    pattern: str
    special: tuple[str, ...]
    """The texts of the ids that follow the last rank."""
    bos: tuple[str, ...] = ()
    eos: tuple[str, ...] = ()


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = _Ranks(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ("<|endoftext|>",),
    eos=("<|endoftext|>",),
)
_CL100K = _Ranks(
    _WORDS % "{1,3}",
    # Id 100256 was never given out.
    ("", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    + ("",) * 15
    + ("<|endofprompt|>",),
    eos=("<|endoftext|>",),
)
_LLAMA3 = _Ranks(
    _WORDS % "{1,3}",
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
    ),
    bos=("<|begin_of_text|>",),
    eos=("<|end_of_text|>", "<|eot_id|>"),
)
_QWEN = _Ranks(
    _WORDS % "",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
    eos=("<|endoftext|>", "<|im_end|>"),
)
_KNOWN_RANKS = {50_256: _GPT2, 100_256: _CL100K, 128_000: _LLAMA3, 151_643: _QWEN}
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")


def _load_tiktoken(path: Path, settings: Settings) -> Tokenizer:
    ranks = _read_ranks(path)
    known = _KNOWN_RANKS.get(len(ranks)) or _Ranks(pattern="", special=())
    pattern = settings.pattern or known.pattern
    if not pattern:
        raise ValueError(
            f"{path} has {len(ranks)} ranks, and how text is split into words is known for"
            f" {', '.join(map(str, _KNOWN_RANKS))}; fetch it again, or give the regular expression"
            f' as "pat_str" in {path.parent / "tokenizer_config.json"}'
        )
    following = enumerate(known.special, start=len(ranks))
    added = settings.added or {i: AddedToken(text, True) for i, text in following if text}
    ids = {token.text: i for i, token in added.items()}
    try:
        library = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids
        )
    except ValueError as error:
        raise ValueError(f"tiktoken does not take {path} with {pattern!r}: {error}") from error
    pieces = [b""] * (library.max_token_value + 1)
    for piece, i in ranks.items():
        pieces[i] = piece
    for i, token in added.items():
        pieces[i] = token.text.encode()
    bos_ids = settings.ids_of("bos_token", ids) or tuple(ids[t] for t in known.bos if t in ids)
    eos_ids = settings.ids_of("eos_token", ids) or tuple(ids[t] for t in known.eos if t in ids)
    add_bos = bool(known.bos) if settings.add_bos is None else settings.add_bos
    return Tokenizer(
        _TiktokenEncoder(
            library,
            added=frozenset(t.text for t in added.values() if not t.special),
            parsed=frozenset(ids),
            prefix=list(bos_ids[:1]) if add_bos else [],
            suffix=list(eos_ids[:1]) if settings.add_eos else [],
        ),
        tuple(pieces),
        frozenset(i for i, token in added.items() if token.special),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=eos_ids,
        leading_spaces=0,
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Byte strings by rank; a rank is also the id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii's error is one
            raise ValueError(
                f"line {number} of {path} is not a token in base64 and its rank; fetch it again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks in {path} do not count up from 0 one by one; fetch it again")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"{path} has no token for byte {missing[0]:#04x}; fetch it again")
    return ranks
