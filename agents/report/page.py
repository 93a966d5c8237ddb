"""What a report is made of, and how it becomes HTML."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from agents.report.svg import inline_svg


@dataclass(frozen=True)
class TableRow:
    """One method: its name, whether it is a learned agent, and a cell for each further column."""

    name: str
    learned: bool
    cells: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column, that of the names included."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[TableRow]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        figure: Drawn under `agents.report.svg.page_style`.
        heading: What stands beneath it, in few words.
        caption: What is to be read from it.
        alternative: What a reader who does not see it is told instead of the heading.
    """

    figure: Figure
    heading: str
    caption: str = ""
    alternative: str = ""


@dataclass
class Section:
    """A part of the page with a heading; one that is folded opens at a click."""

    title: str
    text: list[str] = field(default_factory=list)
    warnings: Sequence[str] = ()
    table: Table | None = None
    pictures: list[Picture] = field(default_factory=list)
    sections: list["Section"] = field(default_factory=list)
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: Name of what it is about.
        about: One sentence.
        facts: Names and values that tell how the numbers came about.
        sections: In order.
    """

    title: str
    about: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


class Names:
    """Gives out ids; each once."""

    def __init__(self, *taken: str) -> None:
        self._given = Counter(taken)

    def give(self, text: str) -> str:
        """Return an id made of the words of a text."""
        words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        self._given[words] += 1
        if self._given[words] == 1:
            return words
        return self.give(f"{words}-{self._given[words]}")


def render(page: Page) -> str:
    """Return the page as HTML that refers to nothing outside itself."""
    environment = Environment(
        loader=PackageLoader("agents.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _with_code
    names = Names("top", "contents", "theme-auto", "theme-light", "theme-dark")
    template = environment.get_template("report.html.jinja")
    return template.render(page=page, sections=[_prepared(s, names) for s in page.sections])


def _prepared(section: Section, names: Names) -> dict[str, Any]:
    """Return what the template needs of a section: ids given, figures as SVG."""
    return {
        "id": names.give(section.title),
        "section": section,
        "pictures": [_picture(picture, names) for picture in section.pictures],
        "wide": any(picture.figure.get_figwidth() > 4 for picture in section.pictures),
        "sections": [_prepared(inner, names) for inner in section.sections],
    }


def _with_code(text: str) -> Markup:
    """Escape a text, and set in code font what stands between backquotes."""
    parts = enumerate(text.split("`"))
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in parts
    )


def _picture(picture: Picture, names: Names) -> tuple[Markup, Picture]:
    return inline_svg(
        picture.figure, names.give("figure"), picture.alternative or picture.heading
    ), picture


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number for people; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, form)


def interval(value: dict[str, float], form: str = ".3f") -> str:
    """Return the bounds of an interval for people."""
    return f"{number(value['low'], form)} to {number(value['high'], form)}"


def difference(value: dict[str, float], key: str = "value") -> str:
    """Return a signed difference and its interval for people."""
    return f"{number(value[key], '+.3f')} ({interval(value, '+.3f')})"


def provenance_facts(provenance: Any) -> list[tuple[str, str]]:
    """Versions and commit, for people; what an older file does not hold is left out."""
    if not isinstance(provenance, dict):
        return []
    packages = provenance.get("packages", {})
    names = [name for name in ("asg-env", "torch", "numpy") if name in packages]
    facts = [("Versions", ", ".join(f"{name} {packages[name]}" for name in names))]
    facts.append(("Commit", str(provenance.get("commit") or "")))
    return [(name, value) for name, value in facts if value]
