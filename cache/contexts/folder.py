"""Contexts in a directory, a file for each. The directory is one server's alone.

It does not know which contexts are still to be there. Its owner's lock guards it.
"""

import logging
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

from cache.contexts.context import Context, NotSaved
from cache.contexts.record import RecordFormat
from cache.tiers.counts import Miss

log = logging.getLogger("weft")

SUFFIX, UNFINISHED = ".context", ".unfinished"


class Folder:
    def __init__(self, directory: Path, form: RecordFormat) -> None:
        self.skipped: Counter[Miss] = Counter()
        """Files that are not contexts of this server: they stay as they are."""
        self._directory, self._form = directory, form
        self._undeleted: set[Path] = set()
        self._has_warned = False
        """That a file could not be deleted."""

    def load(self) -> list[Context]:
        """What can be read; of the rest the log has one line."""
        contexts: list[Context] = []
        try:
            paths = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return []  # it is made when the first context is
        except OSError as error:
            log.warning("no context was read from %s: %s", self._directory, error)
            self.skipped[Miss.FAILED] += 1
            return []
        for path in paths:
            if path.suffix == UNFINISHED:  # of a process that ended while it wrote
                self._delete(path)
            elif path.suffix == SUFFIX:
                found = self._read(path)
                if isinstance(found, Context):
                    contexts.append(found)
                else:
                    self.skipped[found] += 1
        if self.skipped:
            reasons = ", ".join(f"{count} {miss}" for miss, count in self.skipped.items())
            log.warning(
                "%d files in %s are left as they are, and their contexts are lost: %s",
                self.skipped.total(),
                self._directory,
                reasons,
            )
        return contexts

    def save(self, context: Context) -> None:
        """All of it or nothing: raises NotSaved, and then what was there before still is."""
        path = self._path(context.name)
        unfinished = path.with_suffix(UNFINISHED)
        try:
            # Prompts are nobody else's to read.
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(unfinished, "wb", opener=_private) as file:
                file.write(self._form.encode(context))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            self._delete(unfinished)
            raise NotSaved(
                f"a context of {context.num_tokens} tokens could not be saved in "
                f"{self._directory}: {error.strerror or error}; free space there, or make it "
                "writable"
            ) from error

    def delete(self, name: str) -> None:
        """If that fails, `retry_deletes` tries again; a restart before then brings it back."""
        self._delete(self._path(name))

    def retry_deletes(self) -> None:
        for path in sorted(self._undeleted):
            self._delete(path)

    def _path(self, name: str) -> Path:
        return self._directory / (name.rpartition("/")[2] + SUFFIX)

    def _read(self, path: Path) -> Context | Miss:
        with suppress(OSError):
            return self._form.decode(f"contexts/{path.stem}", path.read_bytes())
        return Miss.FAILED

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._undeleted.add(path)
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s is not deleted, and will be tried again; said once", error)
        else:
            self._undeleted.discard(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
