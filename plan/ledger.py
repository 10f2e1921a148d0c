"""The ledger of a run: a JSON line for each point that is done, kept so that a run can be cut.

It does not know what is measured. A line is written whole and synced, or is torn and dropped when
the ledger is opened next.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

Status = Literal["ok", "does not fit", "failed", "timed out"]


class LedgerError(ValueError):
    """A ledger that can't be gone on with; says what to do."""


@dataclass(frozen=True)
class Record:
    """What became of one point."""

    key: str
    """`Point.key`."""
    kind: str
    settings: Mapping[str, Any]
    commit: str
    """`plan.machine.sources`."""
    device: str
    """What it was measured on, JAX's version included."""
    status: Status
    reason: str
    """Why, where the status is not ok."""
    figures: Mapping[str, Any]
    started: str
    """UTC, ISO 8601."""
    wall_s: float
    """Of the whole point, compilation included."""

    @property
    def settled(self) -> bool:
        """Whether doing it again would give the same: a failure may have been the machine's."""
        return self.status in ("ok", "does not fit")


class Ledger:
    """The file, held by one run at a time; leaving the context lets go of it."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        """What is torn, or with `fresh` everything, is dropped. Raises LedgerError."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fresh:
                self._file.truncate(0)
            self._file.seek(0)
            text = self._file.read()
            self.records = _parse(path, text)
            self._file.truncate(text.rfind(b"\n") + 1)
        except BlockingIOError:
            self._file.close()
            raise LedgerError(
                f"{path} is another run's at the moment; wait for it, or name another --out"
            ) from None
        except LedgerError:
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        self._file.write(json.dumps(asdict(record)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_records(path: Path) -> list[Record]:
    """Those of a ledger that may be under way; none where there is no file. Raises LedgerError."""
    return _parse(path, path.read_bytes()) if path.is_file() else []


def latest(
    records: Iterable[Record], commit: str | None = None, device: str | None = None
) -> dict[str, Record]:
    """By key, the last record, of that commit and device if named."""
    return {
        record.key: record
        for record in records
        if commit in (None, record.commit) and device in (None, record.device)
    }


def _parse(path: Path, text: bytes) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            raise LedgerError(
                f"{path}:{number} is not a record of a point; mend it, or start with --fresh"
            ) from None
    return records
