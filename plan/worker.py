"""A process that measures points, and the pipe to it: a JSON line in and a JSON line out for each.

    python -m plan.worker cpu:8

It does not know the ledger or the run (`plan/drive.py`), nor what a kind measures.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from plan.ahead import prepare
from plan.devices import Devices, environment, inherited_flags, parse_devices
from plan.experiment import Point, make_point
from plan.ledger import Status
from plan.machine import cores

START_LIMIT_S = 120.0
"""A process that has not imported JAX and seen its devices by then will not."""
STOP_S = 5.0
TAIL_LINES = 5


class WorkerDied(RuntimeError):
    """The process ended; says with what status and last words."""


class WorkerLate(RuntimeError):
    """The process did not answer in time, and was ended."""


@dataclass(frozen=True)
class Answer:
    status: Status
    reason: str
    figures: dict[str, Any]


class Worker:
    """The parent's end; leaving the context ends the process."""

    def __init__(
        self,
        devices: Devices,
        hardware: str | None = None,
        flags: str = "",
        module: str = "plan.worker",
    ) -> None:
        """Waits until the process sees its devices. Raises WorkerDied or WorkerLate."""
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (close())
        variables = environment(devices, flags, os.environ)
        # The sources may lie beside us without being installed.
        folders = [str(Path(__file__).parents[1]), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(devices), *([hardware] if hardware else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=variables,
            # Ctrl-C is the parent's to handle.
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            ready = self._receive(START_LIMIT_S)
            if "error" in ready:
                raise WorkerDied(ready["error"])
            self.device: str = ready["device"]
            # They decide figures, and no point names them.
            if flags_before := inherited_flags(os.environ):
                self.device += f", XLA_FLAGS {flags_before}"
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def measure(self, point: Point, limit_s: float) -> Answer:
        """Raises WorkerDied, or WorkerLate after `limit_s`; the process is of no use then."""
        return self._ask(point.to_dict(), limit_s)

    def prepare(self, points: Sequence[Point], limit_s: float) -> None:
        """Compiles their programs, many at a time. Raises as `measure` does."""
        self._ask({"ahead": [point.to_dict() for point in points]}, limit_s)

    def _ask(self, asked: dict[str, Any], limit_s: float) -> Answer:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDied(self._last_words()) from None
        return Answer(**self._receive(limit_s))

    def close(self) -> None:
        """A process that measures still is stopped at once, too: it watches its input."""
        if self._process.stdin is not None:
            # Closing sends what could not be written to a process that had died.
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _receive(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self._process.kill()
            raise WorkerLate(f"no answer within {limit_s:g} s") from None
        if not line:
            raise WorkerDied(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-TAIL_LINES:]).rstrip()
        return f"the process ended with status {status}; it last wrote: {tail or '(nothing)'}"


def main() -> None:
    """Answers points on stdin until it closes, even in the middle of one.

    Only answers are written to the process's stdout: what libraries print goes to stderr.
    """
    devices = parse_devices(sys.argv[1])
    hardware = sys.argv[2] if len(sys.argv) > 2 else None
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        points: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_watch, args=(sys.stdin, points.put), daemon=True).start()
        try:
            device = name_device(devices)
            # What is not their own decides floors, and so is part of what figures were taken on.
            if hardware not in (None, devices.platform):
                device += f", held to {hardware}"
            _write(answers, {"device": device})
        except Exception as error:
            traceback.print_exc()
            _write(answers, {"error": f"{type(error).__name__}: {error}"})
            return
        while True:
            _write(answers, asdict(answer(json.loads(points.get()), devices, hardware)))


def answer(asked: dict[str, Any], devices: Devices, hardware: str | None) -> Answer:
    """What became of one point; or of preparing several."""
    try:
        if "ahead" in asked:
            prepare([make_point(**point).settings for point in asked["ahead"]], devices)
            return Answer("ok", "", {})
        settings = make_point(asked["kind"], asked["settings"]).settings
        outcome = settings.measure(devices, hardware)
    except Exception as error:
        traceback.print_exc()
        # XLA's only mark of a device without memory left; the first line says how much it wanted.
        full = "RESOURCE_EXHAUSTED" in str(error)
        reason = f"{type(error).__name__}: {str(error).partition('\n')[0]}"
        return Answer("does not fit" if full else "failed", reason, {})
    return Answer("does not fit" if outcome.misfit else "ok", outcome.misfit, {**outcome.figures})


def _watch(lines: TextIO, put: Callable[[str], None]) -> None:
    """Our end is that of the parent, whatever we are at: it may have been killed."""
    for line in lines:
        put(line)
    os._exit(0)


def name_device(devices: Devices) -> str:
    """What is measured on, in words, and by which JAX."""
    import jax

    if devices.described:
        from plan.described import described_mesh
        from sharding.mesh import MeshShape

        described_mesh(MeshShape(tensor=devices.count or 1))
        name = f"described {devices}"
    elif devices.platform == "cpu":
        name = f"{devices.count} virtual devices on {cores()}"
    else:
        found = jax.devices()
        if found[0].platform != "gpu":
            raise RuntimeError(
                f"there is no GPU, only {found[0].device_kind}; see weft doctor, or set devices to "
                "cpu:N or h200:N"
            )
        name = f"{len(found)} {found[0].device_kind} beside {cores()}"
    return f"{name}, jax {jax.__version__}"


def _write(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
