"""An engine that computes prompts for others, in a process of its own that may be killed.

    python -m bench.split_server < CONFIG_JSON

It ends when whoever started it does. It does not know who asks it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from plan.machine import ROOT
from serve.client import Client
from serve.config import ServeConfig, make_config, override_config
from serve.errors import RequestError, Unavailable
from serve.request import Load

COMMAND = (sys.executable, "-m", "bench.split_server")
START_S = 300.0
"""Until it serves: with nothing kept, its programs are compiled."""
STOP_S = 30.0


class PrefillServer:
    """`weft serve` with `config`, on a port of this machine that stays the same."""

    def __init__(self, config: ServeConfig) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        listen = [f"listen.grpc={self.address}", "listen.http=", "listen.grace_s=1"]
        self._config = override_config(config, listen)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns at once."""
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            text=True,
        )
        assert self._process.stdin is not None, "it was asked for"
        # It stays open: at its end the process ends.
        self._process.stdin.write(self._config.model_dump_json(exclude_unset=True) + "\n")
        self._process.stdin.flush()

    def wait_ready(self) -> None:
        """Raises RequestError where it does not come up."""
        deadline_s = time.monotonic() + START_S
        with Client(self.address) as client:
            while not client.is_serving():
                process = self._process
                if process is None or process.poll() is not None or time.monotonic() > deadline_s:
                    raise RequestError(
                        f"no prefill server listens on {self.address}; see above why"
                    )
                time.sleep(0.1)

    def load(self) -> Load | None:
        """How busy it is; None while it is not there."""
        try:
            with Client(self.address) as client:
                return client.load()
        except Unavailable:
            return None

    def kill(self) -> None:
        """With SIGKILL: it can't say goodbye."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def __enter__(self) -> "PrefillServer":
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def end_after(stream: TextIO, end: Callable[[], None]) -> None:
    """Calls `end` once the stream does, from another thread."""

    def wait() -> None:
        stream.read()
        end()

    threading.Thread(target=wait, name="weft-bench-parent", daemon=True).start()


def main() -> None:
    from serve.commands import serve

    values = json.loads(sys.stdin.readline())
    end_after(sys.stdin, lambda: os.kill(os.getpid(), signal.SIGTERM))
    serve.run(make_config(values, "weft bench split"))


if __name__ == "__main__":
    main()
