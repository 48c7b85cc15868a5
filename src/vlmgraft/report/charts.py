"""Charts as SVG text: lines with intervals, heat maps, bars. Every mark says its numbers to the pointer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlmgraft.report.svg import Scale, coordinate, escape, label, mixed, number, span, tip

SERIES = 8
MARKS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Dot:
    """One point. tip: what the pointer reads. *_low, *_high: the ends of its interval. ring: drawn with a ring."""

    x: float
    y: float
    tip: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    ring: bool = False


@dataclass(frozen=True)
class Series:
    """A line or a set of points. data: attributes that filters look at, such as {"method": "ties"}."""

    name: str
    dots: tuple[Dot, ...]
    joined: bool = True
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Axes:
    """What a chart of lines shows on its axes; limits default to the data with a margin."""

    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None


def line_chart(title: str, series: Sequence[Series], axes: Axes, width: int = 460, height: int = 320) -> str:
    """Lines with marks, intervals and a grid; colour and mark change together, so that neither is needed alone."""
    left, right, top, bottom = 62, 12, 12, 44
    xs = [end for one in series for dot in one.dots for end in (dot.x, *(dot.x_range or ()))]
    ys = [end for one in series for dot in one.dots for end in (dot.y, *(dot.y_range or ()))]
    x = Scale(*(axes.x_limits or span(xs, log=axes.log_x)), left, width - right, axes.log_x)
    y = Scale(*(axes.y_limits or span(ys, log=axes.log_y)), height - bottom, top, axes.log_y)
    body = [_frame(x, y, axes, width, height)]
    body += [_series(one, place, x, y) for place, one in enumerate(series)]
    return _svg(title, width, height, body)


def _frame(x: Scale, y: Scale, axes: Axes, width: int, height: int) -> str:
    base, edge = y.start, x.start
    lines = []
    for value in x.ticks:
        at = x(value)
        lines.append(f'<path class="grid" d="M{coordinate(at)} {coordinate(y.stop)}V{coordinate(base)}"/>')
        lines.append(label(at, base + 16, number(value), "tick", "middle"))
    for value in y.ticks:
        at = y(value)
        lines.append(f'<path class="grid" d="M{coordinate(edge)} {coordinate(at)}H{coordinate(x.stop)}"/>')
        lines.append(label(edge - 6, at + 4, number(value), "tick", "end"))
    lines.append(f'<path class="axis" d="M{coordinate(edge)} {coordinate(y.stop)}V{base}H{coordinate(x.stop)}"/>')
    lines.append(label((edge + x.stop) / 2, height - 8, axes.x, "name", "middle"))
    lines.append(label(13, (base + y.stop) / 2, axes.y, "name", "middle", turn=True))
    return "".join(lines)


def _series(one: Series, place: int, x: Scale, y: Scale) -> str:
    dots = [dot for dot in one.dots if (dot.x > 0 or not x.log) and (dot.y > 0 or not y.log)]
    data = "".join(f' data-{key}="{escape(value)}"' for key, value in one.data.items())
    body = []
    if one.joined and len(dots) > 1:
        path = "L".join(f"{coordinate(x(dot.x))} {coordinate(y(dot.y))}" for dot in dots)
        body.append(f'<path class="line" d="M{path}"/>')
    for dot in dots:
        at = x(dot.x), y(dot.y)
        if dot.x_range:
            ends = [coordinate(x(end)) for end in dot.x_range]
            body.append(f'<path class="whisker" d="M{ends[0]} {coordinate(at[1])}H{ends[1]}"/>')
        if dot.y_range:
            ends = [coordinate(y(end)) for end in dot.y_range]
            body.append(f'<path class="whisker" d="M{coordinate(at[0])} {ends[0]}V{ends[1]}"/>')
        if dot.ring:
            body.append(f'<circle class="ring" cx="{coordinate(at[0])}" cy="{coordinate(at[1])}" r="8"/>')
        body.append(mark(MARKS[place % len(MARKS)], *at, dot.tip))
    return f'<g class="series s{place % SERIES}"{data}>{"".join(body)}</g>'


def mark(kind: str, x: float, y: float, said: str) -> str:
    """One mark of `MARKS`, which says `said` to the pointer."""
    hover = f'class="mark" tabindex="0" {tip(said)}><title>{escape(said)}</title>'
    if kind == "circle":
        return f'<circle cx="{coordinate(x)}" cy="{coordinate(y)}" r="4" {hover}</circle>'
    shapes = {
        "square": "m-3.6-3.6h7.2v7.2h-7.2z",
        "diamond": "m0-5l5 5-5 5-5-5z",
        "triangle": "m0-4.8l4.6 8.2h-9.2z",
    }
    return f'<path d="M{coordinate(x)} {coordinate(y)}{shapes[kind]}" {hover}</path>'


def legend(series: Sequence[Series]) -> str:
    """The names of series with their marks, as HTML; filters hide an entry with its series."""
    entries = []
    for place, one in enumerate(series):
        data = "".join(f' data-{key}="{escape(value)}"' for key, value in one.data.items())
        shape = mark(MARKS[place % len(MARKS)], 8, 8, one.name).replace(' tabindex="0"', "")
        entries.append(
            f'<span class="series s{place % SERIES}"{data}><svg viewBox="0 0 16 16" aria-hidden="true">{shape}</svg>'
            f"{escape(one.name)}</span>"
        )
    return f'<p class="legend">{"".join(entries)}</p>'


@dataclass(frozen=True)
class Heat:
    """A heat map: values[row][column], None where there is nothing.

    middle: the value in the neutral colour; reach: how far from it the full colour is, below it reach_low where given.
    unit: written after a value in its tip; written: the format of the number in a cell, None for none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    x: str
    y: str
    middle: float = 0.0
    reach: float = 1.0
    unit: str = ""
    written: str | None = "{:.0f}"
    one_sided: bool = False
    reach_low: float | None = None

    def share(self, value: float) -> float:
        """Where a value lies between the colours, −1 to 1."""
        away = value - self.middle
        reach = self.reach if away >= 0 or self.reach_low is None else self.reach_low
        return away / reach if reach else 0.0


