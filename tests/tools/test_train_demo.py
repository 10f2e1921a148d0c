"""The demo model's trainer on a tiny recipe, and the trained demo model itself."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece as spm
from safetensors.numpy import load_file

from tools.demo_corpus import (
    BOS_ID,
    EOS_ID,
    Document,
    documents,
    encode,
    is_held_out,
    train_tokenizer,
)
from tools.demo_model import QUERY_BLOCK, Shape, causal_attention, load_params, rounded
from tools.train_demo import Budget, Recipe, Run, build, train

SHAPE = Shape(
    vocab_size=400,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_context=64,
)
# Rows of one length only: each length compiles the step once more.
RECIPE = Recipe(shape=SHAPE, batch_tokens=512, short_context=64)
STEPS = 12
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
}
UNSEEN_TEXT = '''\
def first_line(self, path, default=None):
    """Return the first line of the file, or the default value if it is empty."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            return line.rstrip()
    if default is None:
        raise ValueError("file is empty: %r" % path)
    return default
'''
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return [document for document in documents() if document.name.startswith("pydoc_data/")]


@pytest.fixture(scope="module")
def tokenizer(corpus: list[Document]) -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_proto=train_tokenizer(corpus, SHAPE.vocab_size))


@pytest.fixture(scope="module")
def folders(
    corpus: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """`out`, `work` and what was printed of a finished tiny run."""
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda line, flush=False: lines.append(line))
        build(corpus, RECIPE, Budget(minutes=0, steps=STEPS), out, work, "a test", prompts=["def "])
    return out, work, "\n".join(lines)


def numpy_llama(folder: Path, tokens_T: np.ndarray) -> np.ndarray:
    """Logits [T, V] in float32, written from the paper and Hugging Face's conventions only."""
    config = json.loads((folder / "config.json").read_text())
    weights = {
        name: array.astype(np.float32)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T

    def turn(vector: np.ndarray, position: int) -> np.ndarray:
        half = head_dim // 2
        turned = np.empty_like(vector)
        for c in range(half):
            angle = position * config["rope_theta"] ** (-2 * c / head_dim)
            a, b = vector[c], vector[c + half]
            turned[c] = a * np.cos(angle) - b * np.sin(angle)
            turned[c + half] = b * np.cos(angle) + a * np.sin(angle)
        return turned

    x_TD = weights["model.embed_tokens.weight"][tokens_T]
    T = len(tokens_T)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}"
        y_TD = norm(x_TD, f"{prefix}.input_layernorm")
        q, k, v = (
            linear(y_TD, f"{prefix}.self_attn.{p}_proj").reshape(T, -1, head_dim) for p in "qkv"
        )
        out = np.zeros((T, num_heads, head_dim), np.float32)
        for h in range(num_heads):
            kv = h // (num_heads // num_kv_heads)
            keys = np.stack([turn(k[t, kv], t) for t in range(T)])
            for t in range(T):
                scores = keys[: t + 1] @ turn(q[t, h], t) / np.sqrt(head_dim)
                weight = np.exp(scores - scores.max())
                out[t, h] = weight / weight.sum() @ v[: t + 1, kv]
        x_TD = x_TD + linear(out.reshape(T, -1), f"{prefix}.self_attn.o_proj")
        y_TD = norm(x_TD, f"{prefix}.post_attention_layernorm")
        gate = linear(y_TD, f"{prefix}.mlp.gate_proj")
        hidden = gate / (1 + np.exp(-gate)) * linear(y_TD, f"{prefix}.mlp.up_proj")
        x_TD = x_TD + linear(hidden, f"{prefix}.mlp.down_proj")
    return norm(x_TD, "model.norm") @ weights["model.embed_tokens.weight"].T


def mean_loss(logits_TV: np.ndarray, targets_T: np.ndarray) -> float:
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -float(log_softmax[np.arange(len(targets_T)), targets_T].mean())


def test_loss_falls_below_guessing(folders: tuple[Path, Path, str]):
    # Uniform guessing over 400 pieces costs log2(400) = 8.6 bits per token; the corpus has
    # about two bytes to the token.
    *_, last = [line for line in folders[2].splitlines() if "perplexity" in line]
    assert float(last.split()[-1]) < 0.7 * SHAPE.vocab_size


def test_output_folder_holds_the_model_and_nothing_else(folders: tuple[Path, Path, str]):
    assert {path.name for path in folders[0].iterdir()} == FILES


def test_tensors_have_the_names_and_shapes_of_hugging_face_llama(
    folders: tuple[Path, Path, str],
):
    tensors = load_file(folders[0] / "model.safetensors")
    layer = {
        "input_layernorm": (32,),
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "post_attention_layernorm": (32,),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    expected = {"model.embed_tokens.weight": (400, 32), "model.norm.weight": (32,)}
    for i in range(SHAPE.num_layers):
        expected |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}


def test_saved_model_computes_what_a_plain_llama_does(
    folders: tuple[Path, Path, str], corpus: list[Document], tokenizer: spm.SentencePieceProcessor
):
    out, work, _ = folders
    run = train(RECIPE, Budget(0, STEPS), encode(corpus, tokenizer), work, lambda run: None)
    model = load_params(SHAPE, rounded(run.params))
    tokens_T = np.array([BOS_ID, *tokenizer.encode(corpus[3].text)][:40])
    logits_TV = np.asarray(model(jnp.asarray(tokens_T)[None])[0])
    # Both float32, sums in another order; the logits are of size 1.
    np.testing.assert_allclose(logits_TV, numpy_llama(out, tokens_T), atol=1e-3)


def test_a_cut_run_resumes_to_the_same_weights(
    folders: tuple[Path, Path, str],
    corpus: list[Document],
    tmp_path: Path,
):
    out, work, _ = folders

    def cut(run: Run) -> None:
        if run.step == STEPS // 2:
            raise KeyboardInterrupt

    known = [document for document in corpus if not is_held_out(document.name)]
    model = (out / "tokenizer.model").read_bytes()
    text = encode(known, spm.SentencePieceProcessor(model_proto=model), RECIPE.seed)
    budget = Budget(0, STEPS)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, budget, text, tmp_path, cut, checkpoint_s=0)
    resumed = train(RECIPE, budget, text, tmp_path, lambda run: None)
    assert resumed.step == STEPS
    straight = load_file(work / "checkpoint.safetensors")
    again = load_file(tmp_path / "checkpoint.safetensors")
    for name, leaf in straight.items():
        # The same sums, but XLA's CPU threads may split them another way.
        np.testing.assert_allclose(again[name], leaf, rtol=1e-3, atol=1e-5)


def test_a_work_folder_of_another_recipe_is_refused(
    folders: tuple[Path, Path, str], corpus: list[Document], tokenizer: spm.SentencePieceProcessor
):
    other = dataclasses.replace(RECIPE, seed=1)
    with pytest.raises(ValueError, match="of another recipe:"):
        train(other, Budget(0, STEPS), encode(corpus, tokenizer), folders[1], lambda run: None)


def test_split_depends_on_the_name_alone_and_parts_the_corpus():
    names = [document.name for document in documents()]
    assert len(names) == len(set(names))
    held_out = [name for name in names if is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.1
    # Fixed by SHA-256, the same on every machine and in every process.
    assert is_held_out("traceback.py")
    assert not is_held_out("abc.py")


def test_corpus_leaves_out_tests_tables_and_installed_packages(tmp_path: Path):
    kept = ["json/decoder.py", "abc.py"]
    dropped = [
        "test/test_abc.py",
        "idlelib/idle_test/mock_tk.py",
        "site-packages/jax/version.py",
        "encodings/cp037.py",
        "_sysconfigdata__linux_.py",
        "config-3.12-x86_64-linux-gnu/python-config.py",
    ]
    for name in kept + dropped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    names = {document.name for document in documents(tmp_path)}
    assert {name for name in names if not name.startswith("pydoc_data/")} == set(kept)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    if x:\n\treturn  {1: 2}\n\n\n",
        " leading, trailing ",
        "naïve 語 \N{SNAKE}\r\n",
        " " * 43 + "x",
    ],
)
def test_tokenizer_gives_every_text_back(text: str, tokenizer: spm.SentencePieceProcessor):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_parting_words_from_spaces_keeps_the_text(
    corpus: list[Document], tokenizer: spm.SentencePieceProcessor
):
    whole, parted = encode(corpus, tokenizer), encode(corpus, tokenizer, split_seed=0)
    assert len(parted.tokens) > len(whole.tokens)
    assert tokenizer.decode(parted.tokens.tolist()) == tokenizer.decode(whole.tokens.tolist())


def test_batches_open_with_bos_and_repeat_by_step(
    corpus: list[Document], tokenizer: spm.SentencePieceProcessor
):
    text = encode(corpus, tokenizer)
    rows = text.batch(context=32, batch_tokens=512, seed=0, step=7)
    assert rows.shape == (16, 33)
    assert (rows[:, 0] == BOS_ID).all()
    np.testing.assert_array_equal(rows, text.batch(32, 512, seed=0, step=7))
    assert (rows != text.batch(32, 512, seed=0, step=8)).any()


def test_every_document_ends_with_eos(
    corpus: list[Document], tokenizer: spm.SentencePieceProcessor
):
    text = encode(corpus, tokenizer)
    assert (text.tokens == EOS_ID).sum() == len(corpus)
    assert text.tokens[-1] == EOS_ID


def test_attention_in_blocks_is_causal_attention():
    rng = np.random.default_rng(0)
    B, T, H, K, C = 2, 2 * QUERY_BLOCK + 40, 4, 2, 8
    q, k, v = (rng.standard_normal((B, T, n, C), np.float32) for n in (H, K, K))
    k_BTHC, v_BTHC = np.repeat(k, H // K, axis=2), np.repeat(v, H // K, axis=2)
    scores_BHTS = np.einsum("bthc,bshc->bhts", q, k_BTHC) / np.sqrt(C)
    weights_BHTS = np.exp(np.where(np.tri(T, dtype=bool), scores_BHTS, -np.inf))
    weights_BHTS /= weights_BHTS.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshc->bthc", weights_BHTS, v_BTHC)
    found = jax.jit(causal_attention)(q, k, v)
    # Float32 both; sums of up to 296 terms of size 1 in another order.
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_grow_and_the_rate_ends_at_zero():
    recipe = Recipe(short_context=32, short_share=0.5, warmup_share=0.25)
    assert [recipe.context(p) for p in (0, 0.49, 0.5, 1)] == [32, 32, 1024, 1024]
    assert [recipe.rate_factor(p) for p in (0, 0.125, 0.25, 0.625, 1)] == [0, 0.5, 1, 0.5, 0]


@pytest.mark.skipif(not DEMO.is_dir(), reason="models/demo is not built")
def test_the_demo_model_is_small_complete_and_knows_its_domain():
    assert {path.name for path in DEMO.iterdir()} == FILES
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 15.5e6
    tokenizer = spm.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    tokens_T = np.array([BOS_ID, *tokenizer.encode(UNSEEN_TEXT)])
    loss = mean_loss(numpy_llama(DEMO, tokens_T[:-1]), tokens_T[1:])
    # A model with a wrong weight or convention guesses: log(4096) = 8.3.
    assert loss < 4
