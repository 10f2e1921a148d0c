"""Pages that leave the device and come back: nothing but the time to a first token changes."""

import time

import pytest

from cache.tiers.host import HostTier
from cache.tiers.stack import TierStack
from serve.tier_traffic import TierTraffic
from sharding.mesh import parse_mesh
from tests.serve.harness import (
    DENSE,
    PAGE_SIZE,
    compile_few,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)
from tests.serve.test_prefix_caching import num_cached, serve

NUM_PAGES = 20
TIMEOUT_S = 60
PROMPT, *OTHERS = random_prompts(DENSE, [90] * 5)
WEIGHTS = random_weights(DENSE)


def page_cost(number):
    return float(PAGE_SIZE)


class Stack(TierStack):
    """One for which computing takes so long that whatever is below is fetched."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.worth.observe_prefill(1.0, 1000.0)
        self.worth.observe_prefill = lambda cost, seconds: None


@pytest.fixture(params=["tensor=1", "stage=2,tensor=4"])
def host_parts(request):
    def make_traffic(mover):
        image_bytes = mover.images.image_bytes
        return TierTraffic(Stack(HostTier(100 * image_bytes, image_bytes), []), mover, page_cost)

    parts = make_parts(
        DENSE,
        WEIGHTS,
        parse_mesh(request.param),
        num_pages=NUM_PAGES,
        make_traffic=make_traffic,
    )
    compile_few(parts.runner)
    yield parts
    parts.runner.close(1.0)


def wait_for_pages(parts, num_pages):
    """Until host memory has so many."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while parts.traffic.reports()[0].num_pages < num_pages:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_evicted_prefix_comes_back_from_host_memory(host_parts):
    engine = host_parts.engine()
    host_parts.runner.start(engine.wake)
    first = serve(engine, greedy("first", PROMPT, 8))
    for i, other in enumerate(OTHERS):
        serve(engine, greedy(f"other {i}", other, 8))
    wait_for_pages(host_parts, 6 * len(OTHERS))
    again = serve(engine, greedy("again", PROMPT, 8))
    assert num_cached(again) == 80
    assert again.token_ids == first.token_ids
