"""Train the demo model, `models/demo`, from the standard library's text: minutes on two CPU cores.

    python -m tools.train_demo --out models/demo --minutes 50

The run resumes from --work after a cut. It knows nothing of the engine that serves the result.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece as spm
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from tools.demo_card import Card, Score, sample
from tools.demo_corpus import (
    BOS_ID,
    EOS_ID,
    Document,
    Stream,
    documents,
    encode,
    fingerprint,
    is_held_out,
    save_tokenizer,
    train_tokenizer,
)
from tools.demo_model import Llama, Shape, load_params, rounded, save_hugging_face

DEMO_SHAPE = Shape(
    vocab_size=4096,
    hidden_size=256,
    mlp_size=768,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_context=1024,
)

PROMPTS = ('"""Return the', "def ", 'The "with" statement')


@dataclass(frozen=True)
class Recipe:
    """All that decides a run but its length; a work directory belongs to one recipe."""

    shape: Shape = DEMO_SHAPE
    seed: int = 0
    batch_tokens: int = 8192
    # Short rows first: a step of full rows takes 1.4 times as long, and the last quarter is enough
    # to learn the full context.
    short_context: int = 256
    short_share: float = 0.75
    muon_rate: float = 0.008
    adam_rate: float = 0.003
    weight_decay: float = 0.1
    warmup_share: float = 0.02

    def context(self, progress: float) -> int:
        return self.short_context if progress < self.short_share else self.shape.max_context

    def rate_factor(self, progress: float) -> float:
        """Linear warm-up, then linear decay to zero (arXiv:2502.15938)."""
        return min(progress / self.warmup_share, (1 - progress) / (1 - self.warmup_share))


@dataclass(frozen=True)
class Budget:
    """How long to train: by the clock, or by steps, which another machine repeats."""

    minutes: float
    steps: int | None = None

    def progress(self, step: int, elapsed_s: float) -> float:
        return elapsed_s / (60 * self.minutes) if self.steps is None else step / self.steps


@dataclass
class Run:
    """What a checkpoint holds."""

    params: nnx.State
    optimizer: optax.OptState
    step: int = 0
    elapsed_s: float = 0.0


@functools.cache
def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (arXiv:2502.16982) for the layers' matrices, Adam for embeddings and norms."""

    def muon_dimensions(params: optax.Params) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers()
        return jax.tree_util.tree_map_with_path(
            lambda path, _: matrix if "kernel" in jax.tree_util.keystr(path) else None, params
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            consistent_rms=0.2,
            adam_learning_rate=recipe.adam_rate,
            adam_b2=0.98,
            muon_weight_dimension_numbers=muon_dimensions,
        ),
    )


def token_losses(model: Llama, rows: Int[Array, "B T+1"]) -> Float[Array, "N"]:
    """Cross-entropy in nats of each row's tokens after its first."""
    logits_NV = model.embed_tokens.attend(model.hidden(rows[:, :-1])).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_NV, rows[:, 1:].reshape(-1))


@functools.partial(
    jax.jit, static_argnames=("graph", "optimizer"), donate_argnames=("params", "state")
)
def train_step(
    params: nnx.State,
    state: optax.OptState,
    rows: Int[Array, "B T+1"],
    rate_factor: Float[Array, ""],
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, optax.OptState, Float[Array, ""]]:
    def loss(params: nnx.State) -> Float[Array, ""]:
        return token_losses(nnx.merge(graph, params), rows).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    updates = jax.tree.map(lambda update: update * rate_factor, updates)
    return optax.apply_updates(params, updates), state, value


@nnx.jit
def losses_of(model: Llama, rows: Int[Array, "B T+1"]) -> Float[Array, "N"]:
    return token_losses(model, rows)


def evaluate(model: Llama, held_out: Stream, context: int, max_rows: int | None = None) -> Score:
    """Score a model on the held-out stream, or on `max_rows` rows spread over it."""
    rows = held_out.windows(context)
    if max_rows is not None:
        rows = rows[:: math.ceil(len(rows) / max_rows)]
    nats = sum(float(losses_of(model, row[None]).sum()) for row in rows) / rows[:, 1:].size
    bytes_per_token = held_out.num_bytes / len(held_out.tokens)
    return Score(nats, nats / math.log(2) / bytes_per_token)


