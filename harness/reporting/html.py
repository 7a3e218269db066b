"""report.html: the report as one file that needs no network: the text of report.md, with plots and pictures to explore.

The text is that of report.md, section by section, so the two cannot say different things. Where report.md shows a figure that a
reader would rather ask questions of (WIDGETS), the page draws it from the rows instead. Labels, prompts and errors are not
trusted: all text is escaped (see `markup`), the data is JSON that cannot end its script element, and the page's own policy
forbids the network.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from harness.reporting.markup import as_html, plain
from harness.reporting.page_data import data_uri, pictures_data, rows_data
from harness.reporting.rows import SweepResults

PAGE_BYTES, PICTURES_BYTES, FIGURES_BYTES = 7_800_000, 4_500_000, 2_600_000
"""Most that a page, its pictures and its still figures may take, over all parts."""
ASSETS = ("page.html", "page.css", "page_plot.js", "page.js")
ERROR_CHARACTERS, LONG_CELL = 6000, 48
WIDGETS = {"pareto.png": "plot", "grid.png": "browser", "keep_ratio.png": "maps"}
COVERED = ("pareto_dense.png",)
"""Figures that a widget shows too."""
CAPTIONS = {
    "plot": ("Quality against cost", "A point per row. Whiskers: 95 % interval, or least to greatest over training seeds where "
             "there are several. The line joins the rows that no other beats in both measures, by point estimates; FLOPs that "
             "are within 1.5 points of dense of each other are one budget. The others are lighter. Hollow: disturbed timing, on "
             "no front. Points with nearly equal x are set side by side. Only rows that were measured alike share a picture."),
    "browser": ("Pictures", "Same seed and prompt in every picture. Of a row with several training seeds, the first is shown."),
    "maps": ("Executed keep ratio", "Share of image tokens that each block's attention really computed, by sampling step "
             "(downwards, step 0 is pure noise) and block (to the right). One colour scale for all rows.")}


@dataclass(frozen=True)
class Part:
    """What is reported under one protocol. sections: markdown. figures: names of the files drawn in the sweep's folder.

    trials: one row per trial. sweep: one row per setting, over training seeds.
    """

    trials: SweepResults
    sweep: SweepResults
    sections: Sequence[str]
    figures: set[str]


def page(title: str, parts: Sequence[Part], intro: str = "") -> str:
    """The whole page. intro: markdown that stands before several parts."""
    rendered = [_Markdown(f"p{index}", part, FIGURES_BYTES // len(parts), len(parts) > 1) for index, part in enumerate(parts)]
    bodies = [one.html() for one in rendered]
    others = sum(len(body.encode()) for body in bodies) + sum(len(_asset(name)) for name in ASSETS)
    data = [json.dumps(rows_data(part.sweep)) for part in parts]
    room = min(PICTURES_BYTES, PAGE_BYTES - others - 2 * sum(map(len, data)))
    sections = [f'<section class="part">{_json_script(part, max(0, room) // len(parts))}{body}</section>'
                for part, body in zip(parts, bodies, strict=True)]
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for one in rendered for name, text in one.headings)
    lead = _Markdown("intro", None, 0, False, [intro]).html() if intro else ""
    script = _asset("page_plot.js") + _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=html.escape(title), style=_asset("page.css"), script=script, links=links, body=lead + "".join(sections))


def _asset(name: str) -> str:
    return (files("harness.reporting") / name).read_text(encoding="utf-8")


def _json_script(part: Part, room: int) -> str:
    data = {**rows_data(part.sweep), "pictures": pictures_data(part.sweep, room)}
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # or a label could end the script
    return f'<script type="application/json">{text}</script>'


# ---------------------------------------------------------------------------------------------- the markdown we write


class _Markdown:
    """The markdown that this package writes, as HTML: headings, tables, lists, quotes, figures, bold, italic, code; no more."""

    def __init__(self, prefix: str, part: Part | None, figure_bytes: int, nested: bool, sections: Sequence[str] = ()) -> None:
        self.prefix, self.part, self.room, self.nested = prefix, part, figure_bytes, nested
        self.sections = sections or (part.sections if part else ())
        self.headings: list[tuple[str, str]] = []

    def html(self) -> str:
        """All sections, and what only the page shows: errors in full and the sweep file."""
        blocks = [block for section in self.sections for block in section.split("\n\n") if block.strip()]
        parts, caption_of = [], None
        for block in blocks:
            figure = re.fullmatch(r"!\[(.*)\]\(([\w.-]+)\)", block)
            if figure and self.part and figure[2] in self.part.figures:
                caption_of = figure
                continue
            if caption_of:
                is_caption = block.startswith("*") and block.endswith("*") and not block.startswith("**")
                parts.append(self._figure(caption_of[1], caption_of[2], block.strip("*") if is_caption else ""))
                caption_of = None
                if is_caption:
                    continue
            parts.append(self._block(block))
        if caption_of:
            parts.append(self._figure(caption_of[1], caption_of[2], ""))
        return "\n".join([*parts, *(self._appendix() if self.part else ())])

    def _block(self, block: str) -> str:
        lines = block.split("\n")
        if heading := re.fullmatch(r"(#{1,4}) (.*)", block):
            return self._heading(len(heading[1]), heading[2])
        if all(line.startswith("|") for line in lines) and len(lines) > 1:
            return self._table(lines)
        if all(line.startswith("- ") for line in lines):
            return "<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>"
        if block.startswith("> "):
            return f'<p class="note">{inline(block[2:])}</p>'
        return f"<p>{inline(block)}</p>"

    def _heading(self, level: int, text: str) -> str:
        name = f"{self.prefix}-{len(self.headings)}"
        deep = level + self.nested
        if level <= 2:
            self.headings.append((name, inline(text)))
        return f'<h{deep} id="{name}">{inline(text)}</h{deep}>' if level <= 2 else f"<h{deep}>{inline(text)}</h{deep}>"

    def _table(self, lines: Sequence[str]) -> str:
        heads, _, *rows = [_cells(line) for line in lines]
        label = re.sub("<[^>]+>", "", self.headings[-1][1]) if self.headings else "table"
        head = "".join(f'<th scope="col"><button type="button" class="sort">{inline(cell)}</button></th>' for cell in heads)
        body = "".join(f'<tr><th scope="row">{inline(first)}</th>{"".join(map(_cell, rest))}</tr>'
                       for first, *rest in rows)
        return (f'<div class="table" role="region" tabindex="0" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>")

    def _figure(self, title: str, name: str, caption: str) -> str:
        if name in COVERED:
            return ""
        if widget := WIDGETS.get(name):
            head, text = CAPTIONS[widget]
            without = f'<noscript><p class="note">Needs JavaScript; {name} beside this file shows the same.</p></noscript>'
            return (f'<figure class="widget" data-widget="{widget}"><figcaption><strong>{head}.</strong> {text}</figcaption>'
                    f"{without}</figure>")
        uri = data_uri((self.part.sweep.folder / name).read_bytes(), "png")
        if len(uri) <= self.room:
            self.room -= len(uri)
            picture = f'<img src="{uri}" alt="{html.escape(plain(title))}">'
        else:
            picture = f'<p class="note">{html.escape(name)} is left out, to keep the page small; it lies beside it.</p>'
        return f"<figure>{picture}<figcaption><strong>{inline(title)}.</strong> {inline(caption)}</figcaption></figure>"

    def _appendix(self) -> Iterator[str]:
        lost = [row for row in self.part.trials.rows if row.note and row.status != "stopped"]
        if lost:
            yield self._heading(2, "Trials that are not whole")
        for row in lost:
            trace = str((row.result.get("error") or {}).get("traceback") or "")[-ERROR_CHARACTERS:]
            summary = f"<code>{html.escape(row.label)}</code>: {html.escape(row.note)}"
            yield (f"<details><summary>{summary}</summary><pre>{html.escape(trace)}</pre></details>" if trace else
                   f"<p>{summary}</p>")
        path = self.part.sweep.folder / "sweep.yaml"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            yield self._heading(2, "Sweep file")
            yield f"<details><summary>{path.name}</summary><pre>{html.escape(text)}</pre></details>"


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _cell(text: str) -> str:
    return f'<td{" class=long" * (len(text) > LONG_CELL)}>{inline(text)}</td>'


def inline(text: str) -> str:
    """Escaped text with code, bold and italic; tags never cross, whatever the text."""
    codes: list[str] = []

    def keep(match: re.Match[str]) -> str:
        codes.append(f"<code>{match[1]}</code>")
        return f"\0{len(codes) - 1}\0"

    text = re.sub(r"`([^`]+)`", keep, html.escape(text.replace("\0", "")))
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\*([^*<>\s](?:[^*<>]*[^*<>\s])?)\*", r"<em>\1</em>", text)
    return as_html(re.sub(r"\0(\d+)\0", lambda match: codes[int(match[1])], text))
