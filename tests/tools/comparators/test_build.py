"""The build says what it lacks, asks for the right specialisation, and leaves nothing half made."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.peers.environment import PeerUnavailableError
from plan import flashinfer_trial
from plan.kinds.kind import Outcome
from plan.trials import trial
from tools.comparators import build
from tools.comparators.build import SOURCES, BuildError, command, find_compiler, main

NVCC, FLASHINFER = Path("bin", "nvcc"), Path("flashinfer", "data")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the compiler's place; libraries go into the test's folder."""
    monkeypatch.setattr(flashinfer_trial, "ROOT", tmp_path)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    path = tmp_path / "nvcc"
    path.write_text('#!/bin/sh\nfor last; do :; done; echo made > "${last#--output-file=}"\n')
    path.chmod(0o755)
    return path


def test_without_its_compiler_it_says_where_there_is_one(monkeypatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"has no nvcc; make comparators .* \.venv-aot"):
        find_compiler()


def test_without_a_compiler_for_the_host_it_says_so(tmp_path, monkeypatch) -> None:
    nvcc = tmp_path / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(build, "find_spec", lambda name: spec)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/g++")
    assert find_compiler() == nvcc
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"there is no g\+\+; install one"):
        find_compiler()


@pytest.mark.parametrize(
    ("name", "macro", "sources"),
    [
        ("xqa_bfloat16", "-DCACHE_ELEM_ENUM=0", ["mha.cu"]),
        ("xqa_float8_e4m3fn", "-DCACHE_ELEM_ENUM=2", ["mha_sm90.cu", "tensorMap.cpp"]),
        ("fa3", "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED=1", []),
    ],
)
def test_each_library_is_compiled_for_its_pages_and_for_hopper(name, macro, sources) -> None:
    words = command(name, NVCC, FLASHINFER, Path("out.so"))
    assert macro in words
    assert ("-DTOKENS_PER_PAGE=64" in words) == (name != "fa3")
    assert {"--gpu-architecture=sm_90a", "--cudart=static", "--output-file=out.so"} <= set(words)
    ours, *theirs = (Path(word) for word in words if Path(word).suffix in (".cu", ".cpp"))
    assert ours.is_file(), "ours is committed"
    assert theirs == [FLASHINFER / "csrc" / "xqa" / source for source in sources]


@pytest.mark.parametrize("name", SOURCES)
def test_each_library_is_that_of_its_call(name: str) -> None:
    assert trial(SOURCES[name].call).library_name == name


def test_a_library_takes_its_place_once_it_is_whole(compiler) -> None:
    build.build("xqa_bfloat16", compiler, FLASHINFER)
    made = flashinfer_trial.library("xqa_bfloat16")
    assert made.read_text() == "made\n"
    compiler.write_text("#!/bin/sh\necho no such thing >&2; exit 1\n")
    with pytest.raises(BuildError, match=r"(?s)xqa_bfloat16.so:\nno such thing$"):
        build.build("xqa_bfloat16", compiler, FLASHINFER)
    assert made.read_text() == "made\n"
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_what_xla_cannot_call_is_not_passed_over(compiler, monkeypatch) -> None:
    monkeypatch.setattr(build, "measure", lambda *_: Outcome({"fault": "no handler"}))
    with pytest.raises(BuildError, match=r"calls xqa_bfloat16\.so: no handler"):
        build.launches("xqa_bfloat16")


def test_the_command_tells_each_library_and_its_launches(compiler, monkeypatch, capsys) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    monkeypatch.setattr(build, "fetch", lambda: FLASHINFER)
    monkeypatch.setattr(build, "measure", lambda *_: Outcome({"num_kernels": 5}))
    assert main() == 0
    assert capsys.readouterr().out.splitlines() == [
        f"build/comparators/{name}.so: a call compiles for an H200, to 5 launches"
        for name in ("xqa_bfloat16", "xqa_float8_e4m3fn", "fa3")
    ]


def test_what_fails_is_told_in_one_line(compiler, monkeypatch, capsys) -> None:
    def missing() -> Path:
        raise PeerUnavailableError("no such package")

    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    monkeypatch.setattr(build, "fetch", missing)
    assert main() == 1
    assert capsys.readouterr().err == "comparators: no such package\n"
