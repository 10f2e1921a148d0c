"""llama.cpp's side of the protocol, on a decoder that counts."""

import numpy as np

from bench.peers.llama_cpp_worker import generate
from bench.peers.protocol import Job

VOCAB_SIZE = 100


class CountingDecoder:
    """Prefers the sum of a sequence's tokens, modulo its vocabulary, by 0.25 to the next id."""

    def __init__(self):
        self.sums: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        self.num_calls = 0

    def forget(self) -> None:
        self.__init__()

    def decode(self, tokens, positions, sequences, wanted) -> np.ndarray:
        self.num_calls += 1
        rows = []
        for token, position, sequence, is_wanted in zip(
            tokens, positions, sequences, wanted, strict=True
        ):
            assert position == self.lengths.get(sequence, 0)
            self.lengths[sequence] = position + 1
            self.sums[sequence] = (self.sums.get(sequence, 0) + int(token)) % VOCAB_SIZE
            if is_wanted:
                row = np.zeros(VOCAB_SIZE, np.float32)
                row[self.sums[sequence]] = 1.0
                row[(self.sums[sequence] + 1) % VOCAB_SIZE] = 0.75
                rows.append(row)
        return np.stack(rows)


def test_prompts_of_any_length_are_continued_together_greedily():
    decoder = CountingDecoder()
    answer = generate(decoder, Job([[1, 2, 3], [50]], 4))
    assert answer.token_ids == [[6, 12, 24, 48], [50, 0, 0, 0]]
    assert answer.margins == []
    assert decoder.num_calls == 4, "one for all prompts, one for each further round"
    assert answer.num_first == 1
    assert 0 < answer.first_s < answer.total_s


def test_each_job_starts_from_an_empty_cache():
    decoder = CountingDecoder()
    job = Job([[1, 2, 3]], 2)
    assert generate(decoder, job).token_ids == generate(decoder, job).token_ids


def test_margins_are_the_two_best_apart():
    answer = generate(CountingDecoder(), Job([[1], [2]], 2, margins=True))
    assert answer.margins == [[0.25, 0.25], [0.25, 0.25]]
