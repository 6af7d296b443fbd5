"""How soon what died is started again."""

from deployments.keep import SETTLED, Attempts


def test_the_first_attempt_is_at_once_and_the_pauses_grow() -> None:
    attempts, now, times = Attempts(), 1000.0, list[float]()
    while now < 1200:
        if attempts.is_due(now):
            attempts.note(now)
            times.append(now - 1000)
        now += 1
    assert times == [0, 2, 7, 22, 52, 112, 172]


def test_what_lived_for_long_begins_anew() -> None:
    attempts = Attempts()
    for now in (1000.0, 1002.0, 1007.0):
        assert attempts.is_due(now)
        attempts.note(now)
    assert not attempts.is_due(1010)
    assert attempts.is_due(1007 + SETTLED + 1)
    attempts.note(1007 + SETTLED + 1)
    assert attempts.is_due(1007 + SETTLED + 4)
