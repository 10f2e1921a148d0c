"""What is proposed fits by the same arithmetic, the least painful first."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from serve.config import make_config
from serve.fit import Fit, Served, fit
from serve.remedies import refusal, remedies
from tests.serve.harness import DENSE, MOE

HALF = {"path": "nowhere", "dtype": "bfloat16"}
SMALL = {"max_batch": 4, "token_budget": 64, "chunk": 16}


def serve(of: ModelConfig = DENSE, platform: str = "gpu", **sections) -> Served:
    values = {"model": {"path": "nowhere"}, "schedule": SMALL} | sections
    return Served(make_config(values, "test"), of, platform)


def changes(served: Served, memory_bytes: int, num_devices: int = 1) -> list[str]:
    def check(changed: Served) -> Fit:
        return fit(changed, memory_bytes)

    found = check(served)
    assert found.short_bytes > 0
    return [str(remedy.change) for remedy in remedies(served, found, check, num_devices)]


def test_fewer_pages_come_first_where_too_many_are_asked_for():
    served = serve(cache={"pages": 100})
    memory_bytes = fit(serve(cache={"pages": 99}), 0).needed_bytes
    assert changes(served, memory_bytes)[0] == "cache.pages=99"
    one_less = fit(serve(cache={"pages": 99}), memory_bytes)
    assert one_less.short_bytes == one_less.free_bytes == 0


def test_more_of_the_memory_is_proposed_where_there_is_more():
    served = serve(cache={"memory_fraction": 0.5})
    memory_bytes = int(fit(served, 0).needed_bytes / 0.9)
    assert changes(served, memory_bytes)[0] == "cache.memory_fraction=0.95"
    assert changes(replace(served, platform="cpu"), memory_bytes * 3 // 2)[0].endswith("=0.6")


def test_narrower_pages_are_proposed_where_pages_are_what_is_too_large():
    served = serve(cache={"pages": 1000})
    memory_bytes = fit(serve(cache={"pages": 1000, "dtype": "fp8"}), 0).needed_bytes
    assert changes(served, memory_bytes)[1] == "cache.dtype=fp8"


def test_smaller_steps_are_halved_no_further_than_need_be():
    schedule = {"max_batch": 64, "token_budget": 4096, "chunk": 2048}
    served = serve(cache={"pages": 1}, schedule=schedule)
    smaller = serve(
        cache={"pages": 1}, schedule={"max_batch": 16, "token_budget": 1024, "chunk": 1024}
    )
    memory_bytes = fit(smaller, 0).needed_bytes
    assert changes(served, memory_bytes)[0] == (
        "schedule.max_batch=16, schedule.token_budget=1024, schedule.chunk=1024"
    )


def test_narrower_and_quantized_weights_are_proposed_where_weights_are_too_large():
    large = replace(DENSE, hidden_size=256, mlp_size=512)
    served = serve(large, cache={"pages": 1})
    memory_bytes = fit(serve(large, cache={"pages": 1}, model=HALF), 0).needed_bytes
    assert changes(served, memory_bytes) == [
        "model.dtype=bfloat16",
        "weft convert --quantize int8",
    ]


def test_the_smallest_mesh_that_fits_is_proposed_and_none_beyond_the_devices():
    large = replace(DENSE, hidden_size=256, mlp_size=512)
    served = serve(large, cache={"pages": 1}, model=HALF)
    sharded = serve(large, cache={"pages": 1}, model=HALF, mesh={"tensor": 4})
    memory_bytes = fit(sharded, 0).needed_bytes
    assert changes(served, memory_bytes, 8) == ["mesh.stage=1, mesh.tensor=4"]
    assert changes(served, memory_bytes, 2) == []


def test_two_changes_at_once_are_proposed_where_no_one_is_enough():
    large = replace(DENSE, hidden_size=256, mlp_size=512)
    served = serve(large, cache={"pages": 1}, model=HALF)
    int8 = replace(large, quantization="int8")
    both = serve(int8, cache={"pages": 1}, model=HALF, mesh={"tensor": 2})
    memory_bytes = fit(both, 0).needed_bytes
    assert changes(served, memory_bytes, 2) == [
        "weft convert --quantize int8 and mesh.stage=1, mesh.tensor=2"
    ]


@settings(max_examples=30)
@given(
    pages=st.none() | st.integers(1, 10_000),
    share=st.floats(0.02, 1),
    tensor=st.sampled_from([1, 2]),
    model=st.sampled_from([DENSE, MOE]),
)
def test_every_remedy_fits_by_the_arithmetic_that_found_the_fault(pages, share, tensor, model):
    served = serve(model, cache={"pages": pages}, mesh={"tensor": tensor})
    memory_bytes = int(fit(served, 0).needed_bytes * share)

    def check(changed: Served) -> Fit:
        return fit(changed, memory_bytes)

    found = check(served)
    for remedy in remedies(served, found, check, 8):
        then = check(remedy.change.apply(served))
        assert then == remedy.fit
        assert then.short_bytes == 0


def test_a_refusal_says_what_is_needed_what_there_is_and_what_fits():
    served = serve(cache={"pages": 100})
    found = fit(served, 100_000)
    fitting = remedies(served, found, lambda changed: fit(changed, 100_000), 1)
    text = refusal(found, fitting)
    assert f"{found.needed_bytes:,} bytes of each device" in text
    assert f"of 100,000, {found.short_bytes:,} too few; " in text
    assert text.endswith("use more devices, or larger ones")
    room = fit(served, 0).needed_bytes - 1
    fitting = remedies(served, fit(served, room), lambda changed: fit(changed, room), 1)
    assert "; it fits with cache.pages=99 (a pool of 6,336 tokens); or " in refusal(found, fitting)
