"""An engine whose steps are computed by our own kernels, interpreted."""

from dataclasses import replace

from model.kernel_choice import Kernels, fallbacks
from plan.kernel_choice import asked_kernels
from tests.serve.harness import (
    DENSE,
    assert_greedy,
    compile_few,
    generate,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

# The widths that kernels take; one layer, since interpreted kernels take long to compile.
CONFIG = replace(
    DENSE,
    hidden_size=128,
    head_dim=16,
    mlp_size=128,
    qk_norm="head",
    layers=DENSE.layers[1:2],
    attention_scale=16**-0.5,
)


def test_engine_of_pallas_kernels_gives_the_greedy_tokens():
    """Long prompts prefill over pages beside rows that decode, and then all decode in the loop."""
    arrays, before = random_weights(CONFIG), fallbacks.copy()
    parts = make_parts(CONFIG, arrays, kernels=Kernels(**asked_kernels("pallas_interpreted")))
    compile_few(parts.runner)
    prompts = random_prompts(CONFIG, [3, 70, 18, 45])
    requests = [greedy(f"r{i}", prompt, 12) for i, prompt in enumerate(prompts)]
    answers = generate(parts.engine(), requests)
    for request in requests:
        assert_greedy(CONFIG, arrays, request.prompt_ids, answers[request.request_id].token_ids)
    assert fallbacks == before, "every operation was computed by the kernel asked"
