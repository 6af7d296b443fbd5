"""Tables for a terminal."""

from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of the same length as lines of text with equal columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
