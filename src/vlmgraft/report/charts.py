"""Charts by matplotlib: lines with intervals, heat maps, bars; SVG inside the page, SVG, PDF or PNG for papers.

In the page, colours are CSS variables of the page, so that one SVG serves light mode, dark mode and print. Every mark
has its numbers in `aria-label`, for pointer, keyboard and screen readers, and the attributes that the filters use.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmgraft.report.text import attributes, escape, number

PALETTE = ("#000000", "#0072b2", "#d55e00", "#00805c", "#b4508a", "#9a6b00", "#2b8fc4", "#6d6d6d")
"""Colours of series on a light page, after Okabe and Ito; `page.css` holds them as --s0 to --s7."""
MARKERS = ("o", "s", "D", "^")
SHADES = {"ink": "#1c1d21", "soft": "#5c5f68", "grid": "#e9eaee", "paper": "#fffffe"}
SCALE = ("#b35806", "#f1f1f1", "#2166ac")
"""Low, neutral and high end of heat maps: --low, --zero and --high of `page.css`."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": SHADES["ink"],
    "axes.labelcolor": SHADES["soft"],
    "axes.edgecolor": SHADES["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": SHADES["grid"],
    "xtick.color": SHADES["soft"],
    "ytick.color": SHADES["soft"],
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Dot:
    """One point. tip: its numbers in words. *_range: the ends of its interval. ring: draw a ring around it. label: text
    beside it."""

    x: float
    y: float
    tip: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    ring: bool = False
    label: str = ""


@dataclass(frozen=True)
class Series:
    """A line with marks. data: attributes for the filters, such as {"method": "ties"}. style: number of its colour
    and mark, by default its position in the chart."""

    name: str
    dots: tuple[Dot, ...]
    data: Mapping[str, str] = field(default_factory=dict)
    style: int | None = None


@dataclass(frozen=True)
class Lines:
    """A chart of lines; series differ in both colour and mark, so that either is enough to tell them apart."""

    series: Sequence[Series]
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None
    size: tuple[float, float] = (4.6, 3.7)

    def draw(self, figure: Any) -> None:
        """Draw into an empty matplotlib figure."""
        axes = figure.add_subplot()
        axes.set(xlabel=self.x, ylabel=self.y, xscale="log" if self.log_x else "linear")
        axes.set(yscale="log" if self.log_y else "linear")
        handles = [self._series(axes, index, series) for index, series in enumerate(self.series)]
        axes.set(xlim=self.x_limits, ylim=self.y_limits)
        axes.grid()
        if len(self.series) > 1:
            columns = max(1, int(16 * self.size[0] / (6 + max(len(series.name) for series in self.series))))
            legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, 3))
            for series, handle, text in zip(self.series, legend.legend_handles, legend.get_texts(), strict=True):
                handle.set_gid(_tag(series.data))
                text.set_gid(_tag(series.data))
        _thin(axes)

    def _series(self, axes: Any, index: int, series: Series) -> Any:
        style = index if series.style is None else series.style
        colour, marker = PALETTE[style % len(PALETTE)], MARKERS[style % len(MARKERS)]
        dots = [dot for dot in series.dots if (dot.x > 0 or not self.log_x) and (dot.y > 0 or not self.log_y)]
        line: dict[str, Any] = {"color": colour, "gid": _tag(series.data)}
        axes.plot([dot.x for dot in dots], [dot.y for dot in dots], lw=1.3, **line)
        for dot in dots:
            if dot.x_range:
                axes.plot(dot.x_range, (dot.y, dot.y), lw=0.8, alpha=0.45, **line)
            if dot.y_range:
                axes.plot((dot.x, dot.x), dot.y_range, lw=0.8, alpha=0.45, **line)
            if dot.ring:
                axes.plot(dot.x, dot.y, "o", ms=12, mfc="none", **line)
            mark: dict[str, Any] = {"mec": SHADES["paper"], "mew": 0.7, "ms": 6, "zorder": 3}
            axes.plot(dot.x, dot.y, marker, **line | mark | {"gid": _tag(series.data, dot.tip)})
            if dot.label:
                beside: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(_plain(dot.label), (dot.x, dot.y), color=SHADES["soft"], gid=line["gid"], **beside)
        (key,) = axes.plot([], [], marker=marker, mec=SHADES["paper"], color=colour, label=_plain(series.name))
        return key


