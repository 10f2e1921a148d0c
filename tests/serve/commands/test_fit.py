"""`weft doctor --fit` as a user meets it: the table, the verdict, what to do, the exit code."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields

import pytest

from model.kernel_choice import Kernels
from plan.described import CompilerMissing
from serve import cli
from serve.commands import fit as command
from sharding.mesh import make_meshes

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "vocab_size": 101,
}
LLAMA_405B = TINY | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "max_position_embeddings": 131072,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
    "vocab_size": 128256,
}

Doctor = Callable[..., tuple[int, str, str]]


@pytest.fixture
def doctor(monkeypatch, capsys, tmp_path) -> Doctor:
    """Runs `weft doctor --fit` on a model without weights: exit code, output, errors."""

    def run(model: dict, *arguments: str, config: str = "") -> tuple[int, str, str]:
        (tmp_path / "config.json").write_text(json.dumps(model))
        path = tmp_path / "serve.toml"
        path.write_text(f'[model]\npath = "."\n{config}')
        monkeypatch.setattr(sys, "argv", ["weft", "doctor", "--fit", str(path), *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


SMALL = "[schedule]\nmax_batch = 1\ntoken_budget = 8\nchunk = 8\nmax_steps = 2\n"


def test_a_table_adds_up_to_the_memory_of_a_device(doctor: Doctor):
    code, out, _ = doctor(TINY, config=SMALL)
    assert code == 0
    title, *rows, verdict = out.splitlines()
    assert title.endswith("on one device, each cpu")
    found = {row.split()[0]: int(row.split()[1].replace(",", "")) for row in rows}
    parts = ["weights", "state", "moving", "activations", "pages", "free", "memory"]
    assert list(found) == parts
    assert sum(found.values()) == 2 * found["memory"]
    assert "float32, by config.json: they are not there" in rows[0]
    assert "as compiled; a start leaves" in rows[3]
    assert verdict == "fits, with keys and values of 64 tokens"


def test_a_pool_shorter_than_the_context_is_said(doctor: Doctor):
    code, out, _ = doctor(TINY, config=f"{SMALL}[cache]\npages = 2\n")
    assert code == 0
    assert out.splitlines()[-1] == (
        "fits, with keys and values of 32 tokens; longer requests are refused, though "
        "model.max_context is 64"
    )


def test_what_does_not_fit_ends_with_a_change_that_makes_it_fit(doctor: Doctor):
    config = f"{SMALL}[cache]\npages = 1_000_000_000\n"
    code, out, _ = doctor(TINY, "--hardware", "cpu", config=config)
    assert code == 1
    title, *_, verdict, to_do = out.splitlines()
    assert title.endswith("on one device, each two CPU cores with 25,276,502,016 bytes")
    # A page is 16 tokens of two heads of 8 channels, keys and values, in float32.
    assert re.fullmatch(
        r"does not fit: 2,022,7\d\d,\d{3},\d{3} bytes too few on each device", verdict
    )
    change = re.fullmatch(r"to do       (cache\.pages=12\d{6}) \(a pool of [\d,]+ tokens\)", to_do)
    assert change
    code, out, _ = doctor(TINY, "--hardware", "cpu", "--set", change[1], config=config)
    assert code == 0


class TestOnPaper:
    """A model of 812 GB on a node of eight GPUs of 80 GB, which are not there."""

    NODE = ("--hardware", "h100", "--json", "--set", "mesh.tensor=8")

    @pytest.fixture(autouse=True)
    def nothing_to_compile_with(self, monkeypatch):
        def missing(shape):
            raise CompilerMissing("can't compile; install the compiler")

        monkeypatch.setattr(command, "described_mesh", missing)
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")

    def test_bfloat16_weights_do_not_fit_and_8_bits_would(self, doctor: Doctor):
        code, out, _ = doctor(LLAMA_405B, *self.NODE)
        report = json.loads(out)
        assert code == 1
        assert not report["weights_are_there"]
        found = report["fit"]
        # 405.8e9 numbers of two bytes, over eight devices.
        assert found["weight_bytes"] == pytest.approx(2 * 405.85e9 / 8, rel=1e-3)
        assert found["memory_bytes"] == 72_000_000_000
        assert report["short_bytes"] > found["weight_bytes"] - 72_000_000_000
        assert [remedy["change"] for remedy in report["remedies"]] == [
            "weft convert --quantize int8"
        ]

    def test_fp8_weights_fit_by_an_estimate_that_is_called_so(self, doctor: Doctor):
        fp8 = LLAMA_405B | {"quantization_config": {"quant_method": "weft", "weights": "fp8"}}
        code, out, _ = doctor(fp8, *self.NODE)
        report = json.loads(out)
        assert (code, report["fits"], report["remedies"]) == (0, True, [])
        # Embedding and head, 2.1e9 numbers each, stay bfloat16.
        weight_bytes = (401.6e9 + 2 * 4.2e9) / 8
        assert report["fit"]["weight_bytes"] == pytest.approx(weight_bytes, rel=1e-2)
        assert report["fit"]["activation_bytes"] is None
        code, out, _ = doctor(fp8, *[word for word in self.NODE if word != "--json"])
        assert "by estimate: can't compile; install the compiler" in out
        assert "NVIDIA H100 with 80,000,000,000 bytes, 90% of which JAX takes" in out


def test_for_devices_that_are_not_there_the_largest_steps_are_compiled(doctor: Doctor, monkeypatch):
    """Here for virtual CPU devices in their place; tests/plan/test_described.py has the rest."""
    compiled = []

    def compile_described(step, arguments, shardings):
        compiled.append(step.lower(*arguments).compile())
        return compiled[-1]

    monkeypatch.setattr(command, "described_mesh", lambda shape: make_meshes(shape)[0])
    monkeypatch.setattr(command, "compile_described", compile_described)
    kernels = "".join(f'{field.name} = "xla"\n' for field in fields(Kernels))
    config = f"{SMALL}[mesh]\ntensor = 2\n[kernels]\n{kernels}"
    code, out, _ = doctor(TINY, "--hardware", "h200", config=config)
    assert code == 0
    assert len(compiled) == 2
    assert "as compiled for an NVIDIA H200" in out


def test_a_mesh_beyond_a_described_host_is_estimated(doctor: Doctor):
    model = TINY | {"num_hidden_layers": 16}
    code, out, _ = doctor(model, "--hardware", "h200", config="[mesh]\nstage = 16\n")
    assert code == 0
    assert "by estimate: mesh stage=16 takes 16 devices; a described host has 8" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h1000"], "no hardware h1000; did you mean h100? there are cpu, h100"),
        (["--set", "model.path=/nowhere"], "/nowhere/config.json does not exist"),
        (["--set", "mesh.tensor=3"], "these fit: "),
        (["--set", "kernels.small_matmul=pallas"], "small_matmul is pallas, which compiles for"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(doctor: Doctor, arguments, message):
    code, out, err = doctor(TINY, *arguments, config=SMALL)
    assert (code > 0, out) == (True, "")
    assert message in err
    assert "Traceback" not in err


def test_hardware_goes_with_fit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weft", "doctor", "--hardware", "h100"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--hardware goes with --fit CONFIG" in capsys.readouterr().err
