"""A page of sections as a self-contained HTML file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from jinja2 import Environment
from PIL import Image

from ..text import without_controls

WIDEST = 2200  # pixels; larger pictures are downsized
MANY_COLORS = 4096  # pictures with more colors are photographs


@dataclass
class Table:
    """Rows of text below a row of headers; the first column names the row."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    kind = "table"


def as_text(value: float | None, form: str = ".3f", missing: str = "-") -> str:
    """Format a number for a table; return `missing` for None and NaN."""
    return missing if value is None or math.isnan(value) else format(value, form)


@dataclass
class Picture:
    """A picture file, embedded in the page."""

    path: str
    caption: str = ""
    kind = "picture"

    @property
    def size(self) -> tuple[int, int]:
        with Image.open(self.path) as image:
            return image.size

    @property
    def uri(self) -> str:
        """The picture as a data URI: photographs as WebP, plots unchanged."""
        with Image.open(self.path) as opened:
            image = opened.convert("RGB")
            if image.width <= WIDEST and image.getcolors(MANY_COLORS) is not None:
                with open(self.path, "rb") as file:
                    return _data_uri(file.read(), opened.format.lower())
        image.thumbnail((WIDEST, WIDEST * 8), Image.Resampling.LANCZOS)
        packed = io.BytesIO()
        image.save(packed, "WEBP", quality=88, method=4)
        return _data_uri(packed.getvalue(), "webp")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass
class Listing:
    """A text that is shown when its title is clicked."""

    title: str
    text: str
    kind = "listing"


@dataclass
class Section:
    """A part of the page.

    Attributes:
        intro: sentences, one per paragraph.
    """

    title: str
    intro: Sequence[str] = ()
    blocks: list[Table | Picture | Listing] = field(default_factory=list)


def _without_controls(value: object) -> object:
    return without_controls(value) if isinstance(value, str) else value


def render(title: str, sections: Sequence[Section], versions: dict[str, str]) -> str:
    """Render the page as HTML.

    Args:
        versions: software versions, shown at the end of the page.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls)
    template = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, versions=versions)
