"""One engine from request to tokens, against the float64 reference and against itself."""

import logging
import random
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod

import jax
import numpy as np
import pytest

from serve.errors import DuplicateRequest, InvalidRequest, Overloaded, Unavailable
from serve.profile import Kind, Phase
from serve.request import FinishReason, GenerateRequest, SamplingParams
from tests.model.reference import softmax
from tests.serve import harness
from tests.serve.harness import (
    DENSE,
    Answer,
    assert_greedy,
    finish,
    generate,
    greedy,
    make_parts,
    next_logits,
    random_prompts,
    random_weights,
)

MODEL = replace(DENSE, layers=DENSE.layers[:2])
LIMITS = replace(harness.LIMITS, token_budget=32)
TIMEOUT_S = 60

# Float32 moves these logits by less.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def warm():
    """Compiled once, and served by an engine of each test's own."""
    parts = make_parts(MODEL, random_weights(MODEL), limits=LIMITS)
    parts.runner.compile_all()
    return parts


@pytest.fixture
def parts(warm):
    yield warm
    assert warm.tables.pool.num_used == 0, "every test gives its pages back"


@contextmanager
def few_pages(parts, num_pages):
    """The pool with all but `num_pages` of its pages in others' hands."""
    pool = parts.tables.pool
    held = pool.allocate(pool.num_free - num_pages)
    yield
    pool.release(held)


@contextmanager
def compilations():
    """The programs that XLA compiles meanwhile, as JAX itself reports them."""
    seen = []

    def listen(event, duration_s, **_):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def prompt_of(length, seed=0):
    return random_prompts(MODEL, [length], seed)[0]


def sampled(request_id, prompt, max_tokens, **sampling):
    params = {"ignore_eos": True} | sampling
    return GenerateRequest(
        request_id, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params)
    )


def answer_to(parts, request, **limits):
    return generate(parts.engine(**limits), [request])[request.request_id]


def submit_all(engine, requests):
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.submit(request, answers[request.request_id])
    return answers


def assert_chosen(logits_V, token):
    """`token` is the best of `logits_V`, and by more than rounding."""
    second, best = np.sort(logits_V)[-2:]
    assert token == logits_V.argmax()
    assert best - second > TOLERANCE, "left to rounding; change the prompt"


def join_and_leave(engine, requests, rng):
    """Submits all `requests` and aborts some, at random times; their answers by id."""
    answers, coming = {}, list(requests)
    while coming or not engine.wait_idle(0):
        for _ in range(min(rng.choice([0, 0, 1, 1, 2, 5]), len(coming))):
            request = coming.pop()
            answers[request.request_id] = Answer()
            engine.submit(request, answers[request.request_id])
        if rng.random() < 0.1:
            engine.abort(rng.choice(list(answers) or [""]))
        engine.step()
    return answers


# The workload comes first: no other test has warmed up what it needs.


