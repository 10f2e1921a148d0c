"""Text for the demo model: the standard library's sources and pydoc's topics, as token streams.

It reads only what any CPython 3.12 has on disk, and knows nothing of the model.
"""

import hashlib
import io
import json
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import sentencepiece as spm

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

# Not ours to learn from (site-packages), odd by intent (tests), or tables and not text.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "lib-dynload",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}
SKIPPED_FILES = {"stringprep.py", "html/entities.py"}
# Written when this interpreter was built; full of its builder's paths.
GENERATED_PREFIXES = ("_sysconfigdata", "config-")

# One document in twenty is held out.
HELD_OUT_SHARE = 1 / 20

# Indentation of any usual depth is one token, so that a line's layout costs one token.
SPACE_RUNS = (*range(2, 17), 20, 24, 28, 32)

# A prompt that ends in a space ends in a token that training text, where the space belongs to the
# word after it, never shows. So this share of words is written as a space and the word.
SPLIT_SHARE = 0.02


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def documents(stdlib: Path | None = None) -> list[Document]:
    """Every document of the corpus, ordered by name."""
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    found = [
        Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace"))
        for path in root.rglob("*.py")
        if _wanted(path.relative_to(root))
    ]
    found += [Document(f"pydoc_data/topics/{name}", text) for name, text in topics.items()]
    return sorted((d for d in found if d.text.strip()), key=lambda document: document.name)


def is_held_out(name: str) -> bool:
    """Whether a document is kept from training: decided by its name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def fingerprint(corpus: Iterable[Document]) -> str:
    """A digest of names and texts: equal corpora, equal digests."""
    digest = hashlib.sha256()
    for document in corpus:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def train_tokenizer(corpus: Sequence[Document], vocab_size: int) -> bytes:
    """A sentencepiece BPE model that gives every text back exactly."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(line for d in corpus for line in d.text.split("\n") if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        user_defined_symbols=["\n", "\t", *("▁" * n for n in SPACE_RUNS)],
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        max_sentence_length=16_384,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(model: bytes, max_context: int, out: Path) -> None:
    """Write the tokenizer and how Hugging Face's Llama tokenizer has to use it."""
    (out / "tokenizer.model").write_bytes(model)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": max_context,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True)
class Stream:
    """Documents end to end, each closed by the end-of-sequence token."""

    tokens: np.ndarray
    line_starts: np.ndarray
    num_documents: int
    num_bytes: int

    def batch(self, context: int, batch_tokens: int, seed: int, step: int) -> np.ndarray:
        """Rows of `context + 1` tokens for one step: BOS, then text from the start of a line,
        which is how prompts look. A function of its arguments: a resumed run sees the same."""
        rng = np.random.default_rng((seed, step))
        usable = self.line_starts[: np.searchsorted(self.line_starts, len(self.tokens) - context)]
        starts = rng.choice(usable, max(1, batch_tokens // context))
        rows = self.tokens[starts[:, None] + np.arange(context)]
        return np.insert(rows, 0, BOS_ID, axis=1)

    def windows(self, context: int) -> np.ndarray:
        """The whole stream as rows of `context + 1` tokens, BOS first, cut short at the end."""
        rows = self.tokens[: len(self.tokens) // context * context].reshape(-1, context)
        return np.insert(rows, 0, BOS_ID, axis=1)


def encode(
    corpus: Sequence[Document],
    tokenizer: spm.SentencePieceProcessor,
    split_seed: int | None = None,
) -> Stream:
    """The documents as one stream; with `split_seed`, some words are parted from their space."""
    pieces = [np.array([*tokenizer.encode(d.text), EOS_ID], np.int32) for d in corpus]
    tokens = np.concatenate(pieces)
    if split_seed is not None:
        tokens = _split_spaces(tokens, tokenizer, np.random.default_rng(split_seed))
    ends = (tokens == tokenizer.piece_to_id("\n")) | (tokens == EOS_ID)
    return Stream(
        tokens=tokens,
        line_starts=np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1]),
        num_documents=len(corpus),
        num_bytes=sum(len(d.text.encode()) for d in corpus),
    )


def _wanted(path: Path) -> bool:
    return (
        not SKIPPED_FOLDERS & set(path.parts)
        and path.as_posix() not in SKIPPED_FILES
        and not path.parts[0].startswith(GENERATED_PREFIXES)
    )


def _split_spaces(
    tokens: np.ndarray, tokenizer: spm.SentencePieceProcessor, rng: np.random.Generator
) -> np.ndarray:
    """Replace a share of `▁word` tokens by `▁` and `word`."""
    word_of = np.full(tokenizer.vocab_size(), UNK_ID, np.int32)
    for token in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(token)
        if piece.startswith("▁") and piece.strip("▁"):
            word_of[token] = tokenizer.piece_to_id(piece[1:])
    split = (word_of[tokens] != UNK_ID) & (rng.random(len(tokens)) < SPLIT_SHARE)
    where = np.flatnonzero(split)
    words = word_of[tokens[where]]
    tokens = tokens.copy()
    tokens[where] = tokenizer.piece_to_id("▁")
    return np.insert(tokens, where + 1, words)
