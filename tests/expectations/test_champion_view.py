import numpy as np

from expectations.champion_view import contradictions, worst_contradictions


def answers(*pairs: tuple[int, float]) -> np.ndarray:
    """Return probabilities: each digit has the one given, and the others share what is left."""
    rows = np.empty((len(pairs), 10), np.float32)
    for row, (digit, sure) in zip(rows, pairs, strict=True):
        row[:] = (1 - sure) / 9
        row[digit] = sure
    return rows


SAID = answers((3, 0.9), (3, 0.9), (4, 0.75), (4, 0.65), (5, 0.91))


def test_only_a_sure_and_different_answer_contradicts() -> None:
    labels = np.array([3, 8, 9, 9, 11])
    assert contradictions(SAID, labels).tolist() == [False, True, True, False, True]


def test_the_surest_contradictions_come_first() -> None:
    assert worst_contradictions(SAID, np.zeros(5, np.int64)) == [4, 0, 1, 2]
    assert worst_contradictions(SAID, np.zeros(5, np.int64), most=2) == [4, 0]
