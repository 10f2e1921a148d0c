"""Deadlines against a dict that is looked through."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from cache.contexts.deadlines import SLACK, Deadlines

KEYS = st.binary(min_size=1, max_size=1)
TIMES = st.integers(0, 20).map(float)


@given(st.lists(st.tuples(st.sampled_from(["set", "remove", "take"]), KEYS, TIMES)))
def test_what_is_due_is_what_a_look_at_all_would_find(steps):
    deadlines, expected = Deadlines[bytes](), {}
    for step, key, time_s in steps:
        if step == "set":
            deadlines.set(key, time_s)
            expected[key] = time_s
        elif step == "remove" and key in expected:
            deadlines.remove(key)
            del expected[key]
        elif step == "take":
            due = deadlines.take_due(time_s)
            found = sorted((due_s, key) for key, due_s in expected.items() if due_s <= time_s)
            assert due == [key for _, key in found]
            for key in due:
                del expected[key]
        assert len(deadlines) == len(expected)
        assert deadlines.get(key) == expected.get(key)


def test_the_earliest_comes_first_after_many_changes():
    deadlines, random = Deadlines[bytes](), Random(0)
    due_s = {}
    for _ in range(2000):
        key = random.randbytes(1)
        due_s[key] = random.random()
        deadlines.set(key, due_s[key])
    expected = sorted(due_s, key=due_s.__getitem__)
    assert deadlines.take_due(0.5) + deadlines.take_due(1.0) == expected


def test_what_is_set_again_and_again_takes_no_more_room():
    deadlines = Deadlines[bytes]()
    for i in range(10_000):
        deadlines.set(b"a", float(i))
    assert len(deadlines._heap) <= SLACK + 2
    assert deadlines.take_due(9998.0) == []
    assert deadlines.take_due(9999.0) == [b"a"]
