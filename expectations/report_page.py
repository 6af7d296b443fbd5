"""The validation report as one HTML page that opens anywhere, also without a network."""

import base64
import struct
import zlib
from collections.abc import Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

from expectations.validation import Finding, ValidationReport

_SHOWN = 12  # images of one finding in the gallery

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1c2430; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d8dee8;
         vertical-align: top }
code { font-size: .85em } small { color: #5a6675 }
.critical { color: #b3261e; font-weight: 600 } .warning { color: #8a5a00; font-weight: 600 }
.passed { color: #1b7f3b; font-weight: 600 }
figure { display: inline-block; margin: .5rem .5rem 0 0; text-align: center }
img { width: 84px; height: 84px; image-rendering: pixelated; border: 1px solid #d8dee8 }
"""


def render_report(
    report: ValidationReport,
    title: str = "Validation report",
    images: Mapping[str, NDArray[np.uint8]] | None = None,
) -> str:
    """Return `report` as a self-contained HTML page: verdict, failures, then every expectation.

    `images` maps the name of a suite to the uint8 (N, height, width) images that its table was made
    of; those that failed are then shown below their finding.
    """
    failed = [finding for finding in report.findings if not finding.success]
    verdict = (
        f"<p class=critical>Refused: {len(report.critical)} critical expectations failed.</p>"
        if report.critical
        else f"<p class=passed>Accepted: none of {len(report.findings)} expectations failed "
        f"critically; {len(report.warnings)} warned.</p>"
    )
    blocks = [f"<h1>{escape(title)}</h1>", verdict]
    blocks += [f"<p>Not judged: {escape(reason)}</p>" for reason in report.skipped]
    for finding in failed:
        blocks.append(
            f"<h2><span class={finding.severity}>{finding.severity}</span> "
            f"{escape(finding.description)}</h2><p><code>{escape(finding.sentence)}</code></p>"
        )
        blocks.append(_gallery(finding, (images or {}).get(finding.suite)))
    for suite in dict.fromkeys(finding.suite for finding in report.findings):
        rows = "".join(_row(finding) for finding in report.findings if finding.suite == suite)
        blocks.append(
            f"<h2>{escape(suite.capitalize())}</h2><table><tr><th>Result<th>Expectation"
            f"<th>Observed<th>Expected</tr>{rows}</table>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(blocks)}</body></html>"
    )


def _row(finding: Finding) -> str:
    result = "passed" if finding.success else finding.severity
    name = f"{finding.expectation}({finding.column or ''})"
    return (
        f"<tr><td class={result}>{result}<td>{escape(finding.description)}<br>"
        f"<small><code>{escape(name)}</code>, {finding.severity}</small>"
        f"<td>{escape(finding.observed)}<td>{escape(finding.expected)}</tr>"
    )


def _gallery(finding: Finding, images: NDArray[np.uint8] | None) -> str:
    if images is None:
        return ""
    return "".join(
        f'<figure><img alt="image {row}" src="data:image/png;base64,'
        f'{base64.b64encode(_png(images[row])).decode()}"><figcaption>{row}</figcaption></figure>'
        for row in finding.rows[:_SHOWN]
    )


def _png(image: NDArray[np.uint8]) -> bytes:
    """Encode one grey image; see https://www.w3.org/TR/png/."""
    height, width = image.shape
    lines = np.pad(image, ((0, 0), (1, 0))).tobytes()  # each line starts with filter type 0
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
