"""Every command that README.md shows does what it should; CONTRIBUTING.md has the conventions."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from serve import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHOWN_ADDRESS = "127.0.0.1:8500"
TIMEOUT_S = 240
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>sh|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SERVES = re.compile(r"make serve|weft serve configs/serve/demo\.toml")
ELSEWHERE = re.compile(r"git clone .*|cd .*|make (setup|test|check|bench|gpu-check)\b.*")
"""What would need a network, a clone, or never end from within the suite; targets must exist."""


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    reason: str
    """Why it is not run; empty when it is."""

    @property
    def commands(self) -> list[str]:
        """One for each line; a backslash at the end of a line joins it to the next."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(text: str) -> list[Block]:
    return [
        Block(
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["code"],
            match["reason"] or "",
        )
        for match in BLOCK.finditer(text)
    ]


SHOWN = blocks(README.read_text(encoding="utf-8")) if README.is_file() else []


@contextmanager
def endpoint(config: str, *changes: str) -> Iterator[str]:
    """Where `weft serve` listens with a configuration and changes to it."""
    every = ("listen.grpc=127.0.0.1:0", "listen.http=", *changes)
    options = [word for change in every for word in ("--set", change)]
    code = "import sys; sys.argv[0] = 'weft'; from serve.cli import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "serve", config, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    with server:
        greeting = server.stdout.readline()
        found = re.search(r"\d+\.\d+\.\d+\.\d+:\d+", greeting)
        assert found, f"the endpoint did not start; it said {greeting!r}"
        yield found[0]
        server.send_signal(signal.SIGTERM)
        server.stdout.read()
    assert server.returncode == 0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where an endpoint of the demo model listens."""
    with endpoint("configs/serve/demo.toml") as shown_at:
        yield shown_at


@pytest.mark.skipif(not SHOWN, reason="README.md shows no command")
@pytest.mark.parametrize("block", SHOWN, ids=lambda block: f"line {block.line}")
def test_what_the_readme_shows_works(
    block: Block, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if block.language == "python":
        run([sys.executable, "-c", at_endpoint(block.code, request)])
        return
    for command in block.commands:
        if SERVES.match(command):
            request.getfixturevalue("address")
        elif block.reason or ELSEWHERE.fullmatch(command):
            check(shlex.split(command))
        else:
            # What an earlier run, or a reader, has made there is in nobody's way.
            command = command.replace("build/", f"{tmp_path}/")
            run(["bash", "-c", at_endpoint(command, request)])


def at_endpoint(code: str, request: pytest.FixtureRequest) -> str:
    """`code` that talks to the endpoint of this test instead of a user's."""
    if SHOWN_ADDRESS not in code:
        return code
    return code.replace(SHOWN_ADDRESS, request.getfixturevalue("address"))


def run(command: list[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
    assert done.stdout.strip(), f"{command[-1]} printed nothing"


def check(words: list[str]) -> None:
    """That a command which is not run exists, with the options it is given."""
    match words:
        case ["make", *arguments]:
            command = ["make", "--dry-run", *arguments]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        case ["weft" | ".venv/bin/weft", *arguments]:
            parse(arguments)
        case _:
            pass


def parse(arguments: list[str]) -> None:
    """Raises what the command line raises for arguments it does not know."""
    command: Any = get_command(cli.app)
    context = None
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name, [*arguments], parent=context)
        _, command, arguments = command.resolve_command(context, arguments)
    command.make_context(command.name, arguments, parent=context)


SAMPLE = """
```sh
make serve
weft generate MODEL \\
  --prompt hello  # a comment
```
<!-- not run: takes an hour -->
```sh
# once
weft bench offline --peer transformers
```
```text
output
```
"""


def test_blocks_are_found_with_their_lines_and_reasons() -> None:
    first, second = blocks(SAMPLE)
    assert (first.line, first.reason) == (2, "")
    assert first.commands == ["make serve", "weft generate MODEL    --prompt hello  # a comment"]
    assert (second.line, second.reason) == (7, "takes an hour")
    assert second.commands == ["weft bench offline --peer transformers"]


def test_a_command_that_is_not_run_must_exist_with_its_options() -> None:
    check(["weft", "bench", "offline", "--peer", "transformers"])
    check(["make", "test"])
    usage_error: Any = typer.BadParameter.__base__
    with pytest.raises(usage_error, match="--pear"):
        check(["weft", "bench", "offline", "--pear", "transformers"])
    with pytest.raises(subprocess.CalledProcessError):
        check(["make", "tset"])
