"""The demo model's card: what it learned from, how well, how it writes, what it can't do.

It states what it is given and measures nothing.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm
from flax import nnx

from tools.demo_corpus import BOS_ID, EOS_ID, Stream
from tools.demo_model import Llama, Shape

TEMPERATURE = 0.7
SAMPLE_TOKENS = 120

TEMPLATE = """\
# The demo model

A Llama of {parameters:.1f} million parameters that `make serve` answers with. It writes text that
looks like the Python standard library: its code, its docstrings, its reference prose. It knows
nothing else, follows no instructions, and what it says is not true.

| | |
|---|---|
| Architecture | LlamaForCausalLM: {layers} layers, width {width}, feed-forward {mlp}, \
{heads} query and {kv_heads} key-value heads of {head_dim} channels, tied embeddings, \
context {context} |
| Weights | bfloat16, {parameters:.2f} M parameters |
| Tokenizer | sentencepiece BPE with byte fallback, {vocab} pieces; lossless for any text |
| Training | {steps} steps of {batch} tokens, {tokens:.1f} M in all ({epochs:.1f} times the text) |
| Hardware | {hardware} |
| Time | {minutes:.0f} minutes, {rate:.0f} tokens/s on average |
| Held-out perplexity | {perplexity:.2f} per token (float32 weights before rounding: \
{perplexity_float32:.2f}) |
| Held-out bits per byte | {bits_per_byte:.3f} |

## Data

The sources of CPython {python}'s standard library and the topics of `pydoc_data`, read from the
interpreter that ran the script: {train_documents} documents, {train_bytes:.2f} MB, for training;
{held_documents} documents, {held_bytes:.2f} MB, held out by a hash of their names. Left out: site
packages, tests, encodings, compiled modules, tables, and files written when the interpreter was
built. Some held-out topics repeat passages of others.

SHA-256 of names and texts: `{digest}`

## Licence

The weights are licensed under Apache-2.0, as is this project. The text they were trained on is
© Python Software Foundation and its contributors, under the PSF License Version 2 and the
compatible licences that CPython's LICENSE file names.

## Build it again

    python -m tools.train_demo --out models/demo --minutes {minutes:.0f}

`--steps {steps}` in place of `--minutes` makes the number of steps independent of the machine's
speed. Another patch release of CPython is other text, and so other weights.

## How it writes

Drawn at temperature {temperature}, seed 0, the first draw for each prompt; the prompt comes first.

{samples}

## Limits

It was trained for minutes, on one kind of text. The look is right: layout, keywords, turns of
phrase. The sense seldom is: sentences drift, code seldom runs, names and numbers are made up. It
can repeat passages that stand many times in its text, such as licence headers. Past {context}
tokens it degrades.
"""


@dataclass(frozen=True)
class Score:
    """Mean loss on held-out documents."""

    nats_per_token: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


@dataclass(frozen=True)
class Card:
    """What the card states."""

    shape: Shape
    num_parameters: int
    corpus_sha256: str
    text: Stream
    held_out: Stream
    steps: int
    batch_tokens: int
    hardware: str
    minutes: float
    trained: Score
    """Of the weights as trained, in float32."""
    saved: Score
    """Of the weights as saved, in bfloat16."""
    samples: Sequence[tuple[str, str]]
    """Prompts and what the saved weights made of them."""

    def markdown(self) -> str:
        shape, tokens = self.shape, self.steps * self.batch_tokens
        return TEMPLATE.format(
            parameters=self.num_parameters / 1e6,
            layers=shape.num_layers,
            width=shape.hidden_size,
            mlp=shape.mlp_size,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            context=shape.max_context,
            vocab=shape.vocab_size,
            steps=self.steps,
            batch=self.batch_tokens,
            tokens=tokens / 1e6,
            epochs=tokens / len(self.text.tokens),
            hardware=self.hardware,
            minutes=self.minutes,
            rate=tokens / (60 * self.minutes),
            perplexity=self.saved.perplexity,
            perplexity_float32=self.trained.perplexity,
            bits_per_byte=self.saved.bits_per_byte,
            python=platform.python_version(),
            train_documents=self.text.num_documents,
            train_bytes=self.text.num_bytes / 1e6,
            held_documents=self.held_out.num_documents,
            held_bytes=self.held_out.num_bytes / 1e6,
            digest=self.corpus_sha256,
            temperature=TEMPERATURE,
            samples="\n\n".join(_quoted(prompt + text) for prompt, text in self.samples),
        )


def sample(
    model: Llama, shape: Shape, tokenizer: spm.SentencePieceProcessor, prompt: str, seed: int = 0
) -> str:
    """A continuation of the prompt, by a whole forward pass per token."""
    rng = np.random.default_rng(seed)
    tokens = [BOS_ID, *tokenizer.encode(prompt)]
    num_prompt = len(tokens)
    # One shape, one compilation: what follows the last token cannot change its logits.
    row = np.full((1, min(shape.max_context, num_prompt + SAMPLE_TOKENS)), EOS_ID)
    while len(tokens) < row.shape[1]:
        row[0, : len(tokens)] = tokens
        logits_V = np.asarray(_logits(model, jnp.asarray(row))[0, len(tokens) - 1], np.float64)
        weights_V = np.exp((logits_V - logits_V.max()) / TEMPERATURE)
        token = int(rng.choice(len(weights_V), p=weights_V / weights_V.sum()))
        if token == EOS_ID:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])[len(tokenizer.decode(tokens[1:num_prompt])) :]


@nnx.jit
def _logits(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT)


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