def train(
    recipe: Recipe,
    budget: Budget,
    text: Stream,
    work: Path,
    on_checkpoint: Callable[[Run], None],
    checkpoint_s: float = 240.0,
) -> Run:
    """Train to the end of the budget, from the checkpoint in `work` if there is one."""
    model = Llama(recipe.shape, nnx.Rngs(recipe.seed), jnp.bfloat16)
    graph, params = nnx.split(model)
    optimizer = make_optimizer(recipe)
    run = load_checkpoint(Run(params, optimizer.init(params)), recipe, work)
    saved_s = run.elapsed_s
    while (progress := budget.progress(run.step, run.elapsed_s)) < 1:
        began_s = time.perf_counter()
        rows = text.batch(recipe.context(progress), recipe.batch_tokens, recipe.seed, run.step)
        run.params, run.optimizer, loss = train_step(
            run.params,
            run.optimizer,
            rows,
            jnp.float32(recipe.rate_factor(progress)),
            graph,
            optimizer,
        )
        loss = float(loss)
        step_s = time.perf_counter() - began_s
        run.step += 1
        run.elapsed_s += step_s
        if run.step % 10 == 0:
            left_s = run.elapsed_s / max(progress, 1e-9) - run.elapsed_s
            print(
                f"step {run.step} loss {loss:.4f} {recipe.batch_tokens / step_s:.0f} tokens/s "
                f"eta {left_s / 60:.1f} min",
                flush=True,
            )
        if run.elapsed_s - saved_s > checkpoint_s:
            saved_s = run.elapsed_s
            save_checkpoint(run, recipe, work)
            on_checkpoint(run)
    save_checkpoint(run, recipe, work)
    return run


def save_checkpoint(run: Run, recipe: Recipe, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves((run.params, run.optimizer))
    about = {
        "recipe": _recipe_json(recipe),
        "step": str(run.step),
        "elapsed_s": repr(run.elapsed_s),
    }
    partial_file = work / "checkpoint.partial"
    save_file(
        {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}, partial_file, metadata=about
    )
    partial_file.replace(work / "checkpoint.safetensors")


def load_checkpoint(fresh: Run, recipe: Recipe, work: Path) -> Run:
    """The run saved in `work`, or `fresh` where there is none."""
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return fresh
    with safe_open(path, "numpy") as file:
        about = file.metadata()
        if about["recipe"] != _recipe_json(recipe):
            raise ValueError(
                f"{work} holds a run of another recipe:\n  {about['recipe']}\nnot this one:\n"
                f"  {_recipe_json(recipe)}\ngive another --work, or remove it to start over"
            )
        treedef = jax.tree.structure((fresh.params, fresh.optimizer))
        leaves = [jnp.asarray(file.get_tensor(str(i))) for i in range(treedef.num_leaves)]
    params, optimizer = jax.tree.unflatten(treedef, leaves)
    return Run(params, optimizer, int(about["step"]), float(about["elapsed_s"]))


def _recipe_json(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)


def build(
    corpus: Sequence[Document],
    recipe: Recipe,
    budget: Budget,
    out: Path,
    work: Path,
    hardware: str,
    prompts: Sequence[str] = PROMPTS,
) -> None:
    """Train on a corpus and leave the model, its tokenizer and its card in `out`."""
    shape = recipe.shape
    known = [document for document in corpus if not is_held_out(document.name)]
    unseen = [document for document in corpus if is_held_out(document.name)]
    tokenizer_model = train_tokenizer(known, shape.vocab_size)
    tokenizer = spm.SentencePieceProcessor(model_proto=tokenizer_model)
    text, held_out = encode(known, tokenizer, recipe.seed), encode(unseen, tokenizer)
    print(f"{len(text.tokens)} tokens to train on, {len(held_out.tokens)} held out", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer_model, shape.max_context, out)

    def publish(run: Run) -> None:
        model = load_params(shape, run.params)
        save_hugging_face(model, shape, BOS_ID, EOS_ID, out)
        score = evaluate(model, held_out, shape.max_context, max_rows=24)
        print(f"step {run.step} held-out bits per byte {score.bits_per_byte:.4f}", flush=True)

    run = train(recipe, budget, text, work, publish)
    save_hugging_face(load_params(shape, run.params), shape, BOS_ID, EOS_ID, out)
    saved = load_params(shape, rounded(run.params))
    card = Card(
        shape=shape,
        num_parameters=sum(weight.size for weight in jax.tree.leaves(run.params)),
        corpus_sha256=fingerprint(corpus),
        text=text,
        held_out=held_out,
        steps=run.step,
        batch_tokens=recipe.batch_tokens,
        hardware=hardware,
        minutes=run.elapsed_s / 60,
        trained=evaluate(load_params(shape, run.params), held_out, shape.max_context),
        saved=evaluate(saved, held_out, shape.max_context),
        samples=[(prompt, sample(saved, shape, tokenizer, prompt)) for prompt in prompts],
    )
    (out / "README.md").write_text(card.markdown())
    print(f"held-out perplexity {card.saved.perplexity:.2f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, default=Path("build/train_demo"), help="folder of the checkpoint"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=50.0, help="train by the clock")
    length.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument(
        "--hardware",
        default=f"{os.cpu_count()} {platform.machine()} CPU cores",
        help="what the card says the run had (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    budget = Budget(args.minutes, args.steps)
    build(documents(), Recipe(), budget, args.out, args.work, args.hardware)


if __name__ == "__main__":
    main()