def _plain(text: str) -> str:
    """A name as it is: between two dollars matplotlib would read mathematics."""
    return text.replace("$", r"\$")


def _thin(axes: Any) -> None:
    """Remove point labels that would overlap another label; the tooltip and the table still have them."""
    axes.figure.draw_without_rendering()
    kept: list[Any] = []
    for text in list(axes.texts):
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box)


@dataclass(frozen=True)
class Heat:
    """A heat map: values[row][column], None for an empty cell.

    middle: the value shown in the neutral colour. reach: distance from it at which the colour is full; reach_low:
    the same below it, if different. unit: follows the value in a tooltip. written: number format in a cell, None: none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    x: str = "layer"
    y: str = ""
    middle: float = 0.0
    reach: float = 1.0
    unit: str = ""
    written: str | None = "{:.2f}"
    one_sided: bool = False
    reach_low: float | None = None

    @staticmethod
    def by_layer(values: Mapping[tuple[str, int], float | None], **settings: Any) -> Heat:
        """A row per name and a column per layer, from values by (name, layer)."""
        names, layers = list(dict.fromkeys(name for name, _ in values)), sorted({layer for _, layer in values})
        table = [[values.get((name, layer)) for layer in layers] for name in names]
        return Heat(names, [str(layer) for layer in layers], table, **settings)

    @property
    def size(self) -> tuple[float, float]:
        """Inches."""
        return 4.6, 1.15 + 0.27 * len(self.rows)

    def share(self, value: float) -> float:
        """Position of a value on the colour scale, −1 to 1."""
        away = value - self.middle
        reach = self.reach if away >= 0 or self.reach_low is None else self.reach_low
        return max(-1.0, min(1.0, away / reach)) if reach else 0.0

    def draw(self, figure: Any) -> None:
        """Draw into an empty matplotlib figure: the cells with their numbers, and a colour bar below."""
        axes, bar = figure.subplots(2, 1, height_ratios=(len(self.rows), 0.4))
        for y, (name, values) in enumerate(zip(self.rows, self.values, strict=True)):
            for x, value in enumerate(values):
                if value is not None:
                    tip = f"{self.y} {name}, {self.x} {self.columns[x]}: {number(value)}{self.unit}".strip()
                    _cell(axes, x, y, self.share(value), tip)
                    if self.written and len(self.columns) <= 14:
                        self._write(axes, x, y, value)
        every = -(-len(self.columns) // 14)
        axes.set_xticks([x + 0.5 for x in range(0, len(self.columns), every)], self.columns[::every])
        axes.set_yticks([y + 0.5 for y in range(len(self.rows))], [_plain(name) for name in self.rows])
        axes.set(xlim=(0, len(self.columns)), ylim=(len(self.rows), 0), xlabel=self.x, ylabel=self.y)
        low = 0.0 if self.one_sided else -1.0
        steps = 24
        for step in range(steps):
            _cell(bar, step, 0, low + (1 - low) * (step + 0.5) / steps)
        bottom = self.middle + (self.reach if self.reach_low is None else self.reach_low) * low
        top = self.middle + self.reach
        centre = (bottom + top) / 2 if self.one_sided else self.middle
        bar.set_xticks((0, steps / 2, steps), [number(value) for value in (bottom, centre, top)])
        bar.set(xlim=(0, steps), ylim=(1, 0), yticks=())
        for each in (axes, bar):
            each.tick_params(length=0)
            each.spines[:].set_visible(False)

    def _write(self, axes: Any, x: int, y: int, value: float) -> None:
        text = (self.written or "").format(value).replace("-", "−")
        text = text.lstrip("+−") if not text.strip("+−0.") else text  # no signed zero
        colour = SHADES["paper" if abs(self.share(value)) > 0.75 else "ink"]
        axes.text(x + 0.5, y + 0.5, text, color=colour, ha="center", va="center", fontsize=7)


@dataclass(frozen=True)
class Bars:
    """Bars as (name, height, tip), from zero."""

    bars: Sequence[tuple[str, float, str]]
    x: str
    y: str
    size: tuple[float, float] = (4.6, 2.8)

    def draw(self, figure: Any) -> None:
        """Draw into an empty matplotlib figure."""
        axes = figure.add_subplot()
        drawn = axes.bar(range(len(self.bars)), [height for _, height, _ in self.bars], color=PALETTE[1])
        for patch, (_, _, tip) in zip(drawn, self.bars, strict=True):
            patch.set_gid(_tag({}, tip))
        axes.set_xticks(range(len(self.bars)), [name for name, _, _ in self.bars])
        axes.set(xlabel=self.x, ylabel=self.y)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")


Chart = Lines | Heat | Bars


def _tag(data: Mapping[str, str], tip: str = "") -> str:
    """Attributes of an SVG element, passed through matplotlib as the element's id."""
    mark = f' class="mark" tabindex="0" role="img" aria-label="{escape(tip)}"' if tip else ""
    return f"@{mark}{attributes(dict(data))}"


