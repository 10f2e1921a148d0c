"""Engines in processes of their own, and what is said when they fail."""

import ast
import sys
import time
from pathlib import Path

import psutil
import pytest

import bench.peers.gguf_model
import bench.peers.llama_cpp_worker
import bench.peers.protocol
import bench.peers.transformers_worker
import bench.peers.vllm_cpu_worker
from bench.peers.protocol import Job
from bench.peers.worker import Worker, WorkerError
from tests.bench.fake_worker import count


def fake(*options: str) -> Worker:
    return Worker("fake", [sys.executable, "-m", "tests.bench.fake_worker", *options])


def test_worker_says_what_it_is_and_answers_each_job():
    with fake() as worker:
        assert worker.ready.versions == {"fake": "1.0"}
        for num_tokens in (1, 5):
            answer = worker.ask(Job([[1, 2], [3, 40]], num_tokens))
            assert answer.token_ids == [count(2, num_tokens), count(40, num_tokens)]
            assert answer.margins == []
        assert worker.ask(Job([[7]], 2, margins=True)).margins == [[0.25, 0.25]]
        assert worker.cpu_s() > 0


def test_what_a_library_prints_does_not_disturb_the_answers():
    with fake("--fault=print") as worker:
        assert worker.ask(Job([[1]], 1)).token_ids == [[2]]


def test_leaving_ends_the_process():
    with fake() as worker:
        process = psutil.Process(worker.pid)
    assert not process.is_running()


def test_engine_is_stopped_between_jobs():
    with fake("--fault=refuse") as worker:
        process = psutil.Process(worker.pid)
        worker.ask(Job([[1]], 1))
        assert is_stopped(process)
        with pytest.raises(WorkerError):
            worker.ask(Job([[1], [2]], 1))
        assert is_stopped(process)


def is_stopped(process: psutil.Process) -> bool:
    """Within ten seconds, since it may have to be scheduled once more to be stopped."""
    ends = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < ends:
        time.sleep(0.001)
    return process.status() == psutil.STATUS_STOPPED


def test_worker_that_cannot_start_says_why():
    with pytest.raises(WorkerError, match="fake: FileNotFoundError: there is no such model"):
        fake("--fault=start")


def test_worker_whose_python_fails_shows_its_last_words():
    with pytest.raises(WorkerError, match=r"(?s)ended with status 1.*No module named"):
        Worker("fake", [sys.executable, "-m", "tests.bench.no_such_worker"])


def test_worker_goes_on_after_a_job_it_cannot_do():
    with fake("--fault=refuse") as worker:
        with pytest.raises(WorkerError, match="fake: ValueError: one prompt at most"):
            worker.ask(Job([[1], [2]], 1))
        assert worker.ask(Job([[1]], 1)).token_ids == [[2]]


def test_worker_that_dies_shows_its_last_words():
    with fake("--fault=die") as worker:
        for _ in range(2):  # the second job finds the pipe closed
            with pytest.raises(WorkerError, match=r"(?s)status 3.*out of memory, or so"):
                worker.ask(Job([[1]], 1))


def test_worker_that_dies_in_the_middle_of_an_answer_shows_its_last_words():
    torn = "import sys; print('{\"ready\": {\"dev', end=''); sys.exit('no memory')"
    with pytest.raises(WorkerError, match=r"(?s)status 1.*no memory"):
        Worker("fake", [sys.executable, "-c", torn])


@pytest.mark.parametrize("module", [bench, bench.peers, bench.peers.protocol])
def test_what_a_peer_imports_needs_only_the_standard_library_of_python_3_11(module):
    tree = ast.parse(source(module), feature_version=(3, 11))
    imported = {name for node in ast.walk(tree) for name in modules_of(node)}
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        (bench.peers.transformers_worker, {"torch", "transformers"}),
        (bench.peers.vllm_cpu_worker, {"torch", "vllm"}),
        (bench.peers.llama_cpp_worker, {"llama_cpp", "numpy"}),
        (bench.peers.gguf_model, {"gguf", "numpy"}),
    ],
)
def test_peers_worker_imports_its_engine_and_nothing_of_weft_but_the_bench(module, packages):
    tree = ast.parse(source(module), feature_version=(3, 11))
    imported = {name for node in ast.walk(tree) for name in modules_of(node)}
    assert imported - sys.stdlib_module_names - {"bench"} == packages


def source(module) -> str:
    return Path(module.__file__).read_text()


def modules_of(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name.partition(".")[0] for alias in node.names]
        case ast.ImportFrom():
            return [(node.module or "").partition(".")[0]]
        case _:
            return []
