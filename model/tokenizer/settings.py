"""What the JSON files beside a tokenizer say about it.

It does not know which library reads the tokenizer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
