"""config.json read key by key, so that nothing in it goes unnoticed.

It does not know what any key means (`decoder.py` and the families).
"""

from collections.abc import Collection, Mapping
from reprlib import repr as shortened
from typing import Any


class UnsupportedModel(ValueError):
    """A configuration that asks for something this decoder does not compute."""


class Keys:
    """The keys of one config.json, with a family's defaults for those that files leave out.

    Methods take every spelling of a key; if a file has several, they must agree. A key that is
    neither in the file nor among the defaults is an error, as is whatever `finish` finds unread.
    """

    def __init__(
        self,
        architecture: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        within: str = "",
    ) -> None:
        self.architecture = architecture
        self._values = values
        self._defaults = defaults
        self._within = within
        self._unread = set(values)

    def given(self, key: str) -> bool:
        """Whether the file itself has the key."""
        return key in self._values

    def integer(self, *spellings: str) -> int:
        return self._typed(spellings, int, "an integer")

    def optional_integer(self, *spellings: str) -> int | None:
        return None if self.any(*spellings) is None else self.integer(*spellings)

    def size(self, *spellings: str) -> int:
        value = self.integer(*spellings)
        if value <= 0:
            raise self.refusal(self._key(spellings), "a positive integer")
        return value

    def optional_size(self, *spellings: str) -> int | None:
        return None if self.any(*spellings) is None else self.size(*spellings)

    def number(self, *spellings: str) -> float:
        return float(self._typed(spellings, (int, float), "a number"))

    def optional_number(self, *spellings: str) -> float | None:
        return None if self.any(*spellings) is None else self.number(*spellings)

    def flag(self, *spellings: str) -> bool:
        return self._typed(spellings, bool, "true or false")

    def text(self, *spellings: str) -> str:
        return self._typed(spellings, str, "a string")

    def mapping(self, *spellings: str) -> Mapping[str, Any]:
        """The object at a key; empty if null."""
        if self.any(*spellings) is None:
            return {}
        return self._typed(spellings, Mapping, "an object")

    def choice[T](self, *spellings: str, options: Mapping[str, T]) -> T:
        """What the string at a key stands for."""
        value = self.text(*spellings)
        if value not in options:
            raise self.refusal(self._key(spellings), ", ".join(options))
        return options[value]

    def skip(self, *keys: str) -> None:
        """Counts keys as read that mean nothing beside the others' values."""
        self._unread -= set(keys)

    def any(self, *spellings: str) -> Any:
        """The value, whatever its type."""
        self._unread -= set(spellings)
        found = [key for key in spellings if key in self._values]
        if not found:
            if spellings[0] not in self._defaults:
                others = f" (or {' or '.join(spellings[1:])})" if spellings[1:] else ""
                raise UnsupportedModel(
                    f"{self.architecture}: config.json has no {self._within}{spellings[0]}{others}"
                )
            return self._defaults[spellings[0]]
        values = [self._values[key] for key in found if self._values[key] is not None]
        if any(value != values[0] for value in values):
            both = " and ".join(f"{self._within}{key} = {self._values[key]!r}" for key in found)
            raise UnsupportedModel(
                f"{self.architecture}: config.json has {both}, which mean the same; remove one"
            )
        return values[0] if values else None

    def finish(self, inert: Collection[str], off: Mapping[str, Collection[Any]]) -> None:
        """Refuses what was not read, unless it is inert or has a value that means off."""
        for key in sorted(self._unread):
            if key in off:
                if self._values[key] not in off[key]:
                    raise self.refusal(key, ", ".join(map(str, off[key])))
            elif key not in inert and not key.startswith("_"):
                raise UnsupportedModel(
                    f"{self.architecture}: config.json has {self._shown(key)}, a key that is not "
                    "known for this architecture; remove it if it cannot change the model's output"
                )

    def refusal(self, key: str, supported: str) -> UnsupportedModel:
        """The error for a value that is not `supported`."""
        return UnsupportedModel(
            f"{self.architecture}: config.json has {self._shown(key)}; supported: {supported}"
        )

    def _typed(self, spellings: tuple[str, ...], kind: Any, named: str) -> Any:
        value = self.any(*spellings)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refusal(self._key(spellings), named)
        return value

    def _key(self, spellings: tuple[str, ...]) -> str:
        return next((key for key in spellings if self._values.get(key) is not None), spellings[0])

    def _shown(self, key: str) -> str:
        return f"{self._within}{key} = {shortened(self._values.get(key, self._defaults.get(key)))}"
