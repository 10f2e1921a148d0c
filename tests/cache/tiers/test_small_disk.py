"""A real disk that is full, and then read-only: a file system of 256 KiB of its own."""

import subprocess
import sys
import threading
from collections.abc import Buffer
from pathlib import Path
from unittest.mock import patch

import pytest

from cache.tiers.counts import Decisions, Drop, Miss, TierReport
from cache.tiers.folder import open_store
from cache.tiers.record import RecordFormat
from cache.tiers.store import StoreTier
from tests.cache.tiers.fake_store import key, keys, until

FORM = RecordFormat(b"0123456789abcdef", 8192)
NUM_PAGES = 100
GRACE_S = 5.0
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
"""In which anybody may mount."""


def can_mount(folder: Path) -> bool:
    mount = ["mount", "-t", "tmpfs", "none", str(folder)]
    try:
        return subprocess.run([*NAMESPACE, *mount], capture_output=True).returncode == 0
    except OSError:
        return False


def test_full_disk_keeps_what_it_has_and_is_used_again_when_it_can_be(tmp_path: Path):
    if not can_mount(tmp_path):
        pytest.skip("this system lets nobody mount a file system")
    root = str(Path(__file__).parents[3])
    run = "from tests.cache.tiers.test_small_disk import fill; fill()"
    mounted = 'mount -t tmpfs -o size=256k none . && PYTHONPATH=$1 exec $2 -c "$3"'
    shell = ["sh", "-c", mounted, "sh", root, sys.executable, run]
    done = subprocess.run([*NAMESPACE, *shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def image(number: int) -> bytes:
    return bytes([number]) * FORM.image_bytes


def read(tier: StoreTier, number: int) -> Buffer | Miss:
    outcomes: list[Buffer | Miss] = []
    tier.read(key(number), outcomes.append)
    until(lambda: outcomes)
    return outcomes[0]


@patch("cache.tiers.breaker.FIRST_OFF_S", 0.01)
@patch("cache.tiers.breaker.LONGEST_OFF_S", 0.01)
@patch("cache.tiers.writer.RETRY_S", 0.01)
def fill() -> None:
    """What the test says of the current folder."""
    folder = Path.cwd()
    tier = StoreTier("disk", open_store(folder.as_uri()), FORM, NUM_PAGES * FORM.record_bytes)
    listed = threading.Event()
    tier.start(listed.set)
    assert listed.wait(GRACE_S)

    def report() -> TierReport:
        return tier.report(Decisions())

    def write(numbers: range) -> None:
        for number in numbers:
            tier.write(key(number), image(number))
        until(lambda: not report().num_queued)

    write(range(NUM_PAGES))
    assert report().counts.errors["ENOSPC"] >= 3
    assert report().counts.drops[Drop.FAILED] >= 3
    here = [i for i, one in enumerate(keys(NUM_PAGES)) if tier.holds(one)]
    assert 0 < len(here) == report().num_pages < 256 * 1024 // FORM.record_bytes
    assert all(read(tier, number) == image(number) for number in here)
    assert not list(folder.rglob("*.__lock")), "a record comes whole or not at all"

    subprocess.run(["mount", "-o", "remount,ro", "."], check=True)
    until(lambda: not report().is_off)
    write(range(NUM_PAGES, NUM_PAGES + 3))
    assert report().counts.errors["EROFS"] >= 1
    assert all(read(tier, number) == image(number) for number in here)
    tier.clear()
    assert not tier.await_cleared(0.1)
    assert not any(map(tier.holds, keys(NUM_PAGES)))

    subprocess.run(["mount", "-o", "remount,rw,size=256k", "."], check=True)
    until(lambda: tier.await_cleared(GRACE_S))
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["used"]
    until(lambda: not report().is_off)
    write(range(3))
    assert all(read(tier, number) == image(number) for number in range(3))
    tier.stop(GRACE_S)
    tier.join()
