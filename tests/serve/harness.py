"""Tiny random models, and an engine of them that a test moves step by step.

It does not know checkpoints on disk (`test_build.py`) or what any test claims.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cache.pages import PagePool
from cache.tables import PageTables
from cache.tiers.record import RecordFormat
from model import weights
from model.config import Experts, Latent, Layer, ModelConfig, Rope
from model.kernel_choice import Kernels, kernels_for
from model.loading import load_weights
from model.partition import Partition
from serve.engine import Engine, ModelInfo
from serve.limits import Limits
from serve.page_images import PageImages
from serve.page_mover import PageMover
from serve.programs import CacheShape, Programs
from serve.request import FinishReason, GenerateRequest, Output, SamplingParams, TokenLogprobs
from serve.runner import Runner
from serve.scheduler import Scheduler
from serve.tier_traffic import TierTraffic
from sharding.mesh import MeshShape, make_meshes
from tests.model.reference import logits

PAGE_SIZE = 16
ONE_DEVICE = MeshShape()

LIMITS = Limits(max_batch=4, token_budget=64, chunk=16, max_steps=4, max_queue=100, max_context=128)

# Eight query heads and four experts, so that a mesh of tensor=8 repeats kv heads and splits
# experts; five layers and a vocabulary that neither stages nor devices divide; windows that differ
# by layer.
_ROPE = Rope(theta=10_000.0)
DENSE = ModelConfig(
    architecture="TinyDense",
    vocab_size=90,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=48,
    layers=tuple(Layer(_ROPE, window) for window in (None, 12, None, 12, 12)),
    max_context=128,
    norm_eps=1e-5,
    dtype="float32",
    attention_scale=8**-0.5,
    qkv_bias=True,
    qk_norm="all",
    norm_placement="both",
    eos_ids=(2,),
)
MOE = replace(
    DENSE,
    architecture="TinyMoe",
    layers=tuple(Layer(_ROPE, window, experts=True) for window in (12, None, 12, 12, None)),
    qkv_bias=False,
    qk_norm="head",
    norm_placement="pre",
    sinks=True,
    out_bias=True,
    experts=Experts(num_experts=4, top_k=2, size=16, normalize=True, bias=True),
)
LATENT = replace(
    MOE,
    architecture="TinyLatent",
    num_kv_heads=8,
    head_dim=12,
    attention_scale=12**-0.5,
    qk_norm="none",
    latent=Latent(q_rank=16, kv_rank=24, nope_dim=8, rope_dim=4, value_dim=6, norm_eps=1e-6),
    experts=Experts(
        num_experts=4,
        top_k=2,
        size=16,
        normalize=True,
        scoring="sigmoid",
        selection_bias=True,
        num_groups=2,
        top_groups=1,
        scale=1.5,
        shared_size=24,
    ),
)


@dataclass(frozen=True)
class ArraySource:
    """Weights in memory, as a checkpoint."""

    arrays: Mapping[str, np.ndarray]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[name][index]


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights whose logits spread over about 5, so that greedy choices are clear."""
    rng = np.random.default_rng(seed)
    C, G = config.head_dim, config.group_size
    fan_in = {"out": config.num_kv_heads * G * C, "down": config.mlp_size, "embedding": 1}
    found: dict[str, np.ndarray] = {}
    for name, shape in weights.shapes(config).items():
        leaf = name.rsplit(".", 1)[-1]
        values = rng.standard_normal(shape, np.float32)
        if "norm" in leaf:
            values = 1 + 0.1 * values
        elif leaf.endswith("bias"):
            values *= 0.1
        else:
            values *= fan_in.get(leaf, config.hidden_size) ** -0.5
        found[name] = values
    found["final_norm"] *= 5
    return found


