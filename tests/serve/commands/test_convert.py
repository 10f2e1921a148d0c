"""`weft convert --calibrate`: what the model is run on, and what is refused before it is."""

import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from serve import cli
from serve.build import build_engine
from serve.commands import convert
from serve.commands.convert import Calibration
from serve.errors import RequestError
from tests.model.checkpoint.tiny import write_tiny

CALIBRATE = ["--quantize", "int8", "--calibrate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def weft(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str]:
        """The exit code, and what stderr said."""
        monkeypatch.setattr(sys, "argv", ["weft", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def test_what_the_model_writes_is_the_same_each_time(model, tmp_path, capsys):
    manifests = []
    for name in ("one", "other"):
        convert.run(model, tmp_path / name, None, "int8", Calibration(100), "orbax")
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        manifests.append((tmp_path / name / "weft.json").read_bytes())
    assert manifests[0] == manifests[1], "digests of all tensors are in it"
    assert json.loads(manifests[0])["calibration_tokens"] == 2 * 63, "two sequences of 63"


def test_the_engine_that_wrote_is_gone_when_the_model_is_converted(model, tmp_path, monkeypatch):
    engines, alive = [], []

    def build(*arguments, **options):
        engine = build_engine(*arguments, **options)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr("serve.build.build_engine", build)
    monkeypatch.setattr(convert, "convert", lambda *_, **__: alive.append(engines[0]()))
    convert.run(model, tmp_path / "out", None, "int8", Calibration(20), "orbax")
    assert alive == [None]


def test_a_text_is_cut_into_sequences(model, tmp_path, monkeypatch):
    taken = calibrated_on(monkeypatch, model, tmp_path, "abcdefghij" * 20, 100)
    assert taken.shape == (2, 63)
    assert taken.ravel().tolist() == [ord(char) % 40 for char in ("abcdefghij" * 13)[:126]]


def test_a_text_that_is_too_short_is_refused(model, tmp_path, monkeypatch):
    message = r"has 50 tokens, and 2 sequences of 63 need 126; give a longer text, or lower"
    with pytest.raises(RequestError, match=message):
        calibrated_on(monkeypatch, model, tmp_path, "a" * 50, 100)


def test_what_is_no_text_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="is not text in UTF-8; give --text one that is"):
        calibrated_on(monkeypatch, model, tmp_path, b"\xff\xfe\xfd", 100)


def calibrated_on(monkeypatch, model: Path, folder: Path, text: str | bytes, num_tokens: int):
    """The tokens that are given to the conversion, of a tokenizer that knows bytes alone."""

    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            return [byte % 40 for byte in text.encode()]

    given = {}
    monkeypatch.setattr(convert, "convert", lambda *_, **options: given.update(options))
    monkeypatch.setattr(convert, "load_text", lambda _: convert.Text(Tokenizer(), None))
    file = folder / "text.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    convert.run(model, folder / "out", None, "int8", Calibration(num_tokens, file), "orbax")
    return np.asarray(given["calibration"])


def test_a_text_needs_a_tokenizer(weft, model, tmp_path):
    code, said = weft(model, tmp_path / "out", *CALIBRATE, "--text", __file__)
    assert code == 1
    assert said.endswith(f"has no tokenizer to read {__file__} with; leave out --text\n")


def test_an_existing_destination_is_refused_before_the_model_is_run(weft, model):
    code, said = weft(model, model, *CALIBRATE)
    assert (code, said) == (1, f"weft: {model} exists; remove it or choose another destination\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate"], "--calibrate is of a quantization; give --quantize"),
        (["--quantize", "int8", "--text", __file__], "--text is to calibrate on; give --calibrate"),
        ([*CALIBRATE, "--text", "/nowhere"], "does not exist"),
        ([*CALIBRATE, "--tokens", "1"], "2"),
    ],
)
def test_options_that_do_not_go_together_exit_2(weft, model, tmp_path, options, message):
    code, said = weft(model, tmp_path / "out", *options)
    assert code == 2
    assert message in " ".join(said.replace("│", " ").split())
