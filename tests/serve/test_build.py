"""From a configuration to an engine that answers; what cannot be built is refused at the start."""

import json
import re
from dataclasses import replace

import pytest

from model.checkpoint import CheckpointError
from model.families import UnsupportedModel, read_model_config
from model.loading import load_weights
from serve.build import build_engine
from serve.client import Client
from serve.commands import generate as generate_command
from serve.config import ConfigError, make_config
from serve.errors import InvalidRequest
from serve.fit import Served, fit
from serve.front import Front
from serve.request import SamplingParams
from serve.runner import Runner
from sharding.mesh import MeshError
from tests.model.reference import load_model
from tests.serve.fake_engine import TIMEOUT_S, served
from tests.serve.harness import Answer, assert_greedy, generate, greedy, random_prompts
from tools.random_checkpoint import write_random_checkpoint

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 101,
}

# Three programs: one row alone, one chunk alone, and both.
SCHEDULE = {"max_batch": 1, "token_budget": 16, "chunk": 16, "max_steps": 1, "max_queue": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, MODEL, "bfloat16")
    return directory


def configure(directory, **sections):
    values = {"model": {"path": str(directory)}, "schedule": SCHEDULE}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return make_config(values, "test")


@pytest.fixture(scope="module")
def engine(checkpoint):
    """In float32, with two pages of 16 tokens."""
    return build_engine(configure(checkpoint, model={"dtype": "float32"}, cache={"pages": 2}))


def test_built_engine_writes_the_references_tokens(checkpoint, engine):
    config, arrays = load_model(checkpoint)
    (prompt,) = random_prompts(config, [20])
    (answer,) = generate(engine, [greedy("r", prompt, 12)]).values()
    assert_greedy(config, arrays, prompt, answer.token_ids, margin=1e-4)


def test_built_engine_says_what_it_serves(checkpoint, engine):
    info, load = engine.info, engine.load()
    assert (info.name, info.architecture) == (checkpoint.name, "LlamaForCausalLM")
    assert (info.vocab_size, info.max_context, info.eos_ids) == (101, 64, (2,))
    assert (info.dtype, info.mesh) == ("float32", {"data": 1, "stage": 1, "tensor": 1})
    assert (info.num_pages, info.page_size, info.max_batch) == (2, 16, 1)
    assert (load.pages_total, load.max_batch, load.max_queue) == (2, 1, 8)
    assert load.compiles_after_warmup == 0


def test_request_of_more_pages_than_the_cache_has_is_refused_with_what_to_change(engine):
    with pytest.raises(InvalidRequest) as refused:
        engine.submit(greedy("r17", [5] * 30, 10), Answer())
    assert str(refused.value) == (
        "request 'r17' needs 3 pages for 40 tokens, the cache has 2 in all; lower max_tokens, "
        "shorten the prompt or raise cache.pages"
    )


def test_the_same_is_refused_over_grpc(engine):
    with (
        served(Front(engine)) as address,
        Client(address, timeout_s=TIMEOUT_S) as client,
        pytest.raises(InvalidRequest, match=r"needs 3 pages for 40 tokens, the cache has 2 in all"),
    ):
        list(client.generate([5] * 30, max_tokens=10))


@pytest.fixture
def two_pages(monkeypatch):
    """Room for as many pages, of 16 tokens."""

    def fit_two(*arguments):
        return replace(fit(*arguments), num_pages=2)

    monkeypatch.setattr("serve.build.fit", fit_two)


@pytest.mark.parametrize(
    ("length", "max_tokens", "why"),
    [
        (
            30,
            10,
            "30 tokens, 40 with its answer, .* room for keys and values of 32; shorten .*mesh",
        ),
        (33, None, "33 tokens, 34 with its answer, .* room for keys and values of 32; shorten"),
        (64, 1, "64 tokens; a context of 64 allows 63 and a token of answer; shorten the prompt"),
    ],
)
def test_a_prompt_that_cannot_be_answered_offline_is_named_before_weights_are_read(
    checkpoint, two_pages, monkeypatch, length, max_tokens, why
):
    monkeypatch.setattr("serve.build.load_weights", None)
    prompts = [[5] * 3, [5] * length]
    with pytest.raises(InvalidRequest, match=rf"^prompt 1: the prompt has {why}"):
        generate_command.run(checkpoint, prompts, SamplingParams(max_tokens=max_tokens))


