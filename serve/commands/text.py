"""What turns text into a model's tokens, read from its checkpoint and checked against its size."""

from pathlib import Path
from typing import NamedTuple

from model.chat import ChatTemplate, load_chat_template
from model.checkpoint import CheckpointError
from model.families import read_model_config
from model.tokenizer import Tokenizer, load_tokenizer


class Text(NamedTuple):
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None


def load_text(directory: Path) -> Text:
    """The tokenizer and chat template in `directory`, None where it has none.

    Raises CheckpointError, and what `read_model_config` raises, before any weight is read.
    """
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {problem}; give the directory of a checkpoint")
    vocab_size = read_model_config(directory).vocab_size
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer is not None:
        _check_size(tokenizer, vocab_size, directory)
    return Text(tokenizer, load_chat_template(directory))


def _check_size(tokenizer: Tokenizer, vocab_size: int, directory: Path) -> None:
    """Special ids beyond the embedding, such as Gemma 3's for images, are harmless: prompts with
    them are refused."""
    beyond = set(range(vocab_size, tokenizer.vocab_size)) - tokenizer.special_ids
    if beyond:
        raise CheckpointError(
            f"{directory}: the tokenizer has ids up to {max(beyond)}, the embedding has "
            f"{vocab_size} rows; the tokenizer is another model's: fetch the checkpoint again"
        )
