"""The parts of a page: a section with its finding, figures, filters and numbers."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmgraft.report.svg import escape, number

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure. data: per row, the attributes that filters look at."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    data: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Figure:
    """One picture. caption: what it shows, with `note` below in small print. data: for filters."""

    caption: str
    svg: str
    note: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    legend: str = ""


@dataclass(frozen=True)
class Choice:
    """Checkboxes: `key` is the attribute, `values` with their labels; those in `off` begin unchecked."""

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
    choices: Sequence[Choice] = ()
    extra: str = ""


def topic(text: str, run: Any, place: int) -> str:
    """The words of the navigation; from the second run of one kind on with its folder's name."""
    return f"{text}, {run.folder.name}" if place else text


def render_section(section: Section) -> str:
    """The section as HTML."""
    body = [f'<p class="kicker">{escape(section.topic)}</p><h2>{escape(section.title)}</h2>']
    body += [f"<p>{escape(paragraph)}</p>" for paragraph in section.text]
    body += [_choice(section.id, choice) for choice in section.choices]
    if section.figures:
        body.append(f'<div class="figures">{"".join(map(_figure, section.figures))}</div>')
    body.append(section.extra)
    body += [_table(table) for table in section.tables if table.rows]
    return f'<section id="{section.id}">{"".join(body)}</section>'


def _attributes(data: Mapping[str, str]) -> str:
    return "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())


def _choice(place: str, choice: Choice) -> str:
    boxes = []
    for value, said in choice.values.items():
        on = "" if value in choice.off else " checked"
        boxes.append(
            f'<label><input type="checkbox" name="{choice.key}" value="{escape(value)}"{on}>{escape(said)}</label>'
        )
    return f'<fieldset class="filters"><legend>{escape(choice.title)}</legend>{"".join(boxes)}</fieldset>'


def _figure(figure: Figure) -> str:
    note = f"<small>{escape(figure.note)}</small>" if figure.note else ""
    caption = f"<figcaption>{escape(figure.caption)}{note}</figcaption>"
    return f"<figure{_attributes(figure.data)}>{caption}{figure.svg}{figure.legend}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th{_words(table, place)}>{escape(column)}</th>" for place, column in enumerate(table.columns))
    rows = []
    for index, row in enumerate(table.rows):
        cells = "".join(f"<td{_words(table, place)}>{escape(said(value))}</td>" for place, value in enumerate(row))
        rows.append(f"<tr{_attributes(table.data[index]) if table.data else ''}>{cells}</tr>")
    content = base64.b64encode(as_csv(table).encode()).decode()
    link = f'<a class="button" download="{escape(table.name)}.csv" href="data:text/csv;base64,{content}">CSV</a>'
    return (
        f"<details><summary>Numbers: {escape(table.name)} ({len(table.rows)} rows)</summary><p>{link}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</details>"
    )


def _words(table: Table, place: int) -> str:
    return ' class="words"' if any(isinstance(row[place], str) for row in table.rows) else ""


def said(value: Any) -> str:
    """A cell for people."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, 4) if isinstance(value, float) else str(value)


def as_csv(table: Table) -> str:
    """The table with full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if value is None else value for value in row] for row in table.rows])
    return out.getvalue()
