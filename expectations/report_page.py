"""The validation report as one self-contained HTML page, readable without a network.

Verdict, failures and pictures come first. Below them are the Data Docs of each suite as Great
Expectations renders them, in a frame each, so that the two stylesheets do not mix.
"""

import base64
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expectations.validation import ValidationReport

_SHOWN = 12  # images of one finding in the gallery

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2430, #e4e8ee);
        --paper: light-dark(#fff, #14181f); --line: light-dark(#d8dee8, #38414e);
        --faint: light-dark(#5a6675, #98a4b3); --bad: light-dark(#b3261e, #ff8a80);
        --odd: light-dark(#8a5a00, #ffc766); --good: light-dark(#1b7f3b, #6fd68f) }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
code { font-size: .85em } .faint { color: var(--faint) }
.critical { color: var(--bad); font-weight: 600 } .warning { color: var(--odd); font-weight: 600 }
.passed { color: var(--good); font-weight: 600 }
figure { display: inline-block; margin: .5rem .5rem 0 0; text-align: center; font-size: .85em }
img { width: 84px; height: 84px; image-rendering: pixelated; border: 1px solid var(--line) }
summary { cursor: pointer; margin-top: 1rem }
iframe { width: 100%; height: 85vh; border: 1px solid var(--line); margin-top: .5rem }
"""

# Parts of Great Expectations' template that load from the network, which may not be there, and the
# scripts, buttons and footer around them.
_REMOTE_PARTS = re.compile(
    r'<script[^>]*\bsrc="[^"]*"[^>]*>\s*</script>|<link[^>]*>|<img[^>]*\bsrc="https?:[^>]*>'
    r"|<script>.*?</script>|<button.*?</button>|<footer.*?</footer>|url\('?https?:[^)]*\)",
    re.DOTALL,
)
_DOCS_STYLE = """<style>
:root { color-scheme: light dark }
body { font: 14px/1.45 system-ui, sans-serif; background: light-dark(#fff, #14181f);
       color: light-dark(#1c2430, #e4e8ee) }
nav, .sidebar, .col-lg-2, .modal, footer, .cloud-footer { display: none !important }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem;
         border-bottom: 1px solid light-dark(#d8dee8, #38414e) }
.badge { background: light-dark(#e8edf4, #2a323d); border-radius: 3px; padding: 0 .3em }
.alert { padding: .4rem .6rem; border-left: 3px solid #8a94a3 }
.fa-check-circle::before { content: "✔"; color: #1b9c47 }
.fa-times::before, .fa-times-circle::before { content: "✘"; color: #d93025 }
.fa-exclamation-triangle::before { content: "!"; color: #b26a00 }
i { font-style: normal }
</style></head>"""


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
    failed = [finding for finding in report.findings if not finding.success]
    verdict = (
        f"<p class=critical>Refused: {len(report.critical)} critical expectations failed.</p>"
        if report.critical
        else f"<p class=passed>Accepted: none of {len(report.findings)} expectations failed "
        f"critically; {len(report.warnings)} warned.</p>"
    )
    blocks = [f"<h1>{escape(title)}</h1>", verdict]
    blocks += [f"<p class=faint>Not judged: {escape(reason)}</p>" for reason in report.skipped]
    for finding in failed:
        blocks.append(
            f"<h2><span class={finding.severity}>{finding.severity}</span> "
            f"{escape(finding.description)}</h2><p><code>{escape(finding.sentence)}</code></p>"
        )
        rows = (worst or {}).get(finding.column or "", finding.rows)
        blocks.append(_gallery(rows, (images or {}).get(finding.suite), say))
    # Findings on a whole table, such as a mean, have no rows: show the first images as examples.
    if failed and not any(finding.rows for finding in failed):
        for suite, all_images in (images or {}).items():
            blocks.append(f"<h2>The first of the {escape(suite)}</h2>")
            blocks.append(_gallery(range(min(_SHOWN, len(all_images))), all_images, say))
    blocks.append(
        "<h2>Data Docs</h2><p class=faint>Every expectation, as Great Expectations says it."
    )
    for suite, results in report.raw.items():
        met = sum(result["success"] for result in results["results"])
        # `sandbox` without values: the frame runs no script.
        blocks.append(
            f"<details><summary>{escape(suite.capitalize())}: {met} of {len(results['results'])} "
            f'expectations met</summary><iframe sandbox title="Data Docs: {escape(suite)}" '
            f'srcdoc="{escape(render_data_docs(results))}"></iframe></details>'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(blocks)}</body></html>"
    )


def render_data_docs(results: Mapping[str, Any]) -> str:
    """Return Great Expectations' own page about one suite's results, without remote parts.

    `results` is an entry of `ValidationReport.raw`.
    """
    # Imported here because Great Expectations takes 2 s to import.
    from great_expectations.core.expectation_validation_result import (
        expectationSuiteValidationResultSchema,
    )
    from great_expectations.render.renderer.page_renderer import (
        ValidationResultsPageRenderer,
    )
    from great_expectations.render.view import DefaultJinjaPageView

    result = expectationSuiteValidationResultSchema.load(dict(results))
    document = ValidationResultsPageRenderer(run_info_at_end=True).render(result)
    page: str = DefaultJinjaPageView().render(document)
    return _REMOTE_PARTS.sub("", page).replace("</head>", _DOCS_STYLE, 1)


def _gallery(
    rows: Sequence[int], images: NDArray[np.uint8] | None, caption: Callable[[int], str]
) -> str:
    if images is None:
        return ""
    return "".join(
        f'<figure><img alt="image {row}" src="data:image/png;base64,'
        f'{base64.b64encode(_png(images[row])).decode()}"><figcaption>{escape(caption(row))}'
        "</figcaption></figure>"
        for row in rows[:_SHOWN]
    )


def _png(image: NDArray[np.uint8]) -> bytes:
    """Encode one grey image (height, width) as PNG; see https://www.w3.org/TR/png/."""
    height, width = image.shape
    # (height, 1 + width): each line starts with its filter type, 0 for none.
    lines = np.pad(image, ((0, 0), (1, 0))).tobytes()
    # 8 bits, colour type 0 (grey), then the standard compression and filter, no interlacing.
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
