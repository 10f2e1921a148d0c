"""The programs that docs/context-caching.md shows of its calls run as they stand."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_readme import ROOT, SHOWN_ADDRESS, Block, blocks, endpoint, run

SHOWN_IN = ROOT / "docs" / "context-caching.md"
HEADINGS = ("## Contexts", "## Retention", "## Events")


def shown(text: str) -> list[Block]:
    """The blocks under those headings."""
    found: list[Block] = []
    for block in blocks(text):
        before = text.splitlines()[: block.line]
        heading = next((line for line in reversed(before) if line.startswith("## ")), "")
        if heading in HEADINGS:
            found.append(block)
    return found


SHOWN = shown(SHOWN_IN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where an endpoint of configs/serve/tiered.toml listens, with folders of its own."""
    folder: Path = tmp_path_factory.mktemp("kept")
    store = f'tiers.stores=[{{name="disk", url="{(folder / "kv").as_uri()}", gib=0.5}}]'
    # Few programs: to compile them is most of this file's time.
    few = ["schedule.max_batch=1", "schedule.token_budget=64", "schedule.max_steps=1"]
    changes = [f"contexts.folder={folder / 'contexts'}"]
    with endpoint("configs/serve/tiered.toml", store, *changes, *few) as shown_at:
        yield shown_at


def test_each_heading_shows_a_program() -> None:
    assert len(SHOWN) == len(HEADINGS)


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: f"line {block.line}")
def test_what_is_shown_works(block: Block, address: str) -> None:
    assert block.language == "python", "commands are README's to show"
    run([sys.executable, "-c", block.code.replace(SHOWN_ADDRESS, address)])
