"""How a name that is not known is refused: with the nearest that is, and with all.

It does not know what is named.
"""

import difflib
from collections.abc import Iterable


def unknown(what: str, given: object, known: Iterable[str]) -> str:
    """`there is no model lama; did you mean llama? there are llama, tiny`."""
    names = list(known)
    return f"there is no {what} {given}; {did_you_mean(given, names)}there are {', '.join(names)}"


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """`did you mean llama? `, or nothing where nothing is near, or it is known."""
    nearest = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {nearest[0]}? " if nearest and nearest[0] != given else ""
