"""How much memory is taken and where programs are kept, and by whom that is decided."""

import os

import jax
import pytest

from serve.commands.devices import (
    MEMORY_FRACTION,
    MEMORY_VARIABLES,
    ensure_devices,
    keep_compiled_programs,
)
from serve.config import MeshSection

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def settings():
    before = {name: jax.config.values[name] for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def untold(monkeypatch):
    """As where nobody has said what of a GPU's memory is to be taken."""
    for name in MEMORY_VARIABLES:
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("untold")
def test_most_of_a_gpus_memory_is_taken():
    ensure_devices(MeshSection())
    assert [os.environ[name] for name in MEMORY_VARIABLES] == [MEMORY_FRACTION, ""]


@pytest.mark.parametrize("name", MEMORY_VARIABLES)
@pytest.mark.usefixtures("untold")
def test_a_share_of_memory_that_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "0.5")
    ensure_devices(MeshSection())
    assert [os.environ[name] for name in MEMORY_VARIABLES].count("0.5") == 1
    assert MEMORY_FRACTION not in (os.environ[name] for name in MEMORY_VARIABLES)


def test_programs_are_kept_in_a_directory_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    directory = tmp_path / ".cache" / "weft" / "programs"
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_jax_was_told_is_taken(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_every_program_is_kept_however_soon_it_was_compiled(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
