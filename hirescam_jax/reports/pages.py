"""Pages that stand alone: one style for all, and nothing loaded from elsewhere.

templates/base.html has the style and the header. A page's template extends it; text is escaped, a
value that is missing is an error.
"""

import base64
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from hirescam_jax.files import atomic_file
from hirescam_jax.reports.figures import ACCENT, GRID, MUTED, png

TEMPLATES = Environment(
    loader=PackageLoader("hirescam_jax.reports"), autoescape=True, undefined=StrictUndefined
)
# Colours of charts, light or dark as the page is.
THEME = {"#000000": "--ink", GRID: "--line", ACCENT: "--accent", MUTED: "--muted"}


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes the template with its values, whole or not at all.

    Raises:
        UserError: the file cannot be written.
        jinja2.UndefinedError: the template asks for a value that is missing.
    """
    page = TEMPLATES.get_template(template).render(values)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def picture(source: Figure | bytes) -> str:
    """A figure, or a PNG file's bytes, as the `src` of an <img>."""
    data = source if isinstance(source, bytes) else png(source)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def chart(figure: Figure, alt: str) -> Markup:
    """A figure as <svg> in the page's colours.

    Args:
        alt: what it shows, for those who do not see it; no two charts of a page have the same.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text, in the page's font; the same chart is the same SVG each time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hirescam_jax"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    # Two charts of a page may not share names.
    prefix = re.sub(r"\W+", "-", alt.lower())
    svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{prefix}-", svg)
    for color, variable in THEME.items():
        svg = svg.replace(color, f"var({variable})")
    return Markup(svg)
