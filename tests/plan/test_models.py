import math

import pytest

from bench.offline import RANDOM_MODEL
from model.partition import fitting_meshes
from model.weights import shapes
from plan.models import FOLDER, UnknownModel, load_model, model_names, read_model


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-3.1-8b", 8030),
        ("llama-3.1-70b", 70554),
        ("qwen3-0.6b", 596),
        ("llama-125m", 125),
        ("qwen3-30b-a3b", 30532),
        ("mixtral-8x7b", 46703),
        ("mixtral-quarter", 791),
        ("tiny", 0.5),
        ("tiny-moe", 0.99),
    ],
)
def test_a_model_has_as_many_parameters_as_its_name_says(name, millions):
    parameters = sum(math.prod(shape) for shape in shapes(load_model(name)).values())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.06 if millions < 1 else 0.005)


@pytest.mark.parametrize("name", model_names())
def test_a_models_file_opens_with_what_it_is(name):
    assert (FOLDER / f"{name}.toml").read_text().startswith("# ")


def test_the_125m_model_is_the_one_that_the_offline_bench_makes():
    model = load_model("llama-125m")
    assert RANDOM_MODEL["arch"] == "llama"
    assert model.architecture == "LlamaForCausalLM"
    assert {
        "hidden": model.hidden_size,
        "mlp": model.mlp_size,
        "layers": model.num_layers,
        "heads": model.num_heads,
        "kv-heads": model.num_kv_heads,
        "vocab": model.vocab_size,
        "dtype": model.dtype,
    }.items() <= RANDOM_MODEL.items()


def test_the_tiny_model_divides_over_every_mesh_of_up_to_eight_devices():
    meshes = {(mesh.stage, mesh.tensor) for mesh in fitting_meshes(load_model("tiny"), 8)}
    sizes = (1, 2, 4, 8)
    assert meshes == {(s, t) for s in sizes for t in sizes if s * t <= 8}


def test_fewer_layers_are_the_first_ones():
    whole = load_model("qwen3-0.6b")
    assert load_model("qwen3-0.6b", 2).layers == whole.layers[:2]


@pytest.mark.parametrize("layers", [0, 29])
def test_layers_that_a_model_has_not_are_refused(layers):
    with pytest.raises(UnknownModel, match=f"has 28 layers; its first {layers} asked"):
        load_model("qwen3-0.6b", layers)


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(
        UnknownModel, match=r"no model llama-8b; did you mean llama-3.1-8b\? there are"
    ):
        load_model("llama-8b")


def test_a_name_like_none_of_them_is_refused_without_a_guess():
    with pytest.raises(UnknownModel, match=r"no model xyzzy; there are [^;]*$"):
        load_model("xyzzy")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("vocab_sizes = 8", "vocab_sizes = 8, a key that is not known"),
        ("num_hidden_layers = 0", "num_hidden_layers = 0; supported: a positive integer"),
        ("num_hidden_layers = ", "Invalid value"),
    ],
)
def test_a_file_that_describes_no_model_is_refused_by_its_name(tmp_path, line, complaint):
    kept = [
        text
        for text in (FOLDER / "tiny.toml").read_text().splitlines()
        if not text.startswith("num_hidden_layers") or line.startswith("vocab")
    ]
    path = tmp_path / "odd.toml"
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(UnknownModel, match=rf"odd\.toml: .*{complaint}"):
        read_model(path)
