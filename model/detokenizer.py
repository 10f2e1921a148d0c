"""Streams of token ids to streams of text, and where a stream must stop.

It does not know requests or why a stream ends; one object serves one stream, one thread at a time.
"""

import codecs
from collections.abc import Iterable, Sequence

from model.tokenizer import Tokenizer, drop_spaces


class Detokenizer:
    """The text of a growing list of ids, piece by piece.

    The pieces joined are what `tokenizer.decode(prompt_ids + ids)` has after the complete
    characters of the prompt, however the ids are split. So a character that the prompt leaves
    half done is the completion's, and a leading space is dropped only where no text precedes it.
    Each piece is final: at most three bytes, of a character that may yet be completed, are held
    back. Of `prompt_ids` the last few matter, and only they are read.

    An id outside the vocabulary has no text here, unlike in `Tokenizer.decode`: models pad their
    vocabularies, and what a model has sampled is no caller's mistake.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._leading_spaces = tokenizer.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode(self._last_bytes(prompt_ids))

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make final."""
        return self._decode(self._bytes(ids))

    def flush(self) -> str:
        """The rest at the end of the stream: U+FFFD when it ends amid a character, or nothing."""
        return self._utf8.decode(b"", final=True)

    def _decode(self, data: bytes) -> str:
        if self._leading_spaces and data:
            kept = drop_spaces(data, self._leading_spaces)
            self._leading_spaces = 0 if kept else self._leading_spaces - len(data)
            data = kept
        return self._utf8.decode(data)

    def _bytes(self, ids: Iterable[int]) -> bytes:
        vocabulary = self._tokenizer.pieces
        size = len(vocabulary)
        skipped = self._skipped
        return b"".join(vocabulary[i] for i in ids if 0 <= i < size and i not in skipped)

    def _last_bytes(self, ids: Sequence[int]) -> bytes:
        """As much of the end of the prompt as decides what follows: some text, so that no leading
        space is dropped, and the three bytes that may begin a character."""
        data = b""
        for token_id in reversed(ids):
            data = self._bytes([token_id]) + data
            if len(data) >= 3 and data.strip(b" "):
                break
        return data


class StopStrings:
    """Ends a stream of text where the earliest of some strings begins.

    The pieces joined are the text before that place, however the text is split. What may be the
    beginning of a stop string is held back; so is a match while a longer stop string that began
    before it may still be completed. A character costs a few steps per stop string, whatever
    their lengths.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; give at least one character, or leave it out")
        self.stop: str | None = None
        """The stop string that ended the stream."""
        self._searches = [_Search(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self._match: tuple[int, str] | None = None
        """The earliest match so far: where in the held text it begins, and the stop string."""

    def push(self, text: str) -> str:
        """The text now known to come before every stop string; nothing after the end."""
        if self.stop is not None:
            return ""
        if not self._held and self._first_characters.isdisjoint(text):
            return text  # most text, without a look at each character
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start=start + 1):
            for search in self._searches:
                if search.step(character):
                    begin = end - len(search.stop)
                    if self._match is None or begin < self._match[0]:
                        self._match = (begin, search.stop)
            if self._match and self._match[0] <= self._first_candidate(end):
                return self._end(*self._match)
        safe = self._first_candidate(len(self._held))
        released, self._held = self._held[:safe], self._held[safe:]
        if self._match:
            self._match = (self._match[0] - safe, self._match[1])
        return released

    def flush(self) -> str:
        """The rest at the end of the stream, up to a stop string in it."""
        if self._match:
            return self._end(*self._match)
        released, self._held = self._held, ""
        return released

    def _first_candidate(self, end: int) -> int:
        """Where the longest beginning of a stop string that reaches to `end` begins."""
        return end - max((search.matched for search in self._searches), default=0)

    def _end(self, begin: int, stop: str) -> str:
        released, self._held = self._held[:begin], ""
        self._match = None
        self.stop = stop
        return released


class _Search:
    """Knuth, Morris and Pratt's search for one string in a stream of characters."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Length of the longest beginning of `stop` that the stream so far ends with."""
        # For each beginning of `stop`, the longest shorter beginning that it ends with.
        self._shorter = [0]
        for character in stop[1:]:
            length = self._shorter[-1]
            while length and stop[length] != character:
                length = self._shorter[length - 1]
            self._shorter.append(length + (stop[length] == character))

    def step(self, character: str) -> bool:
        """Whether `stop` ends with this character of the stream."""
        if self.matched == len(self.stop):
            self.matched = self._shorter[-1]
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)
