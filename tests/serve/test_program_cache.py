"""Programs kept from one start to the next: used as they are, or not at all."""

import logging
import os
import pickle
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from model.kernel_choice import fallbacks
from serve import program_cache, program_key
from serve.limits import Limits
from serve.program_cache import ProgramCache, beside_jax
from serve.programs import Programs
from serve.runner import Runner
from sharding.mesh import MeshShape
from tests.serve.harness import (
    DENSE,
    Parts,
    assert_greedy,
    compile_few,
    generate,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

CONFIG = replace(DENSE, layers=DENSE.layers[:1])
# The largest program holds every plan, and is all that is compiled.
LIMITS = Limits(max_batch=1, token_budget=16, chunk=16, max_steps=1, max_queue=4, max_context=64)


def a_runner(parts: Parts, kept: ProgramCache | None) -> Runner:
    """As the next start would make it."""
    runner = Runner(parts.runner.programs, parts.runner._weights, parts.tables.array, kept)
    runner.shapes = [max(runner.shapes, key=lambda shape: shape.num_chunks + shape.num_decode)]
    return runner


def num_kept(runner: Runner) -> int:
    """Compiles all; how many needed no compiling."""
    told: list[int] = []
    runner.compile_all(lambda name, done, kept: told.append(kept))
    return told[-1]


def assert_writes_the_references_tokens(parts: Parts, runner: Runner) -> None:
    (prompt,) = random_prompts(CONFIG, [20])
    (answer,) = generate(parts.engine(runner), [greedy("r", prompt, 8)]).values()
    assert_greedy(CONFIG, parts.weights, prompt, answer.token_ids)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(CONFIG, random_weights(CONFIG), limits=LIMITS)


@pytest.fixture(scope="module")
def started(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that a first start leaves; tests work on copies."""
    directory = tmp_path_factory.mktemp("kept") / "steps"
    assert num_kept(a_runner(parts, ProgramCache(directory))) == 0
    return directory


@pytest.fixture
def directory(started: Path, tmp_path: Path) -> Path:
    shutil.copytree(started, tmp_path / "steps")
    return tmp_path / "steps"


@pytest.fixture
def entry(directory: Path) -> Path:
    (entry,) = directory.iterdir()
    return entry


@pytest.fixture
def nothing_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def jit_step(*_: object) -> None:
        raise AssertionError("traced what was kept")

    monkeypatch.setattr(Programs, "jit_step", jit_step)


@pytest.mark.usefixtures("nothing_traces")
def test_a_later_start_traces_nothing_and_writes_the_same_tokens(parts, directory):
    runner = a_runner(parts, ProgramCache(directory))
    assert num_kept(runner) == 1
    assert_writes_the_references_tokens(parts, runner)


@pytest.mark.usefixtures("nothing_traces")
def test_a_program_that_is_first_needed_while_serving_is_looked_up_too(parts, directory):
    assert_writes_the_references_tokens(parts, a_runner(parts, ProgramCache(directory)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: os.urandom(len(content)),
    ],
    ids=["empty", "truncated", "flipped bit", "garbage"],
)
def test_a_damaged_entry_is_discarded_with_a_warning(parts, entry, spoil, caplog):
    entry.write_bytes(spoil(entry.read_bytes()))
    runner = a_runner(parts, None)
    assert ProgramCache(entry.parent).get(runner.programs, runner.shapes[0]) is None
    assert f"discarding {entry}, and compiling its program again: it is damaged" in caplog.text
    assert not entry.exists()


def test_a_program_whose_entry_was_damaged_is_compiled_and_kept_again(parts, entry):
    entry.write_bytes(b"damaged")
    runner = a_runner(parts, ProgramCache(entry.parent))
    assert num_kept(runner) == 0
    assert_writes_the_references_tokens(parts, runner)
    assert num_kept(a_runner(parts, ProgramCache(entry.parent))) == 1


def test_an_entry_of_another_program_is_discarded(parts, entry, caplog):
    other = a_runner(parts, None)
    other.programs = replace(other.programs, table_width=other.programs.table_width + 1)
    kept = ProgramCache(entry.parent)
    entry.rename(
        entry.with_name(f"{program_key.program_key(other.programs, other.shapes[0])}.step")
    )
    assert kept.get(other.programs, other.shapes[0]) is None
    assert "it holds another program" in caplog.text
    assert not list(entry.parent.iterdir())


def test_what_xla_cannot_read_is_discarded(parts, entry, caplog):
    """As of an XLA that calls itself by the same version."""
    runner, kept = a_runner(parts, None), ProgramCache(entry.parent)
    key = bytes.fromhex(program_key.program_key(runner.programs, runner.shapes[0]))
    found = program_cache._Entry(pickle.dumps(("not", "one", "of JAX's")), None, None, ())
    kept._write(entry, key + pickle.dumps(found))
    assert kept.get(runner.programs, runner.shapes[0]) is None
    assert f"discarding {entry}" in caplog.text
    assert not entry.exists()


class TestStale:
    """Whatever decides a program makes a new key, so that the old entry is not found."""

    @pytest.fixture
    def is_found(self, parts, directory):
        runner = a_runner(parts, None)

        def is_found(**changes: object) -> bool:
            program_key._sources.cache_clear()
            program_key._versions.cache_clear()
            program_key._host.cache_clear()
            programs = replace(runner.programs, **changes)
            return ProgramCache(directory).get(programs, runner.shapes[0]) is not None

        assert is_found(), "the same program"
        yield is_found
        program_key._sources.cache_clear()
        program_key._versions.cache_clear()
        program_key._host.cache_clear()

    def test_other_sources(self, is_found, monkeypatch, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "step.py").write_text("# changed")
        monkeypatch.setattr(program_key, "__file__", str(tmp_path / "serve" / "program_key.py"))
        assert not is_found()

    def test_another_version_of_a_package(self, is_found, monkeypatch):
        monkeypatch.setattr(program_key, "version", lambda name: "99")
        assert not is_found()

    def test_other_flags_of_xla(self, is_found, monkeypatch):
        flags = os.environ["XLA_FLAGS"]
        monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_enable_fast_math=true")
        assert not is_found()

    def test_another_setting_of_jax(self, is_found):
        before = jax.config.jax_default_matmul_precision
        try:
            jax.config.update("jax_default_matmul_precision", "highest")
            assert not is_found()
        finally:
            jax.config.update("jax_default_matmul_precision", before)

    def test_fewer_cores(self, is_found, monkeypatch):
        monkeypatch.setattr("os.sched_getaffinity", lambda process: range(99))
        assert not is_found()

    def test_another_pool(self, is_found, parts):
        cache = parts.runner.programs.cache
        assert not is_found(cache=replace(cache, num_pages=cache.num_pages + 1))

    def test_another_model(self, is_found, parts):
        partition = parts.runner.programs.partition
        other = replace(partition.config, norm_eps=1e-6)
        assert not is_found(partition=replace(partition, config=other))


def test_replicas_keep_programs_for_their_own_devices(tmp_path):
    weights, kept = random_weights(CONFIG), ProgramCache(tmp_path / "steps")
    first, second = (
        make_parts(CONFIG, weights, MeshShape(data=2, tensor=2), LIMITS, replica=i) for i in (0, 1)
    )
    assert num_kept(a_runner(second, kept)) == 0
    later = a_runner(second, kept)
    assert num_kept(later) == 1
    assert_writes_the_references_tokens(second, later)
    assert kept.get(first.runner.programs, later.shapes[0]) is None


def test_fallbacks_are_noted_again_though_nothing_is_traced(parts, directory):
    runner, kept = a_runner(parts, None), ProgramCache(directory)
    noted = ("small_matmul", "pallas", "a test's shape")
    step = kept.get(runner.programs, runner.shapes[0])
    assert step is not None
    kept.put(runner.programs, runner.shapes[0], replace(step, fallbacks=(noted, noted)))
    before = Counter(fallbacks)
    assert num_kept(a_runner(parts, kept)) == 1
    assert fallbacks - before == {noted: 2}


@pytest.fixture
def jax_keeps(tmp_path):
    """JAX keeps every program in this directory, and finds what is there."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (str(tmp_path / "jax"), 0), strict=True):
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path / "jax"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def test_a_program_that_jax_had_kept_is_compiled_afresh_before_it_is_kept(
    parts, tmp_path, jax_keeps
):
    """XLA for CPUs would write it without its functions, and fail when it runs."""
    assert num_kept(a_runner(parts, None)) == 0
    assert list(jax_keeps.glob("jit_run-*-cache")), "JAX has kept it"
    kept = ProgramCache(tmp_path / "steps")
    assert num_kept(a_runner(parts, kept)) == 0
    later = a_runner(parts, kept)
    assert num_kept(later) == 1
    assert_writes_the_references_tokens(parts, later)
    assert jax.config.jax_enable_compilation_cache, "JAX's own is on again"


def test_a_start_survives_what_is_damaged_in_jaxs_own_cache(parts, jax_keeps):
    compile_few(a_runner(parts, None))
    jax.clear_caches()
    damaged = sorted(jax_keeps.glob("*-cache"))
    assert len(damaged) > 1
    for i, path in enumerate(damaged):
        path.write_bytes(b"garbage" if i % 2 else path.read_bytes()[:50])

    def start():
        runner = a_runner(parts, None)
        compile_few(runner)
        return runner

    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        runner = start()
    assert_writes_the_references_tokens(parts, runner)


def test_those_used_longest_ago_make_room(parts, entry):
    size = entry.stat().st_size
    half_written, old = entry.with_suffix(".123"), entry.with_name("old.step")
    for path in (half_written, old):
        shutil.copy(entry, path)
    for age_s, path in ((30, entry), (20, half_written), (10, old)):
        os.utime(path, (0, path.stat().st_mtime - age_s))
    runner, kept = a_runner(parts, None), ProgramCache(entry.parent, most_bytes=2 * size + 1000)
    step = kept.get(runner.programs, runner.shapes[0])
    assert step is not None
    other = replace(runner.programs, table_width=1)
    kept.put(other, runner.shapes[0], step)
    made = entry.with_name(f"{program_key.program_key(other, runner.shapes[0])}.step")
    assert set(entry.parent.iterdir()) == {entry, made}


def test_a_start_goes_on_where_nothing_can_be_written(parts, directory, monkeypatch, caplog):
    def write_bytes(*_: object) -> None:
        raise OSError(28, "No space left on device")

    runner, kept = a_runner(parts, None), ProgramCache(directory)
    step = kept.get(runner.programs, runner.shapes[0])
    assert step is not None
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    kept.put(runner.programs, runner.shapes[0], step)
    assert "not kept for the next start: [Errno 28] No space left" in caplog.text


class TestDirectory:
    """To read an entry is to run it, so nobody else may write there."""

    def test_one_that_is_made_is_the_users_alone(self, tmp_path):
        ProgramCache(tmp_path / "a" / "steps")
        assert (tmp_path / "a" / "steps").stat().st_mode & 0o777 == 0o700

    def test_one_that_others_may_enter_is_refused(self, tmp_path):
        (tmp_path / "steps").mkdir(mode=0o755)
        with pytest.raises(PermissionError, match=r"others may enter .*steps; chmod 700 it"):
            ProgramCache(tmp_path / "steps")

    def test_anothers_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "steps").mkdir(mode=0o700)
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
        with pytest.raises(PermissionError, match="steps is another user's"):
            ProgramCache(tmp_path / "steps")

    def test_a_link_is_refused(self, tmp_path):
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "steps").symlink_to(tmp_path / "real")
        with pytest.raises(PermissionError, match="or a link"):
            ProgramCache(tmp_path / "steps")


class TestBesideJax:
    @pytest.fixture(autouse=True)
    def jax_directory(self, tmp_path):
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        yield
        jax.config.update("jax_compilation_cache_dir", before)

    def test_steps_are_kept_in_a_folder_of_jaxs_directory(self, tmp_path):
        assert beside_jax() is not None
        assert [path.name for path in tmp_path.iterdir()] == ["weft-steps"]

    @pytest.mark.parametrize("directory", [None, "gs://bucket/programs"])
    def test_nothing_is_kept_without_a_directory_of_this_machine(self, directory):
        jax.config.update("jax_compilation_cache_dir", directory)
        assert beside_jax() is None

    def test_nothing_is_kept_where_jaxs_cache_is_turned_off(self):
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            assert beside_jax() is None
        finally:
            jax.config.update("jax_enable_compilation_cache", True)

    def test_a_directory_that_is_not_ours_to_use_is_told(self, tmp_path, caplog):
        (tmp_path / "weft-steps").mkdir(mode=0o777)
        with caplog.at_level(logging.WARNING):
            assert beside_jax() is None
        assert "not kept for the next start: others may enter" in caplog.text
