"""Tiers of a configuration: what one server left on the disk the next one finds."""

import shutil
import time

import pytest

from cache.tiers.worth import Worth
from serve.build import build_engine
from serve.config import ConfigError
from tests.serve.harness import Answer, greedy
from tests.serve.test_build import MODEL, configure
from tools.random_checkpoint import write_random_checkpoint

TIMEOUT_S = 60
PROMPT = [3 + i % 90 for i in range(50)]
NUM_FULL = 48
"""Tokens of its full pages."""
SCHEDULE = {"max_batch": 2, "token_budget": 32, "chunk": 16, "max_steps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, MODEL, "bfloat16")
    return directory


@pytest.fixture(autouse=True)
def _slow_device(monkeypatch):
    """On which computing always takes longer than any tier."""
    monkeypatch.setattr(Worth, "recompute_s", lambda self, costs: [cost * 10 for cost in costs])
    monkeypatch.setattr(Worth, "decide", lambda self, num_pages, tier, recompute_s: True)


def configured(checkpoint, folder, model=None, cache=None, **tiers):
    store = {"name": "disk", "url": folder.as_uri(), "gib": 0.01}
    return configure(
        checkpoint,
        model=model or {"dtype": "float32"},
        schedule=SCHEDULE,
        cache={"pages": 8} | (cache or {}),
        tiers={"host_gib": 0.01, "stores": [store]} | tiers,
    )


def serve(config, prompts, num_listed=0):
    """Answers of a server that is started and stopped for them, one after the other, once its disk
    has told of `num_listed` pages."""
    engine = build_engine(config, compile_ahead=False)
    engine.start()
    try:
        deadline_s = time.monotonic() + TIMEOUT_S
        while num_seen(engine.tiers()[1]) < num_listed:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        answers = [Answer() for _ in prompts]
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            engine.submit(greedy(str(i), prompt, 4), answer)
            assert engine.wait_idle(TIMEOUT_S)
    finally:
        engine.stop()
    return answers, engine.tiers()


def num_seen(tier):
    """Pages that were there when it was listed: the first are read at once, to know how fast it is,
    and let go if they are damaged."""
    return tier.num_pages + tier.counts.misses.total()


def usage(answer):
    return answer.outputs[-1].usage


@pytest.mark.parametrize("write_through", [True, False])
def test_a_restarted_server_finds_its_disk_again(checkpoint, tmp_path, write_through):
    config = configured(checkpoint, tmp_path / "pages", write_through=write_through)
    others = [[5 + (i * j) % 90 for i in range(50)] for j in (7, 11)]
    [first, *_], tiers = serve(config, [PROMPT, *others])
    assert usage(first).fetched_tokens == {}
    assert [tier.name for tier in tiers] == ["host", "disk"]
    [again], [_, disk] = serve(config, [PROMPT], num_listed=3)
    assert again.token_ids == first.token_ids
    assert usage(again).cached_tokens == NUM_FULL
    assert usage(again).fetched_tokens == {"disk": NUM_FULL}
    assert disk.counts.hits >= 3


@pytest.mark.parametrize(
    "changes",
    [{"cache": {"page_size": 8}}, {"cache": {"dtype": "bfloat16"}}, {"model": {"dtype": "auto"}}],
)
def test_pages_of_another_size_or_type_are_not_read(checkpoint, tmp_path, changes):
    """Also not what was computed in another data type: the checkpoint's own, bfloat16."""
    serve(configured(checkpoint, tmp_path / "pages", write_through=True), [PROMPT])
    other = configured(checkpoint, tmp_path / "pages", **changes)
    [answer], [_, disk] = serve(other, [PROMPT])
    assert usage(answer).cached_tokens == 0
    assert disk.counts.hits == 0


def test_pages_of_another_model_are_not_read(checkpoint, tmp_path):
    serve(configured(checkpoint, tmp_path / "pages", write_through=True), [PROMPT])
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    write_random_checkpoint(other / "new", MODEL, "bfloat16", seed=1)
    shutil.copyfile(other / "new" / "model.safetensors", other / "model.safetensors")
    shutil.rmtree(other / "new")
    [answer], _ = serve(configured(other, tmp_path / "pages"), [PROMPT])
    assert usage(answer).cached_tokens == 0


def test_a_store_that_cannot_be_is_refused_before_weights_are_read(checkpoint, tmp_path):
    config = configured(checkpoint, tmp_path)
    store = config.tiers.stores[0].model_copy(update={"url": "ftp://example/pages"})
    tiers = config.tiers.model_copy(update={"stores": [store]})
    with pytest.raises(ConfigError, match=r"tiers.stores, disk: there is no store at 'ftp://"):
        build_engine(config.model_copy(update={"tiers": tiers}))


def test_a_damaged_page_is_computed_again(checkpoint, tmp_path):
    config = configured(checkpoint, tmp_path / "pages", write_through=True)
    [first], _ = serve(config, [PROMPT])
    records = [path for path in (tmp_path / "pages").rglob("*") if path.stat().st_size > 4096]
    assert len(records) == 3
    for path in records:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    [again], [_, disk] = serve(config, [PROMPT], num_listed=3)
    assert again.token_ids == first.token_ids
    assert usage(again).cached_tokens == 0
    assert disk.counts.misses["corrupt"] >= 1