def _cell(axes: Any, x: int, y: int, share: float, tip: str = "") -> None:
    """A cell in the colour of its share; in the page, the same mixture of the page's colours."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    end = "high" if share >= 0 else "low"
    zero, full = to_rgb(SCALE[1]), to_rgb(SCALE[2 if share >= 0 else 0])
    colour = [(1 - abs(share)) * low + abs(share) * high for low, high in zip(zero, full, strict=True)]
    tag = _tag({}, tip).replace('class="mark', 'class="mark cell') if tip else '@ class="cell"'
    tag += f' style="--end:var(--{end});--share:{100 * abs(share):.0f}%"'
    axes.add_patch(Rectangle((x, y), 1, 1, fc=colour, ec=SHADES["paper"], lw=0.5, gid=tag, clip_on=False))


@contextmanager
def _drawn(chart: Chart, salt: str) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = STYLE | {"svg.hashsalt": salt}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=chart.size, layout="constrained")
        chart.draw(figure)
        yield figure


def save_chart(chart: Chart, path: Path, title: str = "") -> None:
    """Write the picture as SVG, PDF or PNG by the suffix of `path`."""
    with _drawn(chart, path.stem) as figure:
        figure.suptitle(title, fontsize=10)
        for artist in figure.findobj():
            artist.set_gid(None)
        date = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix, {})
        figure.savefig(path, dpi=160, metadata=date)


def svg_and_pdf(chart: Chart, title: str, salt: str) -> tuple[str, bytes]:
    """The chart as an SVG element of the page, with its attributes, and as a PDF file. `salt` makes ids unique among
    the charts of one page."""
    text, pdf = io.StringIO(), io.BytesIO()
    with _drawn(chart, salt) as figure:
        figure.savefig(text, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # the layout is done
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return _for_page(text.getvalue(), title), pdf.getvalue()


def _for_page(svg: str, title: str) -> str:
    """matplotlib's SVG with the attributes of its marks and the page's colours, and without unused ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<g id='@([^']*)'>", lambda match: f"<g{html.unescape(match[1])}>", svg)
    svg = re.sub(r'<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.S)
    svg = re.sub(r'<g>\s*<path d="[^"]*" style="fill: #ffffff"/>\s*</g>', "", svg)  # backgrounds
    names = {colour: f"s{index}" for index, colour in enumerate(PALETTE)}
    names |= {colour: name for name, colour in SHADES.items()}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: f"var(--{names[match[0]]})" if match[0] in names else match[0], svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    return re.sub(
        r"<svg[^>]*>", f'<svg {box[0] if box else ""} role="group" aria-label="{escape(title)}">', svg, count=1
    )
