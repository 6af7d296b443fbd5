from tasks.services.markdown import cell


def test_a_pipe_does_not_break_a_table() -> None:
    assert cell("x|y\nz") == r"x\|y z"
