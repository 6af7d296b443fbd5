import re
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
from PIL import Image

from expectations.image_table import image_table
from expectations.report_page import render_report
from expectations.validation import Finding, ValidationReport, validate
from mnist_cnn.digits import Digits

Splits = tuple[Digits, Digits]


def report(**changes: object) -> ValidationReport:
    finding = Finding(
        suite="training images",
        expectation="expect_column_values_to_be_between",
        column="label",
        bounds={"min_value": 0, "max_value": 9},
        severity="critical",
        description="Every label is a digit.",
        success=False,
        observed="1 of 3 outside (10)",
        expected="0 to 9",
        rows=(2,),
    )
    return ValidationReport(findings=(finding.model_copy(update=changes),), raw={})


def test_the_page_states_verdict_sentence_and_what_was_not_judged() -> None:
    judged = report().model_copy(update={"skipped": ("the distribution: too few",)})

    page = render_report(judged, title="Batch 7")

    assert "<title>Batch 7</title>" in page
    assert "Refused: 1 critical expectations failed." in page
    assert report().findings[0].sentence in page
    assert "Not judged: the distribution: too few" in page


def test_a_warning_does_not_refuse() -> None:
    assert "Accepted: none of 1 expectations" in render_report(report(severity="warning"))


def test_the_page_needs_nothing_from_outside(sample: Splits) -> None:
    tables = [image_table(255 - split.images, split.labels) for split in sample]
    page = render_report(validate(*tables), images={"training images": 255 - sample[0].images})

    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in {"script", "link"}
            sources.extend(value or "" for name, value in attrs if name in {"src", "srcdoc"})

    Reader().feed(page)
    assert "url(" not in page
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_every_expectation_is_in_the_page_with_its_observed_value_and_bound(
    sample: Splits,
) -> None:
    findings = validate(*(image_table(255 - split.images, split.labels) for split in sample))
    page = unescape(render_report(findings))
    for suite in ("Training images", "Test images"):
        assert re.search(rf"{suite}: \d+ of \d+ expectations met", page)
    for finding in findings.findings:
        assert (
            f"<td>{finding.description}<br>"
            f'<code class="faint">{finding.expectation}({finding.column or ""}), '
            f"{finding.severity}</code>\n<td>{finding.observed}\n<td>{finding.expected}\n"
        ) in page
    assert "The middle is brighter than the border: no image is inverted." in page


def test_where_no_single_image_is_to_blame_the_first_ones_are_shown() -> None:
    images = np.arange(30 * 4, dtype=np.uint8).reshape(30, 2, 2)
    page = render_report(report(rows=()), images={"training images": images})
    assert len(re.findall(r'alt="image (\d+)"', page)) == 12


def test_rows_that_tell_more_are_shown_first_with_what_is_said_of_them() -> None:
    images = np.arange(30 * 4, dtype=np.uint8).reshape(30, 2, 2)
    page = render_report(
        report(), images={"training images": images}, say="row {}".format, worst={"label": [29, 7]}
    )
    assert re.findall(r"<figcaption>([^<]*)<", page) == ["row 29", "row 7"]


def test_words_from_the_data_cannot_become_markup() -> None:
    page = render_report(report(observed="<script>alert(1)</script>"), title="<b>")

    assert "<script>" not in page
    assert "<b>" not in page


def test_the_offending_images_are_shown_as_they_are() -> None:
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2)

    page = render_report(report(), images={"training images": images})

    shown = re.findall(r'alt="image (\d+)" src="data:image/png;base64,([^"]+)"', page)
    assert [number for number, _ in shown] == ["2"]
    assert decoded(shown[0][1]).tolist() == images[2].tolist()


def decoded(data: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(data))))
