"""Text to token ids and back, with the tokenizer files that checkpoints come with.

It does not know streams (`model/detokenizer`), conversations (`model/chat`) or models.
"""

from pathlib import Path

from model.tokenizer import hugging_face, sentencepiece_model, tiktoken_ranks
from model.tokenizer.settings import Settings, read_json
from model.tokenizer.tokenizer import Tokenizer, drop_spaces

__all__ = ["Settings", "Tokenizer", "drop_spaces", "load_tokenizer", "read_json"]


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a checkpoint's directory; None where there is none: ids in, ids out."""
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory; give a checkpoint's directory")
    settings = Settings.read(directory)
    # tokenizer.json first: of several files it is the one that states everything (normalizer,
    # special tokens, what is added around a text), and the one fine-tunes keep up to date.
    if (path := directory / "tokenizer.json").is_file():
        return hugging_face.load(path, settings)
    if (path := directory / "tokenizer.model").is_file():
        # A ModelProto opens with a field tag; Llama 3 gave the same name to tiktoken's text.
        library = tiktoken_ranks if tiktoken_ranks.is_rank_file(path) else sentencepiece_model
        return library.load(path, settings)
    if paths := sorted(directory.glob("*.tiktoken")):
        return tiktoken_ranks.load(paths[0], settings)
    return None
