"""Prefix caching on a device: what is found is not computed again, and nothing else changes.

Who may share which page is tested in `test_scheduler.py`, against a device that remembers who wrote
what.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from serve.engine import Engine
from serve.request import GenerateRequest, SamplingParams
from tests.serve.harness import (
    DENSE,
    PAGE_SIZE,
    Answer,
    Parts,
    compile_few,
    finish,
    generate,
    greedy,
    make_parts,
    random_prompts,
    random_weights,
)

COMMON, ONE, OTHER = random_prompts(DENSE, (53, 9, 12))
TOLERANCE = 1e-4
"""Of log probabilities: a prompt computed in other rows is summed in another order."""


@pytest.fixture(scope="module")
def parts() -> Parts:
    made = make_parts(DENSE, random_weights(DENSE))
    compile_few(made.runner)
    return made


def apart(parts: Parts, requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """Their tokens where nothing is cached."""
    answers = generate(parts.engine(prefix_caching=False), requests)
    return [answers[request.request_id].token_ids for request in requests]


def num_cached(answer: Answer) -> int:
    usage = answer.outputs[-1].usage
    assert usage is not None
    return usage.cached_tokens


def serve(engine: Engine, request: GenerateRequest) -> Answer:
    return generate(engine, [request])[request.request_id]


def test_prefix_that_was_computed_is_not_computed_again(parts):
    first, second = greedy("first", COMMON + ONE, 8), greedy("second", COMMON + OTHER, 8)
    expected = apart(parts, [first, second])
    engine = parts.engine()
    answers = [serve(engine, request) for request in (first, second)]
    assert [answer.token_ids for answer in answers] == expected
    assert num_cached(answers[0]) == 0
    assert num_cached(answers[1]) == len(COMMON), "full pages, and the common part of the next"
    load = engine.load()
    assert load.prefix_queries == len(COMMON) * 2 + len(ONE) + len(OTHER)
    assert load.prefix_hits == len(COMMON)
    assert load.pages_used == 0


def test_next_turn_of_a_conversation_computes_only_what_is_new(parts):
    engine, conversation = parts.engine(), list(COMMON)
    for turn in range(4):
        request = greedy(str(turn), conversation, 7)
        answer = serve(engine, request)
        # The last token that was chosen has not been computed yet.
        assert num_cached(answer) == (len(conversation) - len(ONE) - 1 if turn else 0)
        conversation += answer.token_ids + ONE
    assert [answer.token_ids] == apart(parts, [request])


def test_same_prompt_again_computes_its_last_token_only(parts):
    engine = parts.engine()
    for length in (PAGE_SIZE * 3, PAGE_SIZE * 3 + 1, PAGE_SIZE * 3 - 1):
        prompt = (ONE + COMMON)[:length]
        answers = [serve(engine, greedy(f"{length} {i}", prompt, 3)) for i in range(2)]
        assert num_cached(answers[1]) == length - 1
        assert answers[0].token_ids == answers[1].token_ids


def test_equal_prompts_that_come_together_are_computed_once(parts):
    requests = [greedy(str(i), COMMON, 6) for i in range(4)]
    engine = parts.engine()
    answers = generate(engine, requests)
    assert [a.token_ids for a in answers.values()] == apart(parts, requests[:1]) * 4
    whole_pages = len(COMMON) // PAGE_SIZE * PAGE_SIZE
    assert sum(map(num_cached, answers.values())) >= 3 * whole_pages


def test_preempted_request_finds_what_it_had_computed(parts):
    requests = [greedy(str(i), (ONE, OTHER)[i] + COMMON, 40) for i in range(2)]
    expected = apart(parts, requests)
    pool = parts.tables.pool
    engine = parts.engine()
    held = pool.allocate(pool.num_free - 11)
    answers = generate(engine, requests)
    assert [answer.token_ids for answer in answers.values()] == expected
    assert engine.load().num_preemptions > 0
    pool.release(held)


@pytest.mark.parametrize("apart_by", ["tenant", "cache_salt"])
def test_other_tenants_and_salts_find_nothing(parts, apart_by):
    engine = parts.engine()
    mine = greedy("mine", COMMON, 3)
    serve(engine, mine)
    others = replace(mine, request_id="other", **{apart_by: "other"})
    assert num_cached(serve(engine, others)) == 0
    assert num_cached(serve(engine, replace(others, request_id="again"))) == len(COMMON) - 1


def test_log_probabilities_of_a_prompt_are_computed_though_it_is_cached(parts):
    request = greedy("first", COMMON, 3, prompt_logprobs=2)
    engine = parts.engine()
    first = serve(engine, request)
    again = serve(engine, replace(request, request_id="again"))
    assert num_cached(again) == 0
    assert len(again.prompt_logprobs) == len(COMMON) - 1
    for one, other in zip(first.prompt_logprobs, again.prompt_logprobs, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
    after = serve(engine, greedy("after", COMMON, 3))
    assert num_cached(after) == len(COMMON) - 1, "what it computed is there for others"


def test_penalties_count_tokens_that_were_found(parts):
    sampling = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "logprobs": 0}
    request = greedy("first", COMMON, 10, **sampling)
    engine = parts.engine()
    first = serve(engine, request)
    again = serve(engine, replace(request, request_id="again"))
    assert first.token_ids == again.token_ids
    plain = serve(engine, greedy("plain", COMMON, 10))
    assert plain.token_ids != first.token_ids, "the penalties must have made a difference"


def test_seeded_samples_are_the_same_with_and_without_the_cache(parts):
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    request = GenerateRequest("first", tuple(COMMON), sampling)
    expected = apart(parts, [request])
    engine = parts.engine()
    answers = [serve(engine, replace(request, request_id=name)) for name in ("a", "b")]
    assert [answer.token_ids for answer in answers] == expected * 2
    assert num_cached(answers[1]) == len(COMMON) - 1


def test_cached_pages_make_room_for_others(parts):
    """Prompts of twice the pool, one after the other."""
    pool = parts.tables.pool
    requests = [
        greedy(str(i), prompt, 2) for i, prompt in enumerate(random_prompts(DENSE, [90] * 22))
    ]
    assert sum(pool.pages_for(92) for _ in requests) > 2 * pool.num_usable
    engine = parts.engine()
    for request in requests:
        assert num_cached(serve(engine, request)) == 0
    assert num_cached(serve(engine, replace(requests[-1], request_id="last"))) == 89
    assert num_cached(serve(engine, replace(requests[0], request_id="first"))) == 0
    assert engine.load().num_preemptions == 0


def test_aborted_prompt_leaves_what_it_has_computed(parts):
    engine = parts.engine()
    engine.submit(greedy("long", COMMON + ONE + COMMON, 3), Answer())
    engine.step()
    engine.abort("long")
    finish(engine)
    computed = parts.limits.token_budget // parts.limits.chunk * parts.limits.chunk
    assert num_cached(serve(engine, greedy("next", COMMON + ONE + COMMON, 3))) == computed


def test_flushed_cache_finds_nothing_and_requests_under_way_go_on(parts):
    [expected] = apart(parts, [greedy("r", COMMON, 20)])
    engine, answer = parts.engine(), Answer()
    engine.submit(greedy("r", COMMON, 20), answer)
    for _ in range(3):
        engine.step()
    assert engine.flush_cache() == 0, "the request's own pages are not free"
    finish(engine)
    assert answer.token_ids == expected
    assert num_cached(serve(engine, greedy("next", COMMON, 20))) == 0
    assert engine.flush_cache() == parts.tables.pool.pages_for(len(COMMON) + 19)


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_shared_pages_of_fewer_bits(cache_dtype):
    parts = make_parts(DENSE, random_weights(DENSE), cache_dtype=cache_dtype)
    compile_few(parts.runner)
    engine = parts.engine()
    first = serve(engine, greedy("first", COMMON, 8, logprobs=0))
    again = serve(engine, greedy("again", COMMON, 8, logprobs=0))
    assert num_cached(again) == len(COMMON) - 1
    found, expected = ([one.logprob for one in a.logprobs] for a in (again, first))
    # What a row computes it sees as the pages hold it, so it is the same from the cache.
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
