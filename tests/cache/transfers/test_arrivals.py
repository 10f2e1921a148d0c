"""The waiting side of a transfer, moved by hand."""

from cache.transfers.arrivals import Arrivals

KEYS = [bytes([number]) * 16 for number in range(3)]


class Carrier:
    """What arrivals say to it."""

    def __init__(self) -> None:
        self.num_wakes = self.num_overs = 0
        self.taken: list[int] = []
        self.now_s = 0.0

    def wake(self) -> None:
        self.num_wakes += 1

    def over(self) -> None:
        self.num_overs += 1

    def arrivals(self, lease_s: float = 10.0) -> Arrivals:
        return Arrivals(
            KEYS, self.wake, self.taken.append, self.over, lease_s, clock=lambda: self.now_s
        )


def test_pages_come_in_order_and_the_last_ends_it():
    carrier = Carrier()
    arrivals = carrier.arrivals()
    arrivals.accept("ab")
    assert arrivals.take(1) == [(KEYS[0], "a")]
    assert arrivals.take(9) == [(KEYS[1], "b")]
    assert not arrivals.done()
    arrivals.accept("c")
    assert arrivals.done()
    assert arrivals.take(9) == [(KEYS[2], "c")]
    assert carrier.taken == [1, 2, 3]
    assert (carrier.num_wakes, carrier.num_overs) == (2, 0)


def test_what_came_before_an_end_is_taken_and_what_comes_after_it_is_not():
    carrier = Carrier()
    arrivals = carrier.arrivals()
    arrivals.accept("a")
    arrivals.end()
    arrivals.end()
    arrivals.accept("b")
    assert arrivals.done()
    assert arrivals.take(9) == [(KEYS[0], "a")]
    assert carrier.num_wakes == 2


def test_cancelled_it_keeps_nothing_and_says_so_once():
    carrier = Carrier()
    arrivals = carrier.arrivals()
    arrivals.accept("a")
    arrivals.cancel()
    arrivals.cancel()
    assert arrivals.done()
    assert arrivals.take(9) == []
    assert carrier.num_overs == 1


def test_a_lease_begins_anew_with_each_page_and_runs_out_once():
    carrier = Carrier()
    arrivals = carrier.arrivals(lease_s=10.0)
    carrier.now_s = 10.0
    assert not arrivals.done()
    arrivals.accept("a")
    carrier.now_s = 20.0
    assert not arrivals.done()
    carrier.now_s = 20.1
    assert arrivals.done()
    assert arrivals.done()
    assert arrivals.is_late
    assert carrier.num_overs == 1
    assert arrivals.take(9) == [(KEYS[0], "a")]


def test_what_has_all_arrived_is_never_late():
    carrier = Carrier()
    arrivals = carrier.arrivals()
    arrivals.accept("abc")
    carrier.now_s = 1000.0
    assert arrivals.done()
    assert not arrivals.is_late


def test_what_arrives_while_it_is_cancelled_is_not_taken():
    """A page without those before it would be taken for the first of them."""
    carrier = Carrier()
    arrivals = carrier.arrivals()

    class Late(list):
        def __iter__(self):
            arrivals.cancel()
            return super().__iter__()

    arrivals.accept("a")
    arrivals.accept(Late(["b"]))
    assert arrivals.take(9) == []
    assert arrivals.done()