def random_requests(num, seed=1):
    rng = random.Random(seed)
    prompts = random_prompts(MODEL, [rng.choice([1, 5, 16, 17, 40, 70]) for _ in range(num)], seed)
    requests = []
    for i, prompt in enumerate(prompts):
        params = {"temperature": 0.0}
        if i % 4 == 3:
            params = {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": i}
        if i % 8 == 7:
            params |= {"repetition_penalty": 1.2, "logprobs": 3, "prompt_logprobs": 2}
        requests.append(sampled(str(i), prompt, rng.randint(1, 20), **params))
    return requests


def test_nothing_compiles_after_warm_up(warm):
    engine = warm.engine()
    with compilations() as seen:
        join_and_leave(engine, random_requests(40), random.Random(2))
    assert not seen
    assert engine.load().compiles_after_warmup == 0
    with compilations() as seen:
        jax.jit(lambda x: x + len(seen))(1)
    assert seen, "the listener hears of compilations"


def test_greedy_output_does_not_depend_on_neighbours_that_join_and_leave(parts):
    requests = random_requests(64)
    together = join_and_leave(parts.engine(), requests, random.Random(3))
    reasons = Counter(answer.finish_reason for answer in together.values())
    assert reasons[FinishReason.CANCELLED] > 5
    assert reasons[FinishReason.LENGTH] > 30
    for request in requests:
        if request.sampling.temperature:
            continue  # a neighbour only
        alone = answer_to(parts, request).token_ids
        assert len(alone) == request.sampling.max_tokens
        assert_greedy(MODEL, parts.weights, request.prompt_ids, alone, margin=TOLERANCE)
        answer = together[request.request_id]
        if answer.finish_reason is FinishReason.LENGTH:
            assert answer.token_ids == alone
        else:
            assert answer.token_ids == alone[: len(answer.token_ids)]


def test_many_steps_in_one_call_choose_the_tokens_of_single_steps(parts):
    requests = [greedy(str(i), prompt_of(length, i), 21) for i, length in enumerate((3, 40, 17))]
    requests.append(sampled("drawn", prompt_of(9), 19, seed=7, frequency_penalty=0.5))
    many = generate(parts.engine(), requests)
    single = generate(parts.engine(max_steps=1), requests)
    assert {id_: a.token_ids for id_, a in many.items()} == {
        id_: a.token_ids for id_, a in single.items()
    }
    assert max(len(output.token_ids) for output in many["0"].outputs) == LIMITS.max_steps
    assert max(len(output.token_ids) for output in single["0"].outputs) == 1


def test_prompt_in_narrow_rows_beside_decode_changes_no_output(parts):
    """On a clock that stands still no step may take more than the least."""
    stream, long = greedy("stream", prompt_of(5), 60), greedy("long", prompt_of(90, 1), 9)
    paced = make_parts(MODEL, parts.weights, limits=replace(LIMITS, max_slowdown=2.0))
    engine = paced.engine()
    answers = submit_all(engine, [stream])
    while not answers["stream"].outputs:
        engine.step()
    answers |= submit_all(engine, [long])
    finish(engine)
    shapes = Counter(step.work.shape for step in engine.profiles[0].steps())
    assert shapes["4 decode x 1 + 1 prefill x 4"] >= 60 / 4
    for request in (stream, long):
        alone = answer_to(parts, request).token_ids
        assert answers[request.request_id].token_ids == alone


def test_preemption_changes_no_output(parts):
    requests = [
        greedy(str(i), prompt_of(40, i), 40, prompt_logprobs=1, presence_penalty=0.3 * i)
        for i in range(6)
    ]
    unhurried = generate(parts.engine(), requests)
    engine = parts.engine()
    with few_pages(parts, 9):
        pressed = generate(engine, requests)
    assert engine.load().num_preemptions > 0
    assert sum(a.outputs[-1].timings.num_preemptions for a in pressed.values()) > 0
    for request in requests:
        expected, found = unhurried[request.request_id], pressed[request.request_id]
        assert found.token_ids == expected.token_ids
        assert [p.token_id for p in found.prompt_logprobs] == list(request.prompt_ids[1:])
        assert found.outputs[-1].usage == expected.outputs[-1].usage


# How tokens are chosen.


def test_same_seed_gives_the_same_tokens_alone_and_among_others(parts):
    request = sampled("one", prompt_of(20), 24, temperature=3.0, top_p=0.95, seed=11)
    alone = answer_to(parts, request).token_ids
    others = [sampled(f"other {i}", prompt_of(33, i), 15 + i, temperature=2.0) for i in range(6)]
    among = generate(parts.engine(), [*others[:3], request, *others[3:]])["one"].token_ids
    assert among == alone
    assert answer_to(parts, request, max_steps=1).token_ids == alone


def test_different_seeds_give_different_tokens(parts):
    requests = [
        sampled(str(seed), prompt_of(20), 24, temperature=3.0, seed=seed)
        for seed in (0, 1, 2**32, 2**32 + 1, 2**63 - 1)
    ]
    answers = generate(parts.engine(), requests)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == len(requests)


def test_requests_without_a_seed_differ(parts):
    requests = [sampled(str(i), prompt_of(20), 24, temperature=3.0) for i in range(3)]
    answers = generate(parts.engine(), requests)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == len(requests)


def probabilities(logits_V, sampling):
    """What each token's chance should be: softmax, then top-k, top-p of the rest, and min-p."""
    p_V = softmax(logits_V / sampling.temperature)
    kept = np.argsort(-p_V)[: sampling.top_k or None]
    mass = np.cumsum(p_V[kept]) / p_V[kept].sum()
    kept = kept[: np.searchsorted(mass, sampling.top_p) + 1]
    kept = kept[p_V[kept] >= sampling.min_p * p_V.max()]
    chances_V = np.zeros_like(p_V)
    chances_V[kept] = p_V[kept] / p_V[kept].sum()
    return chances_V


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 2.0},
        {"temperature": 5.0, "top_k": 6},
        {"temperature": 3.0, "top_p": 0.7},
        {"temperature": 4.0, "min_p": 0.15},
        {"temperature": 6.0, "top_k": 30, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(parts, params):
    num_draws, prompt = 400, prompt_of(12)
    requests = [sampled(str(seed), prompt, 1, seed=seed, **params) for seed in range(num_draws)]
    answers = generate(parts.engine(max_queue=num_draws), requests)
    counts_V = np.bincount([a.token_ids[0] for a in answers.values()], minlength=MODEL.vocab_size)
    (logits_V,) = next_logits(MODEL, parts.weights, prompt, [0])
    expected_V = probabilities(logits_V, requests[0].sampling)
    assert not counts_V[expected_V == 0].any()
    # Half the sum of differences; chance alone gives 0.04 to 0.13 at these supports.
    assert np.abs(counts_V / num_draws - expected_V).sum() / 2 < 0.15


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.5),
        ("repetition_penalty", 0.8),
        ("presence_penalty", 2.0),
        ("frequency_penalty", 1.5),
        ("frequency_penalty", -2.0),
    ],
)
def test_penalties_move_logits_as_their_definitions_say(parts, name, value):
    prompt = prompt_of(30)
    tokens = answer_to(parts, greedy("r", prompt, 30, **{name: value})).token_ids
    found = next_logits(MODEL, parts.weights, prompt, tokens)
    for at, (logits_V, token) in enumerate(zip(found, tokens, strict=True)):
        counts_V = np.bincount(tokens[:at], minlength=MODEL.vocab_size)
        if name == "repetition_penalty":
            seen = list({*prompt, *tokens[:at]})
            kept = logits_V[seen]
            logits_V[seen] = np.where(kept > 0, kept / value, kept * value)
        if name == "presence_penalty":
            logits_V -= value * (counts_V > 0)
        if name == "frequency_penalty":
            logits_V -= value * counts_V
        assert_chosen(logits_V, token)
    assert tokens != answer_to(parts, greedy("r", prompt, 30)).token_ids, "the penalty matters"