@dataclass(frozen=True)
class Parts:
    """What one replica is made of; engines over it come and go, one at a time."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    limits: Limits
    tables: PageTables
    runner: Runner
    mover: PageMover | None = None
    traffic: TierTraffic | None = None

    def scheduler(
        self, prefix_caching: bool = True, prefill: Any = None, **changes: Any
    ) -> Scheduler:
        """A new one, of which nothing is cached yet; `changes` are to its limits, within those the
        runner was made for."""
        self.tables.pool.flush()
        limits = replace(self.limits, **changes)
        eos_ids = frozenset(self.config.eos_ids)
        return Scheduler(limits, self.tables, eos_ids, prefix_caching, self.traffic, prefill)

    def engine(
        self,
        runner: Any = None,
        prefill: Any = None,
        page_form: RecordFormat | None = None,
        **changes: Any,
    ) -> Engine:
        """A new one, not started: `generate` and tests move it by `step`. `prefill` computes
        prompts for it; with a `page_form` it does so for others."""
        pool = self.tables.pool
        info = ModelInfo(
            name="tiny",
            architecture=self.config.architecture,
            vocab_size=self.config.vocab_size,
            max_context=self.limits.max_context,
            dtype="float32",
            mesh=dict(self.runner.programs.mesh.shape),
            num_pages=pool.num_usable,
            page_size=pool.page_size,
            max_batch=self.limits.max_batch,
            eos_ids=self.config.eos_ids,
        )
        return Engine(
            info,
            self.scheduler(prefill=prefill, **changes),
            runner or self.runner,
            random.Random(0),
            clock=float,
            prefill=prefill,
            page_form=page_form,
        )


def make_parts(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    mesh: MeshShape = ONE_DEVICE,
    limits: Limits = LIMITS,
    num_pages: int = 64,
    replica: int = 0,
    kernels: Kernels | None = None,
    cache_dtype: str = "float32",
    make_traffic: Callable[[PageMover], TierTraffic] | None = None,
    moves_pages: bool = False,
    prefills_only: bool = False,
    destination: PageImages | None = None,
    first_device: int = 0,
) -> Parts:
    """Nothing is compiled yet: the runner does so when it meets a shape, or by `compile_all`."""
    partition = Partition(config, mesh.stage, mesh.tensor)
    devices = make_meshes(mesh, jax.devices()[first_device:])[replica]
    dtype = jnp.dtype("float32")
    chosen = kernels or kernels_for("cpu")
    loaded = load_weights(partition, ArraySource(arrays), devices, dtype, kernels=chosen)
    tables = PageTables(
        PagePool(num_pages, PAGE_SIZE), limits.max_batch + 1, -(-limits.max_context // PAGE_SIZE)
    )
    cache = CacheShape(num_pages, PAGE_SIZE, jnp.dtype(cache_dtype))
    programs = Programs(partition, devices, cache, limits, tables.width, dtype, chosen)
    moves_pages = moves_pages or prefills_only or make_traffic is not None
    mover = PageMover(PageImages(programs), destination) if moves_pages else None
    traffic = make_traffic(mover) if make_traffic and mover else None
    runner = Runner(programs, loaded, tables.array, None, mover, traffic, prefills_only)
    return Parts(config, arrays, limits, tables, runner, mover, traffic)


def compile_few(runner: Runner) -> None:
    """Compiles the largest mixed step and the longest loop only: they hold any plan."""
    mixed = max(runner.shapes, key=lambda shape: (shape.num_chunks, shape.num_decode))
    loop = max(runner.shapes, key=lambda shape: (shape.max_tokens, shape.num_decode))
    runner.shapes = [mixed, loop] if loop.max_tokens > 1 else [mixed]
    runner.compile_all()


@dataclass
class Answer:
    """All that came for one request."""

    outputs: list[Output] = field(default_factory=list[Output])

    def __call__(self, output: Output) -> None:
        assert self.finish_reason is None, "nothing comes after the last output"
        self.outputs.append(output)

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [one for output in self.outputs for one in output.logprobs]

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        return [one for output in self.outputs for one in output.prompt_logprobs]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None


def finish(engine: Engine) -> None:
    """Moves an engine that isn't started until nobody waits for it."""
    for _ in range(10_000):
        if engine.wait_idle(0):
            return
        engine.step()
    raise AssertionError(f"not idle after 10,000 steps: {engine.load()}")


def generate(engine: Engine, requests: Iterable[GenerateRequest]) -> dict[str, Answer]:
    """Answers to `requests`, all there from the start, by their ids."""
    answers: dict[str, Answer] = {}
    for request in requests:
        answers[request.request_id] = Answer()
        engine.submit(request, answers[request.request_id])
    finish(engine)
    return answers


def greedy(
    request_id: str, prompt: Sequence[int], max_tokens: int, **sampling: Any
) -> GenerateRequest:
    """A greedy request past any end id, unless `sampling` says otherwise."""
    params: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True} | sampling
    return GenerateRequest(
        request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params)
    )


def random_prompts(config: ModelConfig, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, config.vocab_size, length).tolist() for length in lengths]


def next_logits(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    prompt: Sequence[int],
    tokens: Sequence[int],
) -> np.ndarray:
    """[len(tokens), V]: the float64 reference's logits from which each of `tokens` was chosen."""
    whole = [*prompt, *tokens]
    return logits(config, arrays, whole[:-1])[len(prompt) - 1 :]


def assert_greedy(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    prompt: Sequence[int],
    tokens: Sequence[int],
    margin: float = 1e-3,
) -> None:
    """`tokens` are the reference's, and none was so close that rounding could have decided it.

    Float32 moves these logits by less than 1e-4.
    """
    found = next_logits(config, arrays, prompt, tokens)
    assert found.argmax(-1).tolist() == list(tokens)
    second, best = np.sort(found, axis=-1)[:, -2:].T
    assert (best - second).min() > margin, "the prompts leave a choice to rounding; change the seed"
