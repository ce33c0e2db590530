"""An EvaluationReport as HTML, for notebooks: a table that follows the notebook's colours, and no script."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lossgrad.report import EvaluationReport

_MOST_GROUPS: Final = 50
_MOST_ERRORS: Final = 10
# Colours are the notebook's own (currentColor), in shades: it may be light or dark.
_STYLE: Final = """
<style>
.lossgrad-report { font-variant-numeric: tabular-nums; border-collapse: collapse; }
.lossgrad-report th, .lossgrad-report td { padding: 0.25em 0.9em; text-align: right; border: 0; background: none; }
.lossgrad-report th { font-weight: 600; border-bottom: 1px solid color-mix(in srgb, currentColor 45%, transparent); }
.lossgrad-report .text { text-align: left; }
.lossgrad-report .total td { font-weight: 600; border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.lossgrad-report .warn { color: #c0392b; }
.lossgrad-report caption { text-align: left; caption-side: top; padding: 0.25em 0.9em; opacity: 0.75; }
</style>
"""


def report_html(report: EvaluationReport) -> str:
    """Return the report as a fragment of HTML."""
    heads, rows, left_out = report.table(most_groups=_MOST_GROUPS)
    texts = 2 if report.groups else 1  # these columns are set left
    head = "".join(_cell("th", name, is_text=column < texts) for column, name in enumerate(heads))
    body = "".join(_row(row, texts) for row in rows)
    notes = [f"<caption>{escape(report.headline())}</caption>"]
    more = [f"and {left_out:,} more groups: <code>report.to_pandas()</code>"] if left_out else []
    more += [
        f'<span class="warn">batch {each.index} left out: {escape(each.error.message)}</span>'
        for each in report.errors[:_MOST_ERRORS]
    ]
    if len(report.errors) > _MOST_ERRORS:
        more.append(f"and {len(report.errors) - _MOST_ERRORS:,} more: <code>report.errors</code>")
    foot = "".join(f'<tr><td class="text" colspan="{len(heads)}">{line}</td></tr>' for line in more)
    return (
        f'{_STYLE}<table class="lossgrad-report">{"".join(notes)}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"
    )


def _row(row: tuple[str, ...], texts: int) -> str:
    cells = []
    for column, text in enumerate(row):
        is_bad = column == len(row) - 1 and text != "0"  # the count of what is not finite
        cells.append(_cell("td", text, is_text=column < texts, is_bad=is_bad))
    start = '<tr class="total">' if row[0] else "<tr>"
    return f"{start}{''.join(cells)}</tr>"


def _cell(tag: str, text: str, *, is_text: bool, is_bad: bool = False) -> str:
    names = " ".join(name for name, applies in (("text", is_text), ("warn", is_bad)) if applies)
    start = f'<{tag} class="{names}">' if names else f"<{tag}>"
    return f"{start}{escape(text)}</{tag}>"