def test_request_ends_with_its_first_stop_id(parts):
    prompt = prompt_of(10)
    natural = answer_to(parts, greedy("r", prompt, 24)).token_ids
    stop = natural[6]
    answer = answer_to(parts, greedy("r", prompt, 24, stop_token_ids=(stop, 1)))
    assert answer.token_ids == natural[: natural.index(stop) + 1]
    assert answer.finish_reason is FinishReason.STOP


def test_end_of_sequence_ends_a_request_unless_it_ignores_it(parts):
    prompt = prompt_of(10)
    natural = answer_to(parts, greedy("r", prompt, 24)).token_ids
    parts = replace(parts, config=replace(MODEL, eos_ids=(natural[9],)))
    answer = answer_to(parts, greedy("r", prompt, 24, ignore_eos=False))
    assert answer.token_ids == natural[: natural.index(natural[9]) + 1]
    assert answer.finish_reason is FinishReason.STOP
    answer = answer_to(parts, greedy("r", prompt, 24, ignore_eos=True))
    assert answer.token_ids == natural
    assert answer.finish_reason is FinishReason.LENGTH


def test_no_end_id_is_chosen_before_min_tokens(parts):
    prompt, least = prompt_of(10), 12
    natural = answer_to(parts, greedy("r", prompt, 24)).token_ids
    stop = natural[3]
    request = greedy("r", prompt, 24, stop_token_ids=(stop,), min_tokens=least)
    tokens = answer_to(parts, request).token_ids
    assert len(tokens) > least
    assert stop not in tokens[:least]
    for at, logits_V in enumerate(next_logits(MODEL, parts.weights, prompt, tokens)):
        if at < least:
            logits_V[stop] = -np.inf
        assert_chosen(logits_V, tokens[at])


