"""Why averaging the gradient can point to the wrong organ: an example that is exact by hand.

    python benchmarks/gallery.py            # writes benchmarks/results/gallery.png

One feature channel A sees two organs: 2 x 2 cells of strength 2 in the first, 2 x 2 cells of
strength 3 in the second. The head is one linear layer with bias 1: every cell of the first organ's
quadrant (3 x 3 cells) weighs +2, every cell of the second's -1, the rest 0. So the first organ
speaks for the label and the second, though brighter, against it:

    score     4 cells x 2 x (+2) + 4 cells x 3 x (-1) + 1 = 16 - 12 + 1 = 5
    HiResCAM  gradient x A: +4 in the first organ, -3 in the second; 16 - 12 = 4 = score - bias
    Grad-CAM  the mean gradient is (9 x 2 - 9 x 1) / 36 = 1/4, times A: 1/2 in the first organ, 3/4
              in the second, where the peak is; 4 x 1/2 + 4 x 3/4 = 5, and 5 + 1 is not the score

In 3D the same two organs lie in the two slices of a volume. The score and HiResCAM stay; the mean
gradient is (9 x 2 - 9 x 1) / 72 = 1/8, Grad-CAM has 1/4 and 3/8, and its sum is 2.5.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hirescam_jax.cam import gradcam, hirescam

OUT = Path(__file__).parent / "results" / "gallery.png"
FIRST, SECOND = (slice(0, 3), slice(0, 3)), (slice(3, 6), slice(3, 6))  # quadrants
INK, SOFT, GOOD, BAD = "#1d232b", "#5d6673", "#0b6e99", "#b3403a"
ORGANS = ((0.5, 0.5, "organ 1"), (2.5, 2.5, "organ 2"))


class Example(NamedTuple):
    """features, gradient, gradcam, hirescam [*grid], the score and the bias."""

    features: np.ndarray
    gradient: np.ndarray
    gradcam: np.ndarray
    hirescam: np.ndarray
    score: float
    bias: float


def example(slices: int = 0) -> Example:
    """The example in 2D, or in 3D with the organs in the first and the last slice."""
    features, gradient = np.zeros((2, max(1, slices), 6, 6), np.float32)
    features[0, 1:3, 1:3], features[-1, 3:5, 3:5] = 2, 3
    gradient[(0, *FIRST)], gradient[(-1, *SECOND)] = 2, -1
    if not slices:
        features, gradient = features[0], gradient[0]
    bias = 1.0

    def head(features: Array) -> Array:
        return features.reshape(features.shape[0], -1) @ gradient.reshape(-1, 1) + bias

    batch = jnp.asarray(features)[None, ..., None]
    averaged, exact = (np.asarray(method(head, batch)[0, 0]) for method in (gradcam, hirescam))
    return Example(features, gradient, averaged, exact, float(head(batch)[0, 0]), bias)


def draw(plane: Example, volume: Example) -> Figure:
    figure = Figure(figsize=(12.6, 11.6), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 4)
    figure.subplots_adjust(0.075, 0.085, 0.94, 0.855, 0.16, 0.34)
    rows = [(plane, ...), (volume, 0), (volume, 1)]
    for row, (shown, index) in zip(axes, rows, strict=True):
        for ax, name in zip(row, ("features", "gradient", "gradcam", "hirescam"), strict=True):
            values = getattr(shown, name)
            _grid(ax, values[index], np.abs(values).max(), name == "features")
            if name != "gradient":  # it weighs more places than the organs
                _organs(ax)
    titles = ("features A", "gradient of the score", "Grad-CAM", "HiResCAM")
    notes = ("what the network sees", "what its head weighs", "mean gradient × A", "gradient × A")
    for ax, title, note in zip(axes[0], titles, notes, strict=True):
        ax.text(0, 1.15, title, transform=ax.transAxes, fontsize=14, weight="bold", color=INK)
        ax.text(0, 1.05, note, transform=ax.transAxes, fontsize=11, color=SOFT)
    for ax, name in zip(axes[:, 0], ("2D", "3D, slice 1", "3D, slice 2"), strict=True):
        place = {"transform": ax.transAxes, "rotation": 90, "ha": "center", "va": "center"}
        ax.text(-0.17, 0.5, name, fontsize=13, weight="bold", color=INK, **place)
    for ax, shown in ((axes[0], plane), (axes[2], volume)):
        ax[0].text(0, -0.12, f"score {shown.score:g}, bias {shown.bias:g}", **_below(ax[0], INK))
        for column, name in ((2, "gradcam"), (3, "hirescam")):
            total = float(getattr(shown, name).sum())
            whole = total + shown.bias
            exact = whole == shown.score
            text = f"sum {total:g} + bias {shown.bias:g} = {whole:g}"
            text += ", the score" if exact else f", not {shown.score:g}"
            ax[column].text(0, -0.12, text, **_below(ax[column], GOOD if exact else BAD))
    head = "Averaging the gradient points to the wrong organ"
    figure.text(0.075, 0.957, head, fontsize=20, weight="bold", color=INK)
    line = "The head counts organ 1 for the label and organ 2, which is brighter, against it."
    figure.text(0.075, 0.928, line, fontsize=12.5, color=SOFT)
    foot = "Blue speaks for the label, red against it."
    figure.text(0.075, 0.022, foot, fontsize=11, color=SOFT)
    return figure


def _below(ax: Axes, color: str) -> dict:
    return {"transform": ax.transAxes, "fontsize": 11.5, "color": color, "weight": "bold"}


def _grid(ax: Axes, values: np.ndarray, peak: float, grey: bool) -> None:
    """Cells in colour with their values."""
    low = 0 if grey else -peak
    ax.imshow(values, "Greys" if grey else "RdBu", vmin=low, vmax=peak * 1.25, zorder=0)
    if not grey:
        ax.images[0].set_clim(-peak * 1.25, peak * 1.25)
    for line in np.arange(-0.5, 6):
        ax.axhline(line, color="white", lw=1.5)
        ax.axvline(line, color="white", lw=1.5)
    for (i, j), value in np.ndenumerate(values):
        if value:
            text = ax.text(j, i, f"{value:g}", ha="center", va="center", fontsize=10.5, color=INK)
            text.set_path_effects([patheffects.withStroke(linewidth=2.2, foreground="white")])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _organs(ax: Axes) -> None:
    for x, y, name in ORGANS:
        square = {"xy": (x, y), "width": 2, "height": 2, "fill": False}
        ax.add_patch(_rectangle(**square, edgecolor=INK, lw=1.4))
        ax.text(x + 1, y - 0.12, name, ha="center", va="bottom", fontsize=8.5, color=SOFT)


def _rectangle(**options):
    from matplotlib.patches import Rectangle

    return Rectangle(**options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the picture (PNG)")
    out = parser.parse_args().out
    draw(example(), example(slices=2)).savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    main()
