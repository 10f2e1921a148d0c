"""Prefill and decode apart, from configurations: in one process and in two servers."""

import jax
import pytest

from serve.api.transfer_service import TransferService
from serve.build import build_engine
from serve.front import Front
from sharding.mesh import MeshError
from tests.serve.fake_engine import served
from tests.serve.harness import Answer, greedy
from tests.serve.test_build import MODEL, configure
from tools.random_checkpoint import write_random_checkpoint

TIMEOUT_S = 60
PROMPTS = [[3 + (i * step) % 90 for i in range(length)] for step, length in ((1, 50), (7, 40))]
SCHEDULE = {"max_batch": 2, "token_budget": 32, "chunk": 16, "max_steps": 1}
CACHE = {"pages": 12}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, MODEL, "bfloat16")
    return directory


def configured(checkpoint, split, **sections):
    """Nobody is late: programs are compiled when they are needed first."""
    if split:
        split = {"lease_s": 300.0} | split
    model = {"dtype": "float32"}
    return configure(
        checkpoint,
        model=model,
        schedule=SCHEDULE,
        cache=CACHE | sections.pop("cache", {}),
        split=split,
        **sections,
    )


def answers(engine):
    engine.start()
    try:
        found = [Answer() for _ in PROMPTS]
        for i, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
            engine.submit(greedy(str(i), prompt, 6), answer)
        assert engine.wait_idle(TIMEOUT_S)
        return found
    finally:
        engine.stop()


def tokens(found):
    return [answer.token_ids for answer in found]


def num_sent(found):
    return [answer.outputs[-1].usage.prefilled_tokens for answer in found]


@pytest.fixture(scope="module")
def expected(checkpoint):
    return tokens(answers(build_engine(configured(checkpoint, {}), compile_ahead=False)))


def test_each_replica_has_devices_that_prefill_for_it(checkpoint, expected):
    split = {"role": "decode", "prefill_tensor": 1, "least_tokens": 16}
    config = configured(checkpoint, split, mesh={"data": 2})
    engine = build_engine(config, compile_ahead=False)
    found = answers(engine)
    assert tokens(found) == expected
    assert num_sent(found) == [48, 32]
    assert len(engine.transfers()) == 2
    assert engine.load().pages_used == 0


@pytest.fixture
def compiled():
    """What XLA has compiled since."""
    names: list[str] = []

    def note(name: str, seconds: float, **more: object) -> None:
        if "backend_compile" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_everything_is_compiled_before_it_is_served(checkpoint, expected, compiled):
    """With two devices that prefill, and cut what the replica has whole."""
    split = {"role": "decode", "prefill_tensor": 2, "least_tokens": 16}
    engine = build_engine(configured(checkpoint, split))
    assert compiled
    compiled.clear()
    found = answers(engine)
    assert not compiled
    assert tokens(found) == expected
    assert num_sent(found) == [48, 32]


def test_two_servers_are_one_endpoint(checkpoint, expected):
    prefill = build_engine(configured(checkpoint, {"role": "prefill"}), compile_ahead=False)
    assert prefill.page_form is not None
    prefill.start()
    try:
        services = [TransferService.of(prefill, prefill.page_form)]
        with served(Front(prefill), services) as address:
            split = {"role": "decode", "peers": [address], "least_tokens": 16}
            found = answers(build_engine(configured(checkpoint, split), compile_ahead=False))
        assert tokens(found) == expected
        assert num_sent(found) == [48, 32]
    finally:
        prefill.stop()


def test_servers_of_other_pages_do_not_work_together(checkpoint, caplog):
    prefill = build_engine(configured(checkpoint, {"role": "prefill"}), compile_ahead=False)
    assert prefill.page_form is not None
    prefill.start()
    try:
        with served(Front(prefill), [TransferService.of(prefill, prefill.page_form)]) as address:
            split = {"role": "decode", "peers": [address], "least_tokens": 16}
            config = configured(checkpoint, split, cache={"page_size": 8})
            found = answers(build_engine(config, compile_ahead=False))
        assert num_sent(found) == [0, 0]
        assert all(len(answer.token_ids) == 6 for answer in found)
    finally:
        prefill.stop()
    assert "cache.page_size on both sides" in caplog.text


def test_devices_that_are_not_there_are_refused_before_weights_are_read(checkpoint):
    split = {"role": "decode", "prefill_tensor": 4, "prefill_stage": 2}
    with pytest.raises(MeshError, match=r"take 8 devices beside the 1 of .mesh., there are 8"):
        build_engine(configured(checkpoint, split))
