"""The parts of a page: tables with full precision, filters, figures with their captions."""

from __future__ import annotations

import base64

from vlmgraft.report.charts import Bars
from vlmgraft.report.sections import Figure, Filter, Section, Table, as_csv, cell_text, render_section


def test_csv_keeps_precision_and_quotes() -> None:
    table = Table("t", ("a", "b"), [(0.123456789012, 'say "x", y'), (None, "z")])
    assert as_csv(table) == 'a,b\n0.123456789012,"say ""x"", y"\n,z\n'


def test_a_section_holds_its_parts_escaped_and_in_order() -> None:
    table = Table("numbers", ("a<b", "n"), [("x & y", 0.123456)], [{"method": "m"}])
    figure = Figure("A caption: 50 %", Bars([("a", 1.0, "high")], "x", "y"), "a note", {"method": "m"})
    choice = Filter("method", "show", {"m": "M & Co", "off": "Off"}, ("off",))
    section = Section("id", "topic", "A <title>", ["one", "two"], [figure], [table], [choice], "<hr>")
    html = render_section(section)
    assert html.startswith('<section id="id"><p class="kicker">topic</p><h2>A &lt;title&gt;</h2><p>one</p><p>two</p>')
    boxes = html[html.index("<fieldset") : html.index("</fieldset>")]
    assert 'value="m" checked>M &amp; Co' in boxes and 'value="off">Off' in boxes
    assert section.file_name(0) == "id-1-a-caption-50" and 'download="id-1-a-caption-50.pdf"' in html
    assert '<figure data-method="m"><figcaption>A caption: 50 %<small>a note</small></figcaption>' in html
    places = [html.index(part) for part in ("<fieldset", "<figure", "<hr>", "<details>")]
    assert places == sorted(places)
    assert '<th scope="col" class="words">a&lt;b</th><th scope="col">n</th>' in html
    assert '<tr data-method="m"><td class="words">x &amp; y</td><td>0.1235</td></tr>' in html
    csv = html.split('href="data:text/csv;base64,')[1].split('"')[0]
    assert base64.b64decode(csv).decode() == "a<b,n\nx & y,0.123456\n"


def test_a_table_without_rows_is_left_out() -> None:
    assert "<details>" not in render_section(Section("id", "t", "T", tables=[Table("empty", ("a",), [])]))


def test_cells_for_people() -> None:
    assert [cell_text(value) for value in (True, False, None, 7, 0.123456, "x")] == [
        "yes",
        "no",
        "",
        "7",
        "0.1235",
        "x",
    ]
