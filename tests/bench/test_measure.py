"""The arithmetic of figures, their order, and the comparison of tokens."""

import time
from dataclasses import dataclass, field

import pytest

from bench.measure import Task, batch_rate, busy_s, decode_rate, enter, measure, prefill_rate
from bench.peers.protocol import Answer, Job, Ready
from bench.peers.worker import WorkerError
from bench.report import Workload
from tests.bench.fake_worker import VOCAB_SIZE, generate

ONE = Task(Workload("one", "one stream"), 1, 4, 11, decode_rate)
BATCH = Task(Workload("batch", "three prompts"), 3, 4, 11, batch_rate)


@dataclass
class FakeEngine:
    """In this process; its clock is the fake's, slowed `factors` times job by job."""

    name: str
    factors: tuple[float, ...] = ()
    wrong_from: int | None = None
    ready: Ready = field(default_factory=lambda: Ready("cpu", VOCAB_SIZE, {}, "", 0.0))
    jobs: list[Job] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    dies_at: int | None = None
    """A job that it does not survive."""
    used_s: float = 0.0
    """Both cores of a machine of two, while it works."""

    def ask(self, job: Job) -> Answer:
        if len(self.jobs) == self.dies_at:
            raise WorkerError(f"{self.name} ended with status 9")
        factor = self.factors[len(self.jobs)] if self.factors else 1.0
        self.jobs.append(job)
        self.log.append(self.name)
        answer = generate(job, wrong_from=self.wrong_from)
        self.used_s += 2 * answer.total_s
        return Answer(answer.token_ids, answer.first_s, 1, answer.total_s * factor, answer.margins)

    def cpu_s(self) -> float:
        return self.used_s


def run(*engines: FakeEngine, tasks=(ONE,), runs=3):
    entrants = [enter(engine, tasks) for engine in engines]
    for engine in engines:
        engine.jobs.clear()
        engine.log.clear()
    return measure(entrants, tasks, runs, lambda line: None)


def test_decode_rate_counts_neither_prefill_nor_the_tokens_that_came_with_the_first():
    job = Job([[1]], 128)
    assert decode_rate(job, Answer([[]], first_s=1.0, num_first=1, total_s=3.0)) == 127 / 2
    assert decode_rate(job, Answer([[]], first_s=1.0, num_first=8, total_s=3.0)) == 120 / 2


def test_batch_rate_counts_all_tokens_and_prefill():
    job = Job([[1]] * 16, 128)
    assert batch_rate(job, Answer([[]], first_s=1.0, num_first=1, total_s=4.0)) == 16 * 128 / 4


def test_prefill_rate_is_prompt_tokens_until_the_first_token():
    job = Job([[1] * 1024], 1)
    assert prefill_rate(job, Answer([[]], first_s=2.0, num_first=1, total_s=2.5)) == 512


def test_engines_take_turns_within_each_workload():
    log: list[str] = []
    a, b = FakeEngine("a", log=log), FakeEngine("b", log=log)
    run(a, b, tasks=(ONE, BATCH), runs=2)
    assert log == ["a", "b"] * 4


def test_each_run_has_new_prompts_and_both_engines_get_the_same():
    a, b = FakeEngine("a"), FakeEngine("b")
    enter(a, (ONE,))
    run(b, tasks=(ONE,))
    warmup = a.jobs[0]
    a.jobs.clear()
    run(a, tasks=(ONE,))
    assert a.jobs == b.jobs
    assert len({str(job.prompts) for job in [warmup, *a.jobs]}) == 4
    assert all(0 <= i < VOCAB_SIZE for job in a.jobs for prompt in job.prompts for i in prompt)


def test_samples_are_kept_run_by_run():
    # One second to the first token, one for the ten after it; the total is then slowed.
    found = run(FakeEngine("a", factors=(1.0, 1.0, 1.5, 3.0)), runs=3)
    # The first factor goes to the warm-up, whose jobs `run` forgets, so it is used twice.
    assert found.sides[0].samples == {"one": [10.0, 10.0, 5.0]}


def test_a_peer_that_dies_is_left_out_and_the_others_are_measured():
    dying = FakeEngine("dying", dies_at=4)
    measured = run(FakeEngine("a"), dying, FakeEngine("b"), tasks=(ONE, BATCH))
    assert [side.name for side in measured.sides] == ["a", "b"]
    assert list(measured.agreements) == ["b"]
    assert measured.failures == {"dying": "dying ended with status 9"}


def test_a_peer_that_dies_when_asked_for_margins_is_left_out_too():
    dying = FakeEngine("dying", wrong_from=7, dies_at=3)
    measured = run(FakeEngine("a"), dying, FakeEngine("b"))
    assert [side.name for side in measured.sides] == ["a", "b"]
    assert list(measured.agreements) == ["b"]
    assert measured.failures == {"dying": "dying ended with status 9"}


@pytest.mark.parametrize("job", [2, 3])
def test_nothing_is_measured_without_the_first(job):
    with pytest.raises(WorkerError, match="ours ended"):
        run(FakeEngine("ours", dies_at=job), FakeEngine("b", wrong_from=7))


def test_equal_tokens_agree():
    found = run(FakeEngine("a"), FakeEngine("b"), tasks=(ONE, BATCH), runs=2)
    agreement = found.agreements["b"]
    assert (agreement.num_equal, agreement.num_prompts) == (8, 8)
    assert agreement.differences == []


def test_disagreement_names_the_first_place_and_its_margins():
    ours, peer = FakeEngine("a"), FakeEngine("b", wrong_from=7)
    agreement = run(ours, peer, tasks=(BATCH,), runs=2).agreements["b"]
    assert (agreement.num_equal, agreement.num_prompts) == (0, 6)
    (difference,) = agreement.differences
    assert (difference.workload, difference.run, difference.prompt) == ("batch", 1, 0)
    assert difference.position == 7
    assert difference.peer_id == difference.our_id + 1
    assert (difference.our_margin, difference.peer_margin) == (0.25, 0.25)
    assert peer.jobs[-1].margins, "the job is done again, untimed, for its margins"


def test_answers_of_unequal_length_are_refused():
    class Short(FakeEngine):
        def ask(self, job: Job) -> Answer:
            return super().ask(Job(job.prompts, job.num_tokens - 1))

    with pytest.raises(ValueError, match="made 11 tokens and b 10 of 11"):
        run(FakeEngine("a"), Short("b"))


def test_what_others_use_of_the_processor_is_reported_per_engine():
    quiet, busy = FakeEngine("a"), FakeEngine("b")
    entrants = [enter(engine, [ONE]) for engine in (quiet, busy)]

    def busy_s() -> float:
        """Somebody uses half a core whenever b is timed, which takes two seconds a job."""
        return quiet.used_s + busy.used_s + 1.0 * len(busy.jobs)

    found = measure(entrants, [ONE], 3, lambda line: None, busy_s)
    assert [side.other_cores for side in found.sides] == [0.0, 0.5]


def test_time_in_use_of_the_cores_covers_our_own():
    before_s, own_before_s = busy_s(), time.process_time()
    while time.process_time() - own_before_s < 0.1:
        pass
    # /proc/stat counts in hundredths of a second, each core by itself.
    assert busy_s() - before_s > 0.05
