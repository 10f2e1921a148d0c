"""tiktoken's files of ranks, with what such a file leaves out: the pattern and special tokens.

It does not know the other files that state a vocabulary.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from model.tokenizer.settings import AddedToken, Settings
from model.tokenizer.tokenizer import Tokenizer


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


def is_rank_file(path: Path) -> bool:
    """Whether the first line is a token in base64 and its rank."""
    return _RANK_LINE.fullmatch(path.read_bytes().partition(b"\n")[0]) is not None


def load(path: Path, settings: Settings) -> Tokenizer:
    """The tokenizer in a file of ranks."""
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
        _Encoder(
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


@dataclass(frozen=True)
class _Encoder:
    library: tiktoken.Encoding
    added: frozenset[str]
    parsed: frozenset[str]
    prefix: list[int]
    suffix: list[int]

    def encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        tokens = self.parsed if parse_special else self.added
        ids = self.library.encode(text, allowed_special=set(tokens), disallowed_special=())
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids


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
