import json

import numpy as np
import pytest

from model.families import read_model_config
from tests.assets import ASSETS, needs_assets
from tests.model.reference import FAMILY_NAMES, load_expected, load_family, load_model, logits

# transformers computed in float32, whose rounding moves these logits by up to 2e-4.
TOLERANCE = 1e-3


@needs_assets
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_logits_are_those_of_transformers(name):
    config, weights = load_family(name)
    prompts, generated, expected = load_expected(name)
    for prompt, continuation, last in zip(prompts, generated, expected, strict=True):
        found = logits(config, weights, prompt)[-len(last) :]
        np.testing.assert_allclose(found, last, rtol=0, atol=TOLERANCE)
        assert found[-1].argmax() == continuation[0]


@needs_assets
@pytest.mark.parametrize("case", range(5))
def test_trained_model_continues_as_with_transformers(case):
    directory = ASSETS / "models" / "stories260k-hf"
    config, weights = load_model(directory)
    expected = json.loads((directory / "expected.json").read_text())["cases"][case]
    tokens = list(expected["prompt_ids"])
    for token in expected["generated_ids"][:16]:
        assert logits(config, weights, tokens)[-1].argmax() == token
        tokens.append(token)


@needs_assets
def test_stories_end_at_either_id_of_generation_config():
    assert read_model_config(ASSETS / "models" / "stories260k-hf").eos_ids == (1, 2)
