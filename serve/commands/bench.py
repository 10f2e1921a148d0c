"""`weft bench`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

import bench.offline
from bench.peers.worker import WorkerError
from serve.errors import RequestError


def offline(
    model: Path | None,
    peers: Sequence[str],
    runs: int,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Prints the table, or with `as_json` all that it is made of. Raises RequestError."""
    try:
        bench.offline.check(peers, runs, dtype)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        report = bench.offline.run(
            model,
            peers,
            runs,
            out,
            dtype=dtype,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (ValueError, WorkerError) as error:
        raise RequestError(str(error)) from error
    print(report.to_json() if as_json else report.to_markdown())
