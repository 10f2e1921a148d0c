"""Every family's reference checkpoint, served by token ids as transformers continues it."""

from dataclasses import replace

import pytest

from sharding.mesh import parse_mesh
from tests.assets import needs_assets
from tests.model.reference import FAMILY_NAMES, load_expected, load_family
from tests.serve.harness import LIMITS, compile_few, generate, greedy, make_parts

# All six prompts run at once, the longest in chunks beside the others' decoding. One token a step
# takes one program; test_engine.py and test_meshes.py have the loop of several.
SIX_AT_ONCE = replace(LIMITS, max_batch=8, max_steps=1, max_context=192)


@needs_assets
@pytest.mark.parametrize(
    ("family", "mesh"), [*((name, "") for name in FAMILY_NAMES), ("deepseek_v3", "tensor=2")]
)
def test_greedy_tokens_are_those_of_transformers(family, mesh):
    config, arrays = load_family(family)
    prompts, expected, _ = load_expected(family)
    parts = make_parts(config, arrays, parse_mesh(mesh), limits=SIX_AT_ONCE, num_pages=80)
    compile_few(parts.runner)
    requests = [greedy(str(i), prompt, 48) for i, prompt in enumerate(prompts)]
    answers = generate(parts.engine(), requests)
    assert [answers[str(i)].token_ids for i in range(len(prompts))] == expected