def test_the_longest_prompt_that_can_be_is_answered_offline(checkpoint, two_pages, capsys):
    generate_command.run(checkpoint, [[5] * 30], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(capsys.readouterr().out.split()) == 1 + 2


def test_request_without_max_tokens_is_given_what_the_cache_holds(engine):
    (answer,) = generate(engine, [greedy("r", [5, 6], None)]).values()
    assert len(answer.token_ids) == 2 * 16 - 2


def test_prompt_as_long_as_the_context_is_refused(engine):
    with pytest.raises(InvalidRequest, match="prompt has 64 tokens; the context of 64 leaves"):
        engine.submit(greedy("r", [5] * 64, 1), Answer())


@pytest.fixture
def nothing_compiles(monkeypatch):
    """What is refused is refused before minutes go into compiling."""

    def compile_all(*_):
        raise AssertionError("compiled what should have been refused")

    monkeypatch.setattr(Runner, "compile_all", compile_all)


@pytest.mark.usefixtures("nothing_compiles")
class TestRefusedAtStart:
    def test_missing_model_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no model directory .*nowhere; give model.path"):
            build_engine(configure(tmp_path / "nowhere"))

    def test_directory_without_a_config(self, tmp_path):
        with pytest.raises((CheckpointError, UnsupportedModel), match=r"config\.json"):
            build_engine(configure(tmp_path))

    def test_unknown_architecture(self, tmp_path):
        config = MODEL | {"architectures": ["NovelForCausalLM"], "model_type": "novel"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModel, match="NovelForCausalLM"):
            build_engine(configure(tmp_path))

    def test_directory_without_weights(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(MODEL))
        with pytest.raises(CheckpointError, match="safetensors"):
            build_engine(configure(tmp_path))

    def test_mesh_that_does_not_fit_the_model(self, checkpoint):
        with pytest.raises(
            MeshError, match=r"4 query heads do not divide over tensor=8; .* these fit: .*tensor=4"
        ):
            build_engine(configure(checkpoint, mesh={"tensor": 8}))

    def test_mesh_of_more_devices_than_there_are(self, checkpoint):
        with pytest.raises(MeshError, match=r"takes 16 devices, there are 8 .*device_count=16"):
            build_engine(configure(checkpoint, mesh={"data": 4, "stage": 2, "tensor": 2}))

    def test_context_beyond_the_models(self, checkpoint):
        with pytest.raises(ConfigError, match=r"max_context is 65, the model was made for 64; low"):
            build_engine(configure(checkpoint, model={"max_context": 65}))

    def test_memory_fraction_that_leaves_no_page(self, checkpoint):
        refused = r"tiny does not fit: .* too few; it fits with cache\.memory_fraction=0\.6 \("
        with pytest.raises(ConfigError, match=refused):
            build_engine(configure(checkpoint, cache={"memory_fraction": 1e-9}))

    @pytest.mark.parametrize("token_budget", [15, 16])
    def test_token_budget_that_a_full_batch_uses_up(self, checkpoint, token_budget):
        schedule = {"max_batch": 16, "chunk": 8, "token_budget": token_budget}
        with pytest.raises(ConfigError, match=rf"token_budget \({token_budget}\) is above max_bat"):
            build_engine(configure(checkpoint, schedule=schedule))


def test_too_many_pages_are_refused_before_weights_are_read_with_the_most_that_fit(
    checkpoint, monkeypatch
):
    monkeypatch.setattr("serve.build.load_weights", None)
    monkeypatch.setattr("serve.build.device_memory_bytes", lambda device, mesh: 1_000_000)
    with pytest.raises(ConfigError) as refused:
        build_engine(configure(checkpoint, cache={"pages": 1000}))
    # A page of 16 tokens is 2,048 bytes: keys and values of 2 layers, 2 heads, 8 channels.
    said = re.search(r"2,050,048 of pages\) and may plan with 1,000,000 of", str(refused.value))
    fitting = re.search(r"it fits with cache\.pages=(\d+) ", str(refused.value))
    assert said
    assert fitting
    most = int(fitting[1])
    monkeypatch.setattr("serve.build.load_weights", load_weights)
    config = configure(checkpoint, cache={"pages": most})
    assert build_engine(config, compile_ahead=False).info.num_pages == most
    with pytest.raises(ConfigError, match=f"pages={most} "):
        build_engine(configure(checkpoint, cache={"pages": most + 1}))


def test_steps_that_need_more_than_the_estimate_are_refused_with_the_pages_that_fit(
    checkpoint, monkeypatch
):
    """The estimate leaves out what is small but in a model as tiny as this."""
    config = configure(checkpoint, cache={"pages": 50})
    needed = fit(Served(config, read_model_config(checkpoint), "cpu"), 0).needed_bytes
    monkeypatch.setattr("serve.build.device_memory_bytes", lambda device, mesh: needed)
    with pytest.raises(ConfigError) as refused:
        build_engine(config)
    fitting = re.search(r"it fits with cache\.pages=(\d+) \(", str(refused.value))
    assert fitting
    engine = build_engine(configure(checkpoint, cache={"pages": int(fitting[1])}))
    assert engine.info.num_pages == int(fitting[1]) > 1


def test_a_kernel_that_cannot_run_here_is_refused_before_weights_are_read(checkpoint, monkeypatch):
    monkeypatch.setattr("serve.build.load_weights", None)
    with pytest.raises(ConfigError, match=r"kernels\.small_matmul is pallas"):
        build_engine(configure(checkpoint, kernels={"small_matmul": "pallas"}))


def test_kernel_of_8_bit_weights_is_refused_where_there_are_none(checkpoint):
    with pytest.raises(ConfigError, match="has no weights in 8 bits; set it to auto, or serve"):
        build_engine(configure(checkpoint, kernels={"small_matmul": "xla_8bit"}))
