"""Figures as parts of a page: SVG whose text is text, with names and ids of its own."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from agents.look import HIGHLIGHT, INK, RIVALS

# Text takes its colour from the page, where contrast counts for more than in lines.
TEXT_COLOURS = {INK: "currentColor", HIGHLIGHT: "var(--learned)", RIVALS[0]: "var(--rival)"}
REFERENCE = re.compile(r"url\(#([^)]+)\)|^#(.+)$")
NUMBER = re.compile(r"-?\d+\.\d+")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # XML cannot hold them


@contextmanager
def page_style() -> Iterator[None]:
    """Be in force while figures are drawn and written: names are no formulas, ids never change."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "asg", "text.parse_math": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page's fonts are others
        yield


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """Return a figure as an `<svg>` element that takes the width of what it stands in.

    Args:
        figure: Drawn under `page_style`, which must still be in force.
        name: Prefix of all ids, so that several figures can stand on one page.
        title: What a reader who does not see it is told.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(CONTROL.sub("\ufffd", written.getvalue()))
    for parent in list(root.iter()):
        parent.tag = parent.tag.partition("}")[2]
        parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {found for element in root.iter() for found in _references(element)}
    for element in root.iter():
        _shorten(element)
        _rename(element, name, used)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "role": "img",
        "aria-labelledby": f"{name}-title",
    }
    label = ElementTree.Element("title", {"id": f"{name}-title"})
    label.text = CONTROL.sub("\ufffd", title)
    root.insert(0, label)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _references(element: ElementTree.Element) -> list[str]:
    found = [REFERENCE.search(value) for value in element.attrib.values()]
    return [match[1] or match[2] for match in found if match]


def _rename(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Put the name before every id that something refers to; drop the others."""
    for key, value in list(element.attrib.items()):
        match = REFERENCE.search(value)
        if key == "id" and value in used:
            element.set(key, f"{name}-{value}")
        elif key == "id":
            del element.attrib[key]
        elif match:
            old = match[1] or match[2]
            element.set(key, value.replace(f"#{old}", f"#{name}-{old}"))


def _shorten(element: ElementTree.Element) -> None:
    """Drop what shows nothing: digits beyond 1/10 pt, white space; let the page choose fonts."""
    for key in ("d", "x", "y", "transform"):
        if key in element.attrib:
            value = " ".join(element.attrib[key].split())
            element.set(key, NUMBER.sub(lambda match: f"{float(match[0]):.1f}", value))
    if element.tag == "text":
        style = re.sub(r"font-family: [^;]*; ", "", element.get("style", ""))
        for colour, ours in TEXT_COLOURS.items():
            style = style.replace(f"fill: {colour}", f"fill: {ours}")
        element.set("style", style)
        if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
            del element.attrib["transform"]
    elif element.text and not element.text.strip():
        element.text = None
    element.tail = None
