"""The parts of a page: a section with its finding, figures, filters and numbers."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmgraft.report.charts import Chart, svg_and_pdf
from vlmgraft.report.text import attributes, escape, number

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure. data: attributes for the filters, per row."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    data: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Figure:
    """One chart. caption: what it shows. note: small print below the caption. data: attributes for the filters."""

    caption: str
    chart: Chart
    note: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Filter:
    """Filter checkboxes. key: the attribute. values: attribute value → label. off: values that start unchecked."""

    key: str
    title: str
    values: Mapping[str, str]
    off: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """id: of the anchor. topic: a few words for the navigation. title: the finding. text: paragraphs.
    extra: HTML after the figures."""

    id: str
    topic: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    filters: Sequence[Filter] = ()
    extra: str = ""

    def file_name(self, index: int) -> str:
        """File name of one of the figures, without suffix."""
        return f"{self.id}-{index + 1}-" + re.sub(r"\W+", "-", self.figures[index].caption.lower()).strip("-")[:48]


def render_section(section: Section) -> str:
    """The section as HTML."""
    body = [f'<p class="kicker">{escape(section.topic)}</p><h2>{escape(section.title)}</h2>']
    body += [f"<p>{escape(paragraph)}</p>" for paragraph in section.text]
    body += [_checkboxes(group) for group in section.filters]
    if section.figures:
        figures = (_figure(figure, section.file_name(index)) for index, figure in enumerate(section.figures))
        body.append(f'<div class="figures">{"".join(figures)}</div>')
    body.append(section.extra)
    body += [_table(table) for table in section.tables if table.rows]
    return f'<section id="{section.id}">{"".join(body)}</section>'


def _checkboxes(group: Filter) -> str:
    boxes = []
    for value, label in group.values.items():
        on = "" if value in group.off else " checked"
        boxes.append(
            f'<label><input type="checkbox" name="{group.key}" value="{escape(value)}"{on}>{escape(label)}</label>'
        )
    return f'<fieldset class="filters"><legend>{escape(group.title)}</legend>{"".join(boxes)}</fieldset>'


def _figure(figure: Figure, name: str) -> str:
    note = f"<small>{escape(figure.note)}</small>" if figure.note else ""
    caption = f"<figcaption>{escape(figure.caption)}{note}</figcaption>"
    svg, pdf = svg_and_pdf(figure.chart, figure.caption, name)
    label = escape(f"of the figure: {figure.caption}")
    links = (
        f'<p class="downloads"><button type="button" data-svg="{name}" aria-label="SVG {label}">SVG</button> '
        f"{_download('PDF', f'{name}.pdf', 'application/pdf', pdf, f'PDF {label}')}</p>"
    )
    return f"<figure{attributes(dict(figure.data))}>{caption}{svg}{links}</figure>"


def _download(text: str, name: str, kind: str, content: bytes, label: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<a class="button" download="{name}" aria-label="{label}" href="data:{kind};base64,{data}">{text}</a>'


def _table(table: Table) -> str:
    words = [any(isinstance(row[column], str) for row in table.rows) for column in range(len(table.columns))]
    kinds = [' class="words"' if word else "" for word in words]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>' for kind, column in zip(kinds, table.columns, strict=True)
    )
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(f"<td{kind}>{escape(cell_text(value))}</td>" for kind, value in zip(kinds, row, strict=True))
        rows.append(f"<tr{attributes(dict(table.data[index])) if table.data else ''}>{cells}</tr>")
    name = escape(table.name)
    link = _download("CSV", f"{name}.csv", "text/csv", as_csv(table).encode(), f"CSV of the table: {name}")
    return (
        f"<details><summary>Numbers: {name} ({len(table.rows)} rows)</summary><p>{link}</p>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def cell_text(value: Any) -> str:
    """A cell as readable text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else number(value, 4) if isinstance(value, float) else str(value)


def as_csv(table: Table) -> str:
    """The table as CSV, with full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if value is None else value for value in row] for row in table.rows])
    return out.getvalue()
