"""Markdown for cards and reports, from Jinja templates."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def render(template: Path, **values: object) -> str:
    """Return a Markdown template filled in with `values`.

    Its filters are `percent` and `cell`. Raises jinja2.UndefinedError for a name that has no value.
    """
    templates = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(),  # of HTML; Markdown stays as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"percent": percent, "cell": cell}
    return templates.get_template(template.name).render(values)


def percent(share: float | None) -> str:
    """Return a share as percent, or `not measured`."""
    return "not measured" if share is None else f"{share * 100:.2f} %"


def cell(text: object) -> str:
    """Return a text as the cell of a table, in which a pipe or a line break would end it."""
    return str(text).replace("|", "\\|").replace("\n", " ")