def log_softmax(logits):
    return np.log(softmax(logits))


def assert_logprobs(found, tokens, expected_TV, num_top):
    assert [one.token_id for one in found] == list(tokens)
    for one, expected_V in zip(found, expected_TV, strict=True):
        assert one.logprob == pytest.approx(expected_V[one.token_id], abs=2 * TOLERANCE)
        assert len(one.top_ids) == len(set(one.top_ids)) == num_top
        best = np.sort(expected_V)[::-1][:num_top]
        np.testing.assert_allclose(one.top_logprobs, best, rtol=0, atol=2 * TOLERANCE)
        of_ids = expected_V[list(one.top_ids)]
        np.testing.assert_allclose(one.top_logprobs, of_ids, rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_those_of_the_reference_before_temperature(parts, num_top):
    prompt = prompt_of(10)
    request = sampled("r", prompt, 10, temperature=2.5, seed=3, logprobs=num_top)
    neighbour = greedy("n", prompt_of(20, 1), 10)
    answers = generate(parts.engine(), [neighbour, request])
    tokens = answers["r"].token_ids
    expected = log_softmax(next_logits(MODEL, parts.weights, prompt, tokens))
    assert_logprobs(answers["r"].logprobs, tokens, expected, num_top)
    assert not answers["n"].logprobs


@pytest.mark.parametrize("length", [1, 2, 16, 17, 70])
def test_prompt_logprobs_are_those_of_the_reference_over_all_chunks(parts, length):
    prompt = prompt_of(length)
    request = greedy("r", prompt, 6, prompt_logprobs=4)
    neighbour = greedy("n", prompt_of(40, 1), 6)
    answers = generate(parts.engine(), [neighbour, request])
    expected = log_softmax(next_logits(MODEL, parts.weights, prompt[:1], [*prompt[1:], 0]))[:-1]
    assert_logprobs(answers["r"].prompt_logprobs, prompt[1:], expected, 4)
    assert sum(bool(output.prompt_logprobs) for output in answers["r"].outputs) == (length > 1)
    assert not answers["n"].prompt_logprobs


# What a step costs.


def page_arrays(parts):
    """How many arrays of pages there are, and the elements of each."""
    cache, config = parts.runner.programs.cache, parts.config
    elements = cache.num_pages * cache.page_size * config.num_kv_heads * config.head_dim
    return 2 * config.num_layers, elements


def programs(parts):
    runner = parts.runner
    return [(shape, runner._compiled[shape]) for shape in runner.shapes]


def test_every_step_writes_its_pages_in_place(parts):
    num_arrays, elements = page_arrays(parts)
    for shape, program in programs(parts):
        aliased = program.memory_analysis().alias_size_in_bytes
        assert aliased >= num_arrays * elements * 4, shape


def test_no_decode_step_copies_an_array_of_pages(parts):
    _, elements = page_arrays(parts)
    for shape, program in programs(parts):
        if not shape.num_chunks:
            assert largest_copy(program) < elements, shape


def largest_copy(program) -> int:
    """Its numbers."""
    copies = re.findall(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", program.as_text())
    return max((prod(int(n) for n in dims.split(",") if n) for dims in copies), default=0)


def test_steps_of_a_model_with_one_kv_head_copy_no_array_of_pages_either():
    model = replace(MODEL, num_kv_heads=1)
    one_head = make_parts(model, random_weights(model), limits=LIMITS, num_pages=512)
    _, elements = page_arrays(one_head)
    runner = one_head.runner
    for shape in (shape for shape in runner.shapes if shape.num_decode == 4):
        if shape.num_chunks <= 1:
            lowered = runner.programs.jit_step(shape).lower(
                *runner.programs.abstract_arguments(shape)
            )
            assert largest_copy(lowered.compile()) < elements, shape


def timed(engine):
    """The engine's profile, on a clock that moves."""
    engine.profiles[0].clock = time.perf_counter
    return engine.profiles[0]


def test_every_step_is_timed_in_all_its_phases(parts):
    engine = parts.engine()
    profile = timed(engine)
    generate(engine, [greedy(str(i), prompt_of(40, i), 9) for i in range(3)])
    steps = profile.steps()
    assert profile.num_steps == len(steps) > 4
    for step in steps:
        assert set(step.spans) == set(Phase) - {Phase.COMPILE}
        assert step.gap is None or step.gap.least_s <= step.gap.most_s
    kinds = [step.work.kind for step in steps]
    assert kinds[0] is Kind.PREFILL
    assert kinds[-1] is Kind.LOOP
    assert steps[0].work.num_tokens == LIMITS.token_budget
    assert steps[-1].work.shape == "4 decode x 4"


def test_next_step_is_dispatched_before_the_last_is_waited_for(parts):
    engine = parts.engine()
    profile = timed(engine)
    generate(engine, [greedy("r", prompt_of(5), 60)])
    for last, step in pairwise(profile.steps()):
        assert step.spans[Phase.DISPATCH][1] <= last.spans[Phase.DEVICE][0]


def test_compiling_late_is_a_phase_of_its_step(warm):
    cold = make_parts(MODEL, warm.weights, limits=LIMITS)
    cold.runner.shapes = cold.runner.shapes[-1:]
    engine = cold.engine(max_steps=1)
    generate(engine, [greedy("r", prompt_of(5), 3)])
    compiling = [Phase.COMPILE in step.spans for step in engine.profiles[0].steps()]
    assert compiling == [True, False, False]


def test_requests_are_timed_from_their_arrival(parts):
    engine = parts.engine()
    requests = [greedy(str(i), prompt_of(20, i), 9) for i in range(3)]
    answers = submit_all(engine, [*requests, greedy("cancelled", prompt_of(5), 50)])
    engine.step()
    engine.abort("cancelled")
    finish(engine)
    counts = {one.name: sum(one.histogram.counts) for one in engine.series()}
    num_first = sum(len(answers[r.request_id].outputs[0].token_ids) for r in requests)
    assert counts["time_to_first_token_seconds"] == 3
    assert counts["inter_token_latency_seconds"] == 3 * 9 - num_first
    assert counts["e2e_request_latency_seconds"] == 3


# Comings and goings.


def test_abort_frees_pages_and_slot_at_once_and_is_told_within_a_step(parts):
    engine = parts.engine()
    answers = {str(i): Answer() for i in range(5)}
    for i, answer in answers.items():
        engine.submit(greedy(i, prompt_of(30), 50), answer)
    for _ in range(6):
        engine.step()
    assert (engine.load().num_running, engine.load().num_waiting) == (4, 1)
    held = engine.load().pages_used
    engine.abort("1")
    assert engine.load().num_running == 3
    assert engine.load().pages_used < held
    engine.step()
    assert answers["1"].finish_reason is FinishReason.CANCELLED
    assert (engine.load().num_running, engine.load().num_waiting) == (4, 0)
    for i in answers:
        engine.abort(i)
    engine.abort("nobody")
    assert engine.load().num_running == engine.load().pages_used == 0
    finish(engine)
    assert {a.finish_reason for a in answers.values()} == {FinishReason.CANCELLED}


def test_aborted_while_waiting_it_leaves_the_queue(parts):
    engine = parts.engine(max_queue=2)
    answers = [Answer(), Answer(), Answer()]
    engine.submit(greedy("a", prompt_of(5), 5), answers[0])
    engine.submit(greedy("b", prompt_of(5), 5), answers[1])
    engine.abort("a")
    assert engine.load().num_waiting == 1
    engine.submit(greedy("c", prompt_of(5), 5), answers[2])
    finish(engine)
    reasons = [answer.finish_reason for answer in answers]
    assert reasons == [FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.LENGTH]


class Interrupting:
    """A runner to which something happens just before a step is submitted."""

    def __init__(self, runner, happens):
        self._runner, self._happens = runner, happens

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def submit(self, packed, step):
        self._happens(packed.plan)
        return self._runner.submit(packed, step)


def test_request_may_be_aborted_between_plan_and_step(parts):
    def abort_admitted(plan):
        for sequence in plan.admitted:
            if sequence.request.request_id != "kept":
                engine.abort(sequence.request.request_id)

    engine = parts.engine(Interrupting(parts.runner, abort_admitted))
    requests = [greedy(i, prompt_of(20), 8) for i in ("one", "kept", "two")]
    answers = generate(engine, requests)
    assert answers["one"].finish_reason is FinishReason.CANCELLED
    assert answers["kept"].token_ids == answer_to(parts, requests[1]).token_ids


def test_id_of_a_request_under_way_is_refused_and_may_be_used_again_after(parts):
    engine, first, second = parts.engine(), Answer(), Answer()
    request = greedy("same", prompt_of(5), 6)
    engine.submit(request, first)
    with pytest.raises(DuplicateRequest, match="'same' is being served; choose another"):
        engine.submit(request, second)
    engine.step()
    engine.abort("same")
    with pytest.raises(DuplicateRequest, match="'same'"):
        engine.submit(request, second)  # the first has yet to be told that it ended
    engine.step()
    assert first.finish_reason is FinishReason.CANCELLED
    engine.submit(request, second)
    finish(engine)
    assert second.finish_reason is FinishReason.LENGTH


def test_queue_of_ten_takes_ten_of_a_hundred_and_serves_them(parts):
    engine = parts.engine(max_queue=10)
    answers = submit_all(engine, [greedy(str(i), prompt_of(4), 4) for i in range(10)])
    for i in range(10, 100):
        with pytest.raises(Overloaded, match=r"holds 10 requests, schedule.max_queue allows 10"):
            engine.submit(greedy(str(i), prompt_of(4), 4), Answer())
    finish(engine)
    assert {a.finish_reason for a in answers.values()} == {FinishReason.LENGTH}
    assert engine.load().num_finished == 10
    engine.submit(greedy("later", prompt_of(4), 4), Answer())
    finish(engine)


@pytest.mark.parametrize("token", [-1, MODEL.vocab_size])
def test_prompt_ids_outside_the_vocabulary_are_refused(parts, token):
    with pytest.raises(InvalidRequest, match=f"{token} is outside .* 0 to {MODEL.vocab_size - 1}"):
        parts.engine().submit(greedy("r", [3, token], 4), Answer())


def test_request_of_more_pages_than_there_are_is_refused_with_what_to_change(parts):
    small = make_parts(MODEL, parts.weights, limits=LIMITS, num_pages=3)
    with pytest.raises(InvalidRequest, match=r"needs 3 pages for 40 tokens, .* raise cache.pages"):
        small.engine().submit(greedy("r", prompt_of(10), 30), Answer())


# The engine on its own thread.


def test_draining_engine_finishes_what_it_has_and_refuses_more(parts):
    engine = parts.engine()
    answers = submit_all(engine, [greedy(str(i), prompt_of(20), 12) for i in range(6)])
    engine.start()
    engine.drain()
    with pytest.raises(Unavailable, match="draining; send the request to another replica"):
        engine.submit(greedy("late", prompt_of(5), 5), Answer())
    assert engine.wait_idle(TIMEOUT_S)
    assert {a.finish_reason for a in answers.values()} == {FinishReason.LENGTH}
    assert engine.load().draining
    engine.stop()


def test_stop_cancels_what_runs_and_what_waits(parts):
    engine, started = parts.engine(), threading.Event()

    def wait_for_stop(output):
        started.set()
        while not engine.load().draining:
            time.sleep(0.001)

    engine.submit(greedy("first", prompt_of(2), 100), wait_for_stop)
    answers = submit_all(engine, [greedy(str(i), prompt_of(20), 100) for i in range(6)])
    engine.start()
    assert started.wait(TIMEOUT_S)
    engine.stop()
    assert {a.finish_reason for a in answers.values()} == {FinishReason.CANCELLED}
    assert engine.wait_idle(0)
    with pytest.raises(Unavailable):
        engine.submit(greedy("late", prompt_of(5), 5), Answer())


def test_failure_of_the_bookkeeping_itself_is_told_to_all(parts, monkeypatch):
    engine = parts.engine()
    answers = submit_all(engine, [greedy(str(i), prompt_of(20), 60) for i in range(3)])

    def broken(*_):
        raise RuntimeError("books are wrong")

    with monkeypatch.context() as patched:
        patched.setattr(engine._scheduler, "schedule", broken)
        patched.setattr(engine._scheduler, "abort", broken)
        engine.start()
        assert engine.wait_idle(TIMEOUT_S)
    assert {answer.finish_reason for answer in answers.values()} == {FinishReason.ERROR}
    engine.stop()
    for i in range(3):
        engine._scheduler.abort(str(i), 0.0)


def test_failure_ends_every_request_and_is_told_to_those_who_come_after(parts, caplog):
    steps = iter(range(100))

    def fail_at_third_step(plan):
        if next(steps) == 2:
            raise RuntimeError("device lost")

    engine = parts.engine(Interrupting(parts.runner, fail_at_third_step))
    answers = submit_all(engine, [greedy(str(i), prompt_of(20), 60) for i in range(6)])
    with caplog.at_level(logging.CRITICAL, "weft"):
        engine.start()
        assert engine.wait_idle(TIMEOUT_S)
    for answer in answers.values():
        assert answer.finish_reason is FinishReason.ERROR
        assert "device lost" in answer.outputs[-1].error
    with pytest.raises(Unavailable, match="the engine has failed: device lost"):
        engine.submit(greedy("late", prompt_of(5), 5), Answer())
    assert isinstance(engine.failure, RuntimeError)
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.pages_used) == (0, 0, 0)
    engine.stop()
    for i in range(LIMITS.max_batch):  # the pool outlives this engine, for the other tests
        parts.tables.free(i)


def test_aborts_from_many_threads_leave_the_engine_whole(parts):
    engine, num_threads = parts.engine(), 4
    answers = {}

    def clients(n):
        for i in range(40):
            request_id = f"{n}.{i}"
            answers[request_id] = answer = Answer()
            engine.submit(greedy(request_id, prompt_of(3), 60), answer)
            # Whenever the first tokens come, the next are on their way.
            while not answer.outputs:
                pass
            engine.abort(request_id)

    threads = [threading.Thread(target=clients, args=(n,)) for n in range(num_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads meet at every line
    try:
        engine.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.wait_idle(TIMEOUT_S)
    finally:
        sys.setswitchinterval(interval)
        engine.stop()
    assert engine.failure is None
    expected = answer_to(parts, greedy("alone", prompt_of(3), 60)).token_ids
    for answer in answers.values():
        assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.CANCELLED)
        assert answer.token_ids == expected[: len(answer.token_ids)]