def heat_map(title: str, heat: Heat, width: int = 460, cell: int | None = None) -> str:
    """Cells with their numbers inside, a name per row, and a colour bar."""
    longest = max([len(row) for row in heat.rows] or [1])
    left = 34 + 6.4 * longest
    count = max(1, len(heat.columns))
    size = min(cell or 72, (width - left - 8) / count)
    tall = min(30, max(16, size))
    top, bottom = 6, 64
    height = top + tall * len(heat.rows) + bottom
    body = []
    for place, (name, values) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = top + place * tall
        body.append(label(left - 6, y + tall / 2 + 4, name, "tick", "end"))
        for column, value in enumerate(values):
            body.append(_cell(heat, name, column, value, left + column * size, y, size, tall))
    every = max(1, -(-count * 26 // int(max(1, size * count))))
    base = top + tall * len(heat.rows)
    for column, name in enumerate(heat.columns):
        if column % every == 0:
            body.append(label(left + (column + 0.5) * size, base + 14, name, "tick", "middle"))
    body.append(label(left + size * count / 2, base + 31, heat.x, "name", "middle"))
    body.append(label(12, top + tall * len(heat.rows) / 2, heat.y, "name", "middle", turn=True))
    body.append(_colour_bar(heat, left, base + 40, max(120.0, size * count)))
    return _svg(title, width, int(height), body)


def _cell(
    heat: Heat, row: str, column: int, value: float | None, x: float, y: float, width: float, height: float
) -> str:
    where = f"{heat.y} {row}, {heat.x} {heat.columns[column]}"
    box = f'x="{coordinate(x)}" y="{coordinate(y)}" width="{coordinate(width)}" height="{coordinate(height)}"'
    if value is None:
        return f'<rect class="cell none" {box}/>'
    share = heat.share(value)
    said = f"{where}: {number(value)}{heat.unit}"
    made = (
        f'<rect class="cell" {box} style="fill:{mixed(share)}" tabindex="0" {tip(said)}><title>{escape(said)}</title>'
        "</rect>"
    )
    if heat.written and width >= 24:
        text = heat.written.format(value).replace("-", "−")
        text = text.lstrip("+−") if not text.strip("+−0.") else text
        kind = "in strong" if abs(share) > 0.75 else "in"
        made += label(x + width / 2, y + height / 2 + 4, text, kind, "middle")
    return made


def _colour_bar(heat: Heat, x: float, y: float, width: float) -> str:
    width, steps = min(width, 200.0), 24
    low = 0.0 if heat.one_sided else -1.0
    made = []
    for step in range(steps):
        share = low + (1 - low) * (step + 0.5) / steps
        box = f'x="{coordinate(x + step * width / steps)}" y="{coordinate(y)}"'
        made.append(f'<rect {box} width="{coordinate(width / steps + 0.5)}" height="7" style="fill:{mixed(share)}"/>')
    down = heat.reach if heat.reach_low is None else heat.reach_low
    ends = [heat.middle + down * low, heat.middle + heat.reach]
    middle = (ends[0] + ends[1]) / 2 if heat.one_sided else heat.middle
    for at, value, anchor in ((x, ends[0], "start"), (x + width / 2, middle, "middle"), (x + width, ends[1], "end")):
        made.append(label(at, y + 19, number(value), "tick", anchor))
    return "".join(made)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]], x: str, y: str, width: int = 460) -> str:
    """Bars as (name, height, tip), from zero."""
    left, right, top, bottom, height = 62, 12, 12, 44, 240
    across = Scale(0, len(bars), left, width - right)
    up = Scale(0, max([value for _, value, _ in bars] + [1e-9]) * 1.08, height - bottom, top)
    body = []
    for value in up.ticks:
        at = coordinate(up(value))
        body.append(f'<path class="grid" d="M{left} {at}H{width - right}"/>')
        body.append(label(left - 6, up(value) + 4, number(value), "tick", "end"))
    for place, (name, value, said) in enumerate(bars):
        box = f'x="{coordinate(across(place) + 1)}" y="{coordinate(up(value))}"'
        size = f'width="{coordinate(across(1) - across(0) - 2)}" height="{coordinate(up(0) - up(value))}"'
        body.append(f'<rect class="bar" {box} {size} tabindex="0" {tip(said)}><title>{escape(said)}</title></rect>')
        body.append(label(across(place + 0.5), height - bottom + 16, name, "tick", "middle"))
    body.append(f'<path class="axis" d="M{left} {coordinate(up(0))}H{width - right}"/>')
    body.append(label((left + width - right) / 2, height - 8, x, "name", "middle"))
    body.append(label(13, (up(0) + top) / 2, y, "name", "middle", turn=True))
    return _svg(title, width, height, body)


def _svg(title: str, width: int, height: int, body: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    return f'{head} style="max-width:{width * 1.35:.0f}px">{"".join(body)}</svg>'
