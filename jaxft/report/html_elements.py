"""Elements of HTML pages: escaped texts, tables, records, folded parts, coloured tokens, small histograms."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxft.runs.terminal import printable_message

MOST_COLUMNS = 8  # records side by side
TEXT_CHARACTERS = 3000  # of a sample, a completion or a setting


def escaped(text: object, most: int = TEXT_CHARACTERS) -> str:
    """Return text for HTML: <, >, & and control characters escaped, truncated to `most` characters."""
    shown = printable_message(str(text))
    more = f" [... {len(shown) - most:,} more characters]" if len(shown) > most else ""
    return html.escape(shown[:most]) + more


def number_text(value: object) -> str:
    """Return an int in full, a float with four significant digits, "none" for None; other values as text."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escaped(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    large = abs(value) >= 1e4 and value == round(value)
    return f"{value:,.0f}" if large else f"{value:.4g}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: bool = False) -> str:
    """Return an HTML table. head, rows: cells, as HTML. numeric: all columns but the first are numbers."""
    kind = ' class="numbers"' if numeric else ""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        lines.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    body = "\n".join(lines)
    table = f"<thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table{kind}>{table}</table></div>'


def html_list(texts: Iterable[str], kind: str = "") -> str:
    """Return a list of texts, "" for none. kind: its CSS class."""
    items = "".join(f"<li>{escaped(text)}</li>" for text in texts)
    of_class = f' class="{kind}"' if kind else ""
    return f"<ul{of_class}>{items}</ul>" if items else ""


def folded(title: str, content: str, is_open: bool = False) -> str:
    """Return an HTML details element: a title, and content that is shown after a click on it."""
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>\n{content}\n</details>"


def section(anchor: str, title: str, content: str) -> str:
    """Return a section with a heading; "" without content."""
    return f'<section id="{anchor}"><h2>{title}</h2>\n{content}\n</section>' if content else ""


def sections(contents: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return title -> (anchor, section) of a page from title -> content; see html_page."""
    return {title: (title.lower(), section(title.lower(), title, x)) for title, x in contents.items()}


def flat_values(record: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"optim": {"lr": 1}} becomes {"optim.lr": 1}. path: a prefix for the names."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        inner = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict) and value:
            flat |= flat_values(value, inner)
        else:
            flat[inner] = value
    return flat


def record_table(records: Mapping[str, Mapping[str, Any]], only_differences: bool = False) -> str:
    """Return a table with a column for each record, or a row if they are more than MOST_COLUMNS. Values that
    differ between records are marked. "" if there is no value to show.

    records: title -> nested values. only_differences: leave out values that are equal in all records.
    """
    flat = {title: flat_values(record) for title, record in records.items()}
    rows = []
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        cells = [value_text(values[name]) if name in values else "absent" for values in flat.values()]
        differs = len(set(cells)) > 1
        if differs or not only_differences:
            shown = [f'<span class="differs">{cell}</span>' if differs else cell for cell in cells]
            rows.append([escaped(name), *shown])
    if not rows:
        return ""
    table = [["", *map(escaped, records)], *rows]
    if len(records) > MOST_COLUMNS:
        table = [list(column) for column in zip(*table, strict=True)]
    return html_table(table[0], table[1:])


def value_text(value: Any) -> str:
    """Return a setting as on a command line: none for None, a list with commas, floats in full."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return escaped(", ".join(str(item) for item in value)) if value else "none"
    return escaped(value, 300) if not isinstance(value, dict) else "none"


def token_view(pieces: Sequence[Sequence[Any]], more: int = 0) -> str:
    """Return tokens as HTML; tokens with a loss have a coloured background, deeper for a larger weight.

    pieces: (text, loss weight) of each token. more: how many further tokens are not in `pieces`.
    """
    known = [(str(text), float(weight)) for text, weight in pieces]
    top = max((weight for _, weight in known), default=0.0) or 1.0
    spans = []
    for text, weight in known:
        shown = escaped(text).replace("\n", "⏎\n")
        if weight > 0:
            level = max(1, round(4 * weight / top))
            spans.append(f'<b class="w{level}" title="weight {weight:.3g}">{shown}</b>')
        else:
            spans.append(f"<i>{shown}</i>")
    rest = f'<span class="note"> and {more:,} more tokens</span>' if more else ""
    return f'<div class="tokens">{"".join(spans)}{rest}</div>'


def histogram_picture(counts: Sequence[float]) -> str:
    """Return bars for a histogram's counts as an SVG picture."""
    top, width = max([1.0, *counts]), 6
    bars = "".join(
        f'<rect x="{width * number}" y="{28 - 28 * count / top:.1f}" width="{width - 1}" '
        f'height="{28 * count / top:.1f}"/>'
        for number, count in enumerate(counts)
        if count
    )
    size = width * len(counts)
    box = f'width="{size}" height="28" viewBox="0 0 {size} 28"'
    return f'<svg class="bars" {box} aria-hidden="true">{bars}</svg>'
