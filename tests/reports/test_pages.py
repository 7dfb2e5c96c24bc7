"""Pages: one base for all, nothing from elsewhere, escaped, readable in light and dark."""

import base64
import io
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
from jinja2 import meta
from PIL import Image

from hirescam_jax.data.store.store import write_store
from hirescam_jax.reports import pages, store_page
from hirescam_jax.reports.figures import ACCENT, DPI, charts, figure_of
from tests.web_page import Page


def source(template: str) -> str:
    assert pages.TEMPLATES.loader
    return pages.TEMPLATES.loader.get_source(pages.TEMPLATES, template)[0]


@pytest.mark.parametrize("template", ["inspect.html", "report.html", "voc.html"])
def test_all_pages_have_one_base_and_no_style_of_their_own(template: str):
    text = source(template)
    assert set(meta.find_referenced_templates(pages.TEMPLATES.parse(text))) == {"base.html"}
    assert not re.search(r"<style|<html|\|\s*safe", text)


def test_there_is_no_other_page():
    names = {"base.html", "inspect.html", "report.html", "voc.html"}
    assert set(pages.TEMPLATES.list_templates()) == names


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance."""
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    rgb = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_and_dark():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    style = source("base.html")
    light, dark = style.split("prefers-color-scheme: dark")
    for part in (light, dark):
        color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})\b", part))
        for ground in ("paper", "raised"):
            for text in ("ink", "soft", "accent"):
                assert contrast(color[text], color[ground]) >= 4.5, (text, ground)
        assert contrast(color["warn"], color["warn-paper"]) >= 4.5
        assert contrast(color["muted"], color["paper"]) >= 3  # bars and lines


def test_a_missing_value_is_an_error(tmp_path: Path):
    with pytest.raises(jinja2.UndefinedError, match="summary"):
        pages.write_page(tmp_path / "page.html", "inspect.html", header={})
    assert not list(tmp_path.iterdir())


def test_a_picture_is_the_png_itself():
    figure = figure_of(2, 1)
    figure.text(0.5, 0.5, "x", color="white")
    data = pages.picture(figure)
    head, _, rest = data.partition(",")
    assert head == "data:image/png;base64"
    png = base64.b64decode(rest)
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (2 * DPI, DPI)
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 0)
        assert np.asarray(image.convert("L")).max() > 200
    assert pages.picture(png) == data


def drawn():
    figure, (ax, other) = charts(5, 2, 2)
    ax.plot([0, 1], [0, 1], "o-", color=ACCENT, label="<&>")
    ax.set_title("a < b & c")
    ax.legend()
    other.imshow(np.eye(3), interpolation="none")
    return figure


def test_charts_have_names_of_their_own_and_the_page_s_colours():
    charts = [pages.chart(drawn(), alt) for alt in ('First: "a" & b', "Second")]
    body = "".join(f"<figure>{chart}</figure>" for chart in charts)
    page = Page(
        f'<!doctype html>\n<html lang="en"><title>t</title><body><main><h1>h</h1><h2>i</h2>'
        f"{body}</main></body></html>"
    )
    assert page.tags["svg"] == 2
    assert page.named
    assert page.text.count("a < b & c") == page.text.count("<&>") == 2
    for chart in charts:
        assert "var(--ink)" in chart
        assert "var(--accent)" in chart
        assert not re.search(rf"#000000|{ACCENT}", chart)
    assert 'aria-label="First: &#34;a&#34; &amp; b"' in charts[0]
    assert pages.chart(drawn(), "Second") == charts[1]


def test_what_a_store_is_called_is_never_read_as_html(tmp_path: Path):
    labels, region = ("<i>a</i>", "b & c"), '"><script>alert(1)</script>'
    volume = np.full((4, 6, 6), -1000, np.int16)
    masks = np.ones((1, 4, 6, 6), np.uint8)
    cases = [("<b>case</b>", volume, np.array([[1], [1]], np.uint8), masks)]
    write_store(
        tmp_path / "store",
        labels=labels,
        regions=(region,),
        shape=(4, 6, 6),
        spacing_mm=(1.0, 1.0, 1.0),
        splits={"train": cases},
    )
    summary = store_page.inspect_store(tmp_path / "store")
    store_page.write_page(tmp_path / "page.html", tmp_path / "store", summary)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags["i"] == 1  # the region's line in the key
    for name in (*labels, region, "<b>case</b>"):
        assert name.replace("_", " ") in page.text
    assert [alt.partition(":")[0] for alt, _ in page.images] == ["<b>case</b>"]
