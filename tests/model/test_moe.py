"""Who is routed to which expert, against the reference, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import Experts
from model.moe import route
from tests.model import reference

NUM_EXPERTS = 12
ROUTERS = {
    "softmax": Experts(NUM_EXPERTS, 3, 8, normalize=False),
    "softmax over the chosen": Experts(NUM_EXPERTS, 3, 8, normalize=True),
    "sigmoid": Experts(NUM_EXPERTS, 3, 8, normalize=False, scoring="sigmoid", scale=2.5),
    "one of four groups": Experts(
        NUM_EXPERTS, 2, 8, normalize=True, scoring="sigmoid", num_groups=4, top_groups=1
    ),
    "two of four groups": Experts(
        NUM_EXPERTS, 5, 8, normalize=True, scoring="sigmoid", num_groups=4, top_groups=2, scale=2.5
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_go_where_the_reference_sends_them(router, bias):
    rng = np.random.default_rng(0)
    logits_NE = rng.standard_normal((40, NUM_EXPERTS)).astype(np.float32)
    bias_E = rng.standard_normal(NUM_EXPERTS).astype(np.float32) if bias else None
    experts = ROUTERS[router]
    found = np.asarray(
        route(jnp.asarray(logits_NE), experts, None if bias_E is None else jnp.asarray(bias_E))
    )
    for logits_E, found_E in zip(logits_NE, found, strict=True):
        expected = reference.route(experts, logits_E, 0 if bias_E is None else bias_E)
        assert found_E.nonzero()[0].tolist() == sorted(expected)
        for expert, share in expected.items():
            np.testing.assert_allclose(found_E[expert], share, rtol=1e-5)


def test_experts_whose_sigmoids_all_round_to_zero_get_nothing():
    experts = ROUTERS["two of four groups"]
    found = route(jnp.full((1, NUM_EXPERTS), -1000.0), experts, jnp.zeros(NUM_EXPERTS))
    np.testing.assert_array_equal(found, 0)
