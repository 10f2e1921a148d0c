"""What the first edition promises of a trained model, from the command line to the wire."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.checkpoint.convert import convert
from serve.build import build_engine
from serve.client import Client
from serve.commands import generate
from serve.config import make_config
from serve.front import Front
from serve.request import SamplingParams
from tests.assets import ASSETS, needs_assets
from tests.serve.fake_engine import served

MODEL = ASSETS / "models" / "stories260k-hf"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
NUM_STREAMS = 64

pytestmark = needs_assets


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "stories"
    convert(MODEL, directory)
    return directory


@pytest.fixture(scope="module")
def cases() -> list[dict[str, list[int]]]:
    return json.loads((MODEL / "expected.json").read_text())["cases"][:5]


@pytest.mark.parametrize("mesh", ["", "tensor=2", "stage=2", "stage=2,tensor=2"])
def test_generate_prints_the_ids_of_transformers_on_every_mesh(
    mesh: str, cases: list[dict[str, list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [case["prompt"] for case in cases]
    generate.run(MODEL, prompts, GREEDY, dtype="float32", mesh=mesh, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(cases)))
    assert [line["prompt_ids"] for line in lines] == [case["prompt_ids"] for case in cases]
    assert [line["token_ids"] for line in lines] == [case["generated_ids"] for case in cases]
    assert [line["text"] for line in lines] == [case["generated_text"] for case in cases]


@pytest.fixture(scope="module")
def address(converted: Path) -> Iterator[str]:
    """A real engine of the converted model behind the wire."""
    tables = {
        "model": {"path": str(converted), "dtype": "float32"},
        "schedule": {"max_batch": 16, "token_budget": 96, "chunk": 32},
    }
    engine = build_engine(make_config(tables, "test"), compile_ahead=False)
    engine.start()
    try:
        with served(Front(engine)) as at:
            yield at
    finally:
        engine.stop()


def test_64_concurrent_streams_over_the_converted_model_give_the_offline_ids(
    address: str, cases: list[dict[str, list[int]]]
) -> None:
    found: dict[int, list[int]] = {}

    def stream(place: int) -> None:
        prompt = cases[place % len(cases)]["prompt_ids"]
        with Client(address) as client:
            chunks = client.generate(prompt, temperature=0.0, max_tokens=64, ignore_eos=True)
            found[place] = [token for chunk in chunks for token in chunk.token_ids]

    threads = [threading.Thread(target=stream, args=(place,)) for place in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {
        place: cases[place % len(cases)]["generated_ids"] for place in range(NUM_STREAMS)
    }


def test_client_that_goes_away_frees_what_its_request_held(
    address: str, cases: list[dict[str, list[int]]]
) -> None:
    with Client(address) as watching:
        with Client(address) as leaving:
            next(leaving.generate(cases[0]["prompt_ids"], temperature=0.0, ignore_eos=True))
        deadline = time.monotonic() + 30
        while (load := watching.load()).num_running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (load.num_running, load.num_waiting, load.pages_used) == (0, 0, 0)
