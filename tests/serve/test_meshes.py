"""Every mesh of eight virtual devices writes the same tokens, token for token."""

import functools
from dataclasses import replace

import pytest

from serve.errors import DuplicateRequest
from serve.replicas import Replicas
from sharding.mesh import MeshShape, parse_mesh
from tests.serve.harness import (
    DENSE,
    LATENT,
    LIMITS,
    MOE,
    Answer,
    assert_greedy,
    compile_few,
    generate,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

MODELS = {"dense": DENSE, "experts": MOE, "latent": LATENT}
NUM_TOKENS = 14
TIMEOUT_S = 60

# The longest takes two steps, so that prefill and decode rows share one.
PROMPT_LENGTHS = (1, 70, 17, 9, 33, 2)


@functools.cache
def weights(model):
    return random_weights(MODELS[model])


@functools.cache
def requests(model):
    prompts = random_prompts(MODELS[model], PROMPT_LENGTHS)
    return [greedy(str(i), prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)]


@functools.cache
def tokens_on_one_device(model):
    return {id_: answer.token_ids for id_, answer in served(model, MeshShape()).items()}


def served(model, mesh):
    parts = make_parts(MODELS[model], weights(model), mesh)
    compile_few(parts.runner)
    engine = parts.engine()
    answers = generate(engine, requests(model))
    assert parts.tables.pool.num_used == 0
    # Once more, from the cache.
    again = [replace(request, request_id=f"again {i}") for i, request in enumerate(requests(model))]
    for one, other in zip(answers.values(), generate(engine, again).values(), strict=True):
        assert one.token_ids == other.token_ids
    # A single token isn't worth the copy of a page.
    assert engine.load().prefix_hits == sum(length - 1 for length in PROMPT_LENGTHS if length > 2)
    return answers


@pytest.mark.parametrize("model", MODELS)
def test_one_device_writes_the_references_tokens(model):
    tokens = tokens_on_one_device(model)
    for request in requests(model):
        assert len(tokens[request.request_id]) == NUM_TOKENS
        assert_greedy(MODELS[model], weights(model), request.prompt_ids, tokens[request.request_id])


MESHES = (
    "tensor=2",
    "tensor=4",
    "tensor=8",
    "stage=2",
    "stage=4",
    "stage=2,tensor=2",
    "stage=2,tensor=4",
)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        *((model, mesh) for model in ("dense", "experts") for mesh in MESHES),
        *(("latent", mesh) for mesh in ("tensor=8", "stage=2,tensor=2")),
    ],
)
def test_mesh_writes_the_tokens_of_one_device(model, mesh):
    answers = served(model, parse_mesh(mesh))
    tokens = {id_: answer.token_ids for id_, answer in answers.items()}
    assert tokens == tokens_on_one_device(model)


def test_replicas_share_the_requests_and_write_the_tokens_of_one_device():
    limits = replace(LIMITS, max_steps=1)  # one program for each replica
    parts = [
        make_parts(DENSE, weights("dense"), MeshShape(data=2), limits, replica=i) for i in (0, 1)
    ]
    for one in parts:
        compile_few(one.runner)
    first, second = (set(one.runner.programs.mesh.devices.flat) for one in parts)
    assert not first & second

    engines = [one.engine() for one in parts]
    replicas = Replicas(engines)
    answers = {request.request_id: Answer() for request in requests("dense")}
    for request in requests("dense"):
        replicas.submit(request, answers[request.request_id])
    with pytest.raises(DuplicateRequest, match="'0' is being served"):
        replicas.submit(requests("dense")[0], Answer())
    assert [engine.load().num_waiting for engine in engines] == [3, 3]
    assert replicas.load().num_waiting == 6
    assert replicas.info.mesh == {"data": 2, "stage": 1, "tensor": 1}

    replicas.start()
    assert replicas.wait_idle(TIMEOUT_S)
    replicas.stop()
    tokens = {id_: answer.token_ids for id_, answer in answers.items()}
    assert tokens == tokens_on_one_device("dense")
    assert [engine.load().num_finished for engine in engines] == [3, 3]
    assert replicas.load().generated_tokens == 6 * NUM_TOKENS
