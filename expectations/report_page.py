"""The validation report as one self-contained HTML page, readable without a network."""

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from expectations.validation import ValidationReport

_SHOWN = 12  # images of one finding in the gallery


def render_report(
    report: ValidationReport,
    title: str = "Validation report",
    images: Mapping[str, NDArray[np.uint8]] | None = None,
    say: Callable[[int], str] = str,
    worst: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """Return `report` as a self-contained HTML page: verdict, failures, then every expectation.

    `images` maps the name of a suite to the images of its table, uint8 (N, height, width). Those
    that failed are then shown below their finding, each with the caption `say(row)`. `worst` maps a
    column to the rows to show for it instead of the first offending ones.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report_page.html").render(
        report=report,
        title=title,
        images=images or {},
        say=say,
        worst=worst or {},
        most=_SHOWN,
        data_uri=_data_uri,
    )


def _data_uri(image: NDArray[np.uint8]) -> str:
    """Return one grey image, uint8 (height, width), as the address of a PNG that it holds."""
    content = BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
