from datetime import UTC, datetime

import pytest

from tasks.registry.history import Move, check_history, trace


def chain(*steps: tuple[str | None, str], action: str = "promote") -> list[Move]:
    """Return moves, each given as the champion before and the version that it moved to."""
    moves: list[Move] = []
    for before, after in steps:
        moves.append(
            Move(
                sequence=len(moves) + 1,
                action=action,
                model="digits-cnn",
                from_version=before,
                to_version=after,
                who="Ada",
                why="it is better",
                when=datetime(2026, 11, 2, tzinfo=UTC),
                run=f"run-{after}",
                run_url="http://127.0.0.1/run",
                follows=moves[-1].digest if moves else None,
            )
        )
    return moves


MOVES = chain((None, "1"), ("1", "2"), ("2", "3"))
STORED = {move.name: move.content.encode() for move in MOVES}
TAGGED = [(move.tag, move.content) for move in MOVES]


def test_an_untouched_history_is_whole_and_in_order() -> None:
    history = check_history(dict(reversed(STORED.items())), TAGGED[::-1])
    assert list(history.moves) == MOVES
    assert (history.problems, history.lost) == ((), ())


def test_no_history_is_whole() -> None:
    assert check_history({}, []).problems == ()


def test_objects_that_are_lost_are_found_in_the_tags() -> None:
    history = check_history({}, TAGGED)
    assert history.problems == ()
    assert list(history.lost) == list(history.moves) == MOVES


def test_tags_that_are_lost_do_not_break_the_chain_of_objects() -> None:
    assert check_history(STORED, TAGGED[:1]).problems == ()


def test_a_changed_object_is_named() -> None:
    name = MOVES[1].name
    forged = STORED[name].replace(b"Ada", b"Eve")
    history = check_history(STORED | {name: forged}, TAGGED)
    assert any(f"{name} was changed" in problem for problem in history.problems)


def test_a_rewritten_move_with_its_name_and_its_tag_breaks_the_chain_at_its_successor() -> None:
    forged = MOVES[1].model_copy(update={"who": "Eve"})
    stored = {name: content for name, content in STORED.items() if name != MOVES[1].name}
    stored[forged.name] = forged.content.encode()
    tagged = [TAGGED[0], (forged.tag, forged.content), TAGGED[2]]
    (problem,) = check_history(stored, tagged).problems
    assert "move 3 does not follow the move before it" in problem


def test_a_changed_tag_differs_from_its_object() -> None:
    forged = MOVES[2].model_copy(update={"why": "nobody looks"})
    (problem,) = check_history(STORED, [*TAGGED[:2], (forged.tag, forged.content)]).problems
    assert "move 3 reads differently in its object and in its tag" in problem


def test_a_move_that_was_taken_out_everywhere_is_missed() -> None:
    stored = {name: content for name, content in STORED.items() if name != MOVES[1].name}
    problems = check_history(stored, [TAGGED[0], TAGGED[2]]).problems
    assert problems[0] == "move 2 is missing, in the store and in the registry's tags"


def test_a_second_move_with_the_same_number_is_named() -> None:
    twin = MOVES[2].model_copy(update={"to_version": "9"})
    problems = check_history(STORED | {twin.name: twin.content.encode()}, TAGGED).problems
    assert any("move 3 was written twice" in problem for problem in problems)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"sequence": 4}'])
def test_an_object_that_is_no_move_is_named(content: bytes) -> None:
    name = "models/digits-cnn/history/000004-0000.json"
    (problem,) = check_history(STORED | {name: content}, TAGGED).problems
    assert problem.startswith(f"{name} does not hold a move")


def test_a_history_that_leads_to_the_champion_explains_it() -> None:
    assert trace(MOVES, "3") == ([True, True, True], [])


def test_a_move_that_was_cut_short_shows_as_not_carried_out() -> None:
    assert trace(chain((None, "1"), ("1", "2"), ("1", "3")), "1") == ([True, False, False], [])


def test_a_confirmed_move_that_the_alias_does_not_show_was_undone_past_the_history() -> None:
    confirmed = {MOVES[-1].digest}
    done, (told,) = trace(MOVES, "2", confirmed)
    assert done == [True, True, True]
    assert told.startswith("after move 3 the champion should be version 3, but was 2: somebody")
    assert trace(MOVES, "3", confirmed)[1] == []


def test_a_confirmed_move_that_its_successor_does_not_show_was_undone_past_the_history() -> None:
    moves = chain((None, "1"), ("1", "2"), ("1", "3"))
    assert "after move 2" in trace(moves, "3", {moves[1].digest})[1][0]
    assert trace(moves, "3")[1] == []


def test_a_rejection_moves_no_champion() -> None:
    rejection = chain(("1", "2"), action="reject")[0]
    assert trace([MOVES[0], rejection], "1") == ([True, True], [])


def test_a_champion_that_no_move_explains_is_told() -> None:
    assert "should be version 3, but was 7" in trace(MOVES, "7")[1][0]
    assert "should be version 3, but was none" in trace(MOVES, None)[1][0]
    assert trace([], "1")[1] == ["the champion is version 1, but the history is empty"]
