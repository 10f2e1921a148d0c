"""The build says what it lacks, asks for the right specialisation, and leaves nothing half made."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.peers.environment import PeerUnavailableError
from plan import comparator_trial
from plan.kinds.kind import Outcome
from plan.trials import trial
from tools.comparators import build, flash_attention4
from tools.comparators.build import SOURCES, find_compiler, main
from tools.comparators.flash_attention4 import FLASH_ATTENTION4
from tools.comparators.flashinfer import FLASHINFER, FlashInfer
from tools.comparators.source import FOLDER, BuildError, Source, common_words

FETCHED = Path("flashinfer", "data")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the compiler's place; libraries go into the test's folder."""
    monkeypatch.setattr(comparator_trial, "ROOT", tmp_path)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    path = tmp_path / "nvcc"
    path.write_text('#!/bin/sh\nfor last; do :; done; echo made > "${last#--output-file=}"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything had been fetched."""
    monkeypatch.setattr(FlashInfer, "fetch", lambda self: FETCHED)
    monkeypatch.setattr(flash_attention4.FlashAttention4, "fetch", lambda self: FETCHED)
    monkeypatch.setattr(flash_attention4.FlashAttention4, "words", lambda *_: [])


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
def test_each_library_is_compiled_for_its_pages(name, macro, sources) -> None:
    words = FLASHINFER[name].words(FETCHED)
    assert macro in words
    assert ("-DTOKENS_PER_PAGE=64" in words) == (name != "fa3")
    theirs = [Path(word) for word in words if Path(word).suffix in (".cu", ".cpp")]
    assert theirs == [FETCHED / "csrc" / "xqa" / source for source in sources]


@pytest.mark.parametrize("source", SOURCES.values())
def test_each_library_is_compiled_for_hopper_of_what_is_committed(source: Source) -> None:
    words = common_words(source.ours)
    assert {"--gpu-architecture=sm_90a", "--cudart=static", "-shared"} <= set(words)
    assert words[-1] == str(FOLDER / source.ours)
    assert Path(words[-1]).is_file()


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of FlashAttention 4's Python, which tells what it was called with."""
    monkeypatch.setattr(flash_attention4, "CACHE", tmp_path)
    (tmp_path / "lib/python3.11/site-packages/nvidia_cutlass_dsl/cu13").mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho $CUTE_DSL_ARCH $* > "$2/called"\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("page_size", [64, 128])
def test_flash_attention_4_is_compiled_for_hopper_and_its_pages(environment, page_size) -> None:
    words = FLASH_ATTENTION4[f"fa4_{page_size}"].words(environment)
    (folder,) = (Path(word).parent for word in words if word.endswith("fa4.o"))
    script = FOLDER / "export_fa4.py"
    assert (folder / "called").read_text() == f"sm_90a {script} {folder} 128 4 {page_size}\n"
    assert script.is_file()
    assert f"-I{folder}" in words


def test_what_cute_says_is_said(environment) -> None:
    environment.write_text("#!/bin/sh\necho no such layout >&2; exit 1\n")
    with pytest.raises(
        BuildError, match=r"(?s)does not compile FlashAttention 4:\nno such layout$"
    ):
        FLASH_ATTENTION4["fa4_64"].words(environment)


@pytest.mark.parametrize("name", SOURCES)
def test_each_library_is_that_of_its_call(name: str) -> None:
    assert trial(SOURCES[name].call).library_name == name


@pytest.mark.usefixtures("fetched")
def test_a_library_takes_its_place_once_it_is_whole(compiler) -> None:
    build.build("xqa_bfloat16", compiler)
    made = comparator_trial.library("xqa_bfloat16")
    assert made.read_text() == "made\n"
    compiler.write_text("#!/bin/sh\necho no such thing >&2; exit 1\n")
    with pytest.raises(BuildError, match=r"(?s)xqa_bfloat16.so:\nno such thing$"):
        build.build("xqa_bfloat16", compiler)
    assert made.read_text() == "made\n"
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_what_xla_cannot_call_is_not_passed_over(compiler, monkeypatch) -> None:
    monkeypatch.setattr(build, "measure", lambda *_: Outcome({"fault": "no handler"}))
    with pytest.raises(BuildError, match=r"calls xqa_bfloat16\.so: no handler"):
        build.launches("xqa_bfloat16")


@pytest.mark.usefixtures("fetched")
def test_the_command_tells_each_library_and_its_launches(compiler, monkeypatch, capsys) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    monkeypatch.setattr(build, "measure", lambda *_: Outcome({"num_kernels": 5}))
    assert main() == 0
    assert capsys.readouterr().out.splitlines() == [
        f"build/comparators/{name}.so: a call compiles for an H200, to 5 launches"
        for name in ("xqa_bfloat16", "xqa_float8_e4m3fn", "fa3", "fa4_64", "fa4_128")
    ]


def test_what_fails_is_told_in_one_line(compiler, monkeypatch, capsys) -> None:
    def missing(_: object) -> Path:
        raise PeerUnavailableError("no such package")

    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    monkeypatch.setattr(FlashInfer, "fetch", missing)
    assert main() == 1
    assert capsys.readouterr().err == "comparators: no such package\n"
