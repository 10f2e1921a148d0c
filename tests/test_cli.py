"""`weft` as a user meets it: what is printed where, exit codes, and no traceback for a mistake."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve import cli
from serve.client import Client
from serve.config import ServeConfig
from tests.assets import ASSETS, needs_assets
from tests.serve.fake_engine import FakeEngine, FakeInfo

STORIES = ASSETS / "models" / "stories260k-hf"
FAMILY = ASSETS / "families" / "llama"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Weft = Callable[..., Ended]


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Weft:
    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["weft", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


class BuiltEngine(FakeEngine):
    """A fake with the part of an engine's face that those who build one use."""

    def __init__(self) -> None:
        super().__init__(info=FakeInfo(vocab_size=512))
        self.configs: list[ServeConfig] = []
        self.stopped = False

    def build(
        self,
        config: ServeConfig,
        progress: object,
        *,
        compile_ahead: bool = True,
        check: object = None,
    ) -> "BuiltEngine":
        self.configs.append(config)
        return self

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.stopped = True
        self.__exit__()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BuiltEngine:
    fake = BuiltEngine()
    monkeypatch.setattr("serve.commands.generate.build_engine", fake.build)
    monkeypatch.setattr("serve.commands.serve.build_engine", fake.build)
    return fake


def write_lines(path: Path, entries: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_help_lists_every_command_without_importing_jax() -> None:
    code = (
        "import sys\nfrom serve.cli import main\nsys.argv = ['weft', '--help']\n"
        "try: main()\nfinally: assert not {'jax', 'pydantic', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("serve", "generate", "convert", "bench", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_a_wrong_option_exits_2_and_names_it(weft: Weft) -> None:
    ended = weft("generate", "model", "--temprature", "0")
    assert ended.code == 2
    assert "--temprature" in ended.err


@pytest.mark.parametrize("prompts", [[], ["--prompt", "a", "--prompts-file", __file__]])
def test_generate_wants_a_prompt_or_a_file_of_them(weft: Weft, prompts: list[str]) -> None:
    ended = weft("generate", "model", *prompts)
    assert ended.code == 2
    assert "either --prompt or --prompts-file" in ended.err


def test_a_missing_model_is_refused_without_a_traceback(weft: Weft, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    ended = weft("generate", missing, "--prompt", "a")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == f"weft: {missing} does not exist; give the directory of a checkpoint\n"


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "nan"), ("--top-p", "2.0"), ("--max-tokens", "0")]
)
def test_a_sampling_value_out_of_range_is_refused_by_name(
    weft: Weft, option: str, value: str
) -> None:
    ended = weft("generate", "model", "--prompt", "a", option, value)
    assert ended.code == 1
    assert ended.err.startswith(f"weft: {option[2:].replace('-', '_')} is {value}; it must be")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ('"text"', "neither"),
        ('{"prompt": 1}', "neither"),
        ('{"prompt_ids": [1, true]}', "neither"),
        ('{"prompt": "a", "max_tokens": 3}', "neither"),
    ],
)
def test_a_bad_line_of_prompts_is_named(weft: Weft, tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    ended = weft("generate", "model", "--prompts-file", path)
    assert ended.code == 1
    assert f"{path}:2: " in ended.err
    assert why in ended.err


def test_a_file_without_prompts_is_refused(weft: Weft, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [])
    assert "has no prompt" in weft("generate", "model", "--prompts-file", path).err
    assert weft("generate", "model", "--prompts-file", tmp_path / "none").code == 2


@needs_assets
def test_answers_come_one_json_line_per_prompt_in_order(
    weft: Weft, engine: BuiltEngine, tmp_path: Path
) -> None:
    separator = chr(0x2028)  # which str.splitlines takes for the end of a line
    prompts = [{"prompt": f"a{separator}"}, {"prompt_ids": [1, 5, 9]}, {"prompt": "b"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(p, ensure_ascii=False) for p in prompts))
    ended = weft(
        "generate", STORIES, "--prompts-file", path, "--max-tokens", 3, "--json", "--ignore-eos"
    )
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[1]["prompt_ids"] == [1, 5, 9]
    assert all(line["token_ids"] == [97, 98, 99] for line in lines)
    assert all(isinstance(line["text"], str) for line in lines)
    assert {line["finish_reason"] for line in lines} == {"length"}
    assert {request.sampling.ignore_eos for request in engine.submitted} == {True}
    assert engine.stopped


@needs_assets
def test_a_model_without_a_tokenizer_answers_in_ids(
    weft: Weft, engine: BuiltEngine, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt_ids": [1, 2]}])
    ended = weft("generate", FAMILY, "--prompts-file", path, "--max-tokens", 2, "--json")
    assert json.loads(ended.out)["text"] is None
    assert weft("generate", FAMILY, "--prompt", "a").err.startswith("weft: prompt 0: ")


@needs_assets
def test_one_prompt_streams_its_text_alone(weft: Weft, engine: BuiltEngine) -> None:
    ended = weft("generate", STORIES, "--prompt", "a", "--max-tokens", 3)
    assert ended.code == 0, ended.err
    assert ended.out.endswith("\n")
    assert not ended.out.startswith("[0]")


@needs_assets
def test_the_engine_is_no_larger_than_its_prompts_need(
    weft: Weft, engine: BuiltEngine, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt_ids": [1] * 5}] * 3)
    options = ["--max-tokens", 3, "--mesh", "stage=2,tensor=2", "--dtype", "bfloat16"]
    assert weft("generate", STORIES, "--prompts-file", path, *options).code == 0
    (config,) = engine.configs
    assert (config.mesh.data, config.mesh.stage, config.mesh.tensor) == (1, 2, 2)
    assert (config.model.dtype, config.model.max_context) == ("bfloat16", 8)
    assert config.schedule.max_batch == 4


@needs_assets
def test_a_prompt_that_cannot_be_served_is_named_and_nothing_runs(
    weft: Weft, engine: BuiltEngine, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt_ids": [1]}, {"prompt_ids": [1, 99999]}])
    ended = weft("generate", STORIES, "--prompts-file", path, "--json")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("weft: prompt 1: prompt token id 99999")
    assert not engine.submitted


@needs_assets
def test_a_mesh_that_cannot_be_read_is_refused(weft: Weft) -> None:
    ended = weft("generate", STORIES, "--prompt", "a", "--mesh", "tensor=two")
    assert ended.code == 1
    assert "tensor=two" in ended.err


def test_a_misspelt_key_exits_2_before_anything_starts(weft: Weft, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('[model]\npth = "m"\n')
    ended = weft("serve", path, "--set", "mesh.tensr=2")
    assert ended.code == 2
    assert f"weft: {path}: model.path is missing" in ended.err
    assert "did you mean path?" in ended.err
    assert "did you mean tensor?" in ended.err


@needs_assets
def test_serve_answers_until_a_signal_and_exits_0(
    weft: Weft, engine: BuiltEngine, tmp_path: Path
) -> None:
    grpc, http = (f"127.0.0.1:{free_port()}" for _ in range(2))
    path = tmp_path / "serve.toml"
    path.write_text(f'[model]\npath = "{STORIES}"\nname = "stories"\n')
    answers: list[str] = []

    def ask_then_stop() -> None:
        with Client(grpc) as client:
            while not client.is_serving():
                pass
            answers.append(client.generate_text([1, 2], max_tokens=2))
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask_then_stop)
    asking.start()
    ended = weft("serve", path, "--set", f"listen.grpc={grpc}", "--set", f"listen.http={http}")
    asking.join()
    assert ended.code == 0, ended.err
    assert f"served on {grpc} (gRPC), metrics on http://{http}/metrics" in ended.out
    assert len(answers) == 1
    assert engine.stopped


@needs_assets
def test_a_taken_port_is_told_before_the_model_is_loaded(
    weft: Weft, engine: BuiltEngine, tmp_path: Path
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f'[model]\npath = "{STORIES}"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = weft("serve", path, "--set", f"listen.grpc={address}")
    assert ended.code == 1
    assert f"weft: cannot listen on {address}: Address already in use" in ended.err
    assert not engine.configs


@needs_assets
def test_a_tokenizer_of_another_model_is_refused(weft: Weft, tmp_path: Path) -> None:
    config = json.loads((STORIES / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    (tmp_path / "tokenizer.model").write_bytes((STORIES / "tokenizer.model").read_bytes())
    ended = weft("generate", tmp_path, "--prompt", "a")
    assert ended.code == 1
    assert "the tokenizer has ids up to 511, the embedding has 500 rows" in ended.err


def test_a_profile_that_has_no_place_is_refused_before_the_model_is_looked_at(
    weft: Weft, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    profile = tmp_path / "file" / "profile"
    ended = weft("generate", tmp_path / "no-model", "--prompt", "a", "--profile", profile)
    assert ended.code == 1
    assert "Not a directory" in ended.err
    assert str(profile) in ended.err


@needs_assets
def test_convert_prints_what_it_made_and_refuses_to_overwrite(weft: Weft, tmp_path: Path) -> None:
    destination = tmp_path / "converted"
    ended = weft("convert", STORIES, destination)
    assert (ended.code, ended.out) == (0, f"{destination}\n")
    assert "MB in" in ended.err
    again = weft("convert", STORIES, destination)
    assert again.code == 1
    assert again.err.startswith(f"weft: {destination} exists")


def test_doctor_describes_this_machine_as_json(weft: Weft) -> None:
    ended = weft("doctor", "--json")
    assert ended.code == 0, ended.out
    found = json.loads(ended.out)
    assert found["problems"] == []
    assert found["versions"]["jax"]
    assert {device["platform"] for device in found["devices"]} == {"cpu"}


@needs_assets
def test_doctor_says_which_meshes_would_fit(weft: Weft, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f'[model]\npath = "{STORIES}"\n[mesh]\ntensor = 3\n')
    ended = weft("doctor", "--config", path)
    assert ended.code == 1
    assert "these fit:" in ended.out
    assert weft("doctor", "--config", path, "--set", "mesh.tensor=2").code == 0


@needs_assets
def test_doctor_shows_the_kernels_of_a_configuration_and_refuses_those_that_cannot_run(
    weft: Weft, tmp_path: Path
) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f'[model]\npath = "{STORIES}"\n[kernels]\ndecode_attention = "xla"\n')
    assert "kernels   decode_attention xla," in weft("doctor", "--config", path).out
    ended = weft("doctor", "--config", path, "--set", "kernels.small_matmul=pallas")
    assert ended.code == 1
    assert "kernels.small_matmul is pallas, which compiles for GPUs only" in ended.out
    assert "to do: set it to auto, xla or pallas_interpreted" in ended.out


def test_doctor_names_each_fault_and_its_remedy() -> None:
    from serve.commands.doctor import Device, Machine, diagnose

    machine = Machine(
        system="Linux x86_64",
        python="3.12.1",
        num_cores=2,
        memory_bytes=2**34,
        free_memory_bytes=2**33,
        driver="550.54.15",
        versions={
            "jax": "0.11.2",
            "jaxlib": "0.11.2",
            "jax-cuda12-plugin": "0.11.1",
            "jax-cuda13-plugin": "0.11.2",
        },
        devices=[Device("cpu", "cpu", None)],
        kernels={"decode_attention": "xla"},
    )
    environment = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer= --other=1"}
    problems = {problem.what: problem.remedy for problem in diagnose(machine, environment)}
    assert problems == {
        "jax-cuda12-plugin is 0.11.1, jax 0.11.2; they must be equal": (
            "pip install jax-cuda12-plugin==0.11.2"
        ),
        "jax-cuda12-plugin and jax-cuda13-plugin are both installed": (
            "pip uninstall jax-cuda12-plugin"
        ),
        "there is a GPU that JAX does not see": "look at nvidia-smi and CUDA_VISIBLE_DEVICES",
        "driver 550.54.15 is older than jax-cuda13-plugin needs, 580": (
            "update the driver to 580 or later, or pip install 'weft[cuda12]' instead"
        ),
        "XLA_FLAGS turns CUDA graphs off: xla_gpu_enable_command_buffer is empty": (
            "remove it from XLA_FLAGS"
        ),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
