"""An engine in a process of its own, as the bench sees it.

It does not know which engine, only how it is started and how it talks (`bench/peers/protocol.py`).
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

import psutil

from bench.peers.protocol import Answer, Job, Ready

STOP_S = 10.0
"""How long a worker may take to leave once its input is closed."""
TAIL_LINES = 5


class WorkerError(RuntimeError):
    """A worker that did not start, died, or could not do a job; says what it last wrote."""


class Worker:
    """A running engine; leaving the context ends its process.

    Between jobs it is stopped: threads that wait by spinning would slow the engine that is timed.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (close())
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # A group of its own, so that signals reach what the engine itself starts. Should the
            # bench be killed, the kernel hangs up on a group that is stopped.
            process_group=0,
        )
        try:
            self.ready = Ready(**self._receive("ready"))
        except BaseException:
            self.close()
            raise

    def ask(self, job: Job) -> Answer:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            return Answer(**self._receive("answer"))
        except BrokenPipeError:
            raise WorkerError(self._died()) from None
        finally:
            self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_s(self) -> float:
        """Processor time its process has used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        try:
            # Closes its stdin; what it may still write is not wanted.
            self._process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self.pid, number)

    def _receive(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # it may have died in the middle of one
            raise WorkerError(self._died())
        message = json.loads(line)
        if "error" in message:
            raise WorkerError(f"{self.name}: {message['error']}")
        return message[kind]

    def _died(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-TAIL_LINES:]).rstrip()
        return f"{self.name} ended with status {status}; it last wrote:\n{tail or '(nothing)'}"
