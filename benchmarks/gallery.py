"""Why averaging the gradient can point to the wrong organ: an example that is exact by hand.

    python benchmarks/gallery.py            # writes benchmarks/results/gallery.png

One feature channel A sees two organs: 2 x 2 cells of strength 2 in the first, 2 x 2 cells of
strength 3 in the second. The head is one linear layer with bias 1: every cell of the first organ's
quadrant (3 x 3 cells) weighs +2, every cell of the second's -1, the rest 0. So the first organ
speaks for the label and the second, though stronger, against it:

    score     4 cells x 2 x (+2) + 4 cells x 3 x (-1) + 1 = 16 - 12 + 1 = 5
    HiResCAM  gradient x A: +4 in the first organ, -3 in the second; 16 - 12 = 4 = score - bias
    Grad-CAM  the mean gradient is (9 x 2 - 9 x 1) / 36 = 1/4, times A: 1/2 in the first organ, 3/4
              in the second, where the peak is; 4 x 1/2 + 4 x 3/4 = 5, and 5 + 1 is not the score

In 3D the same two organs lie in the two slices of a volume. The score and HiResCAM stay; the mean
gradient is (9 x 2 - 9 x 1) / 72 = 1/8, Grad-CAM has 1/4 and 3/8, and its sum is 2.5.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hirescam_jax.explanations.cam import gradcam, hirescam

OUT = Path(__file__).parent / "results" / "gallery.png"
FIRST, SECOND = (slice(0, 3), slice(0, 3)), (slice(3, 6), slice(3, 6))  # quadrants
INK, SOFT, GOOD, BAD = "#1d232b", "#5d6673", "#0b6e99", "#b3403a"
EMPTY = "#f1f2f4"
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
    figure = Figure(figsize=(12.4, 12.2), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 4)
    figure.subplots_adjust(0.075, 0.05, 0.975, 0.84, 0.14, 0.4)
    for ax in axes[2]:  # one volume with the row above
        box = ax.get_position()
        ax.set_position((box.x0, box.y0 + 0.055, box.width, box.height))
    rows = [(plane, ...), (volume, 0), (volume, 1)]
    for row, (shown, index) in zip(axes, rows, strict=True):
        for ax, name in zip(row, ("features", "gradient", "gradcam", "hirescam"), strict=True):
            values = getattr(shown, name)
            _grid(ax, values[index], np.abs(values).max(), name == "features")
            if name != "gradient":  # it weighs more places than the organs
                _organs(ax, shown.features[index])
    titles = ("features A", "gradient of the score", "Grad-CAM", "HiResCAM")
    notes = ("what the network sees", "what its head weighs", "mean gradient × A", "gradient × A")
    for ax, title, note in zip(axes[0], titles, notes, strict=True):
        ax.text(0, 1.14, title, transform=ax.transAxes, fontsize=14, weight="bold", color=INK)
        ax.text(0, 1.045, note, transform=ax.transAxes, fontsize=11, color=SOFT)
    for ax, name in zip(axes[:, 0], ("2D", "3D, slice 1", "3D, slice 2"), strict=True):
        place = {"transform": ax.transAxes, "rotation": 90, "ha": "center", "va": "center"}
        ax.text(-0.15, 0.5, name, fontsize=13, weight="bold", color=INK, **place)
    for ax, shown in ((axes[0], plane), (axes[2], volume)):
        _below(ax[0], f"score {shown.score:g}", f"of which the bias is {shown.bias:g}", INK)
        for column, name in ((2, "gradcam"), (3, "hirescam")):
            total = float(getattr(shown, name).sum())
            whole = total + shown.bias
            exact = whole == shown.score
            meaning = "the score" if exact else f"the score is {shown.score:g}"
            text = f"sum {total:g} + bias {shown.bias:g} = {whole:g}"
            _below(ax[column], text, meaning, GOOD if exact else BAD)
    head = "Averaging the gradient points to the wrong organ"
    figure.text(0.075, 0.958, head, fontsize=20, weight="bold", color=INK)
    line = "The head counts organ 1 for the label and organ 2, which is stronger, against it."
    figure.text(0.075, 0.93, line, fontsize=12.5, color=SOFT)
    foot = "Blue speaks for the label, red against it. Dashed: an organ of the other slice."
    figure.text(0.075, 0.018, foot, fontsize=11, color=SOFT)
    return figure


def _below(ax: Axes, text: str, meaning: str, color: str) -> None:
    ax.text(0, -0.105, text, transform=ax.transAxes, fontsize=12, color=color, weight="bold")
    ax.text(0, -0.19, meaning, transform=ax.transAxes, fontsize=11, color=color)


def _grid(ax: Axes, values: np.ndarray, peak: float, grey: bool) -> None:
    """Cells in colour with their values as fractions; cells of value 0 are light grey."""
    image = ax.imshow(values, "Greys" if grey else "RdBu", vmin=-1.25 * peak, vmax=1.25 * peak)
    if grey:
        image.set_clim(-0.08 * peak, 1.6 * peak)
    image.set_data(np.ma.masked_equal(values, 0))
    ax.set_facecolor(EMPTY)
    colors = image.to_rgba(values)
    for line in np.arange(-0.5, 6):
        ax.axhline(line, color="white", lw=1.5)
        ax.axvline(line, color="white", lw=1.5)
    for (i, j), value in np.ndenumerate(values):
        if value:
            dark = colors[i, j, :3] @ (0.3, 0.59, 0.11) < 0.55
            text = str(Fraction(float(value))).replace("-", "\N{MINUS SIGN}")
            ax.text(j, i, text, ha="center", va="center", fontsize=12, color="w" if dark else INK)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _organs(ax: Axes, features: np.ndarray) -> None:
    for x, y, name in ORGANS:
        here = features[round(y + 0.5), round(x + 0.5)] > 0
        line = {"lw": 1.6, "edgecolor": INK} if here else {"lw": 1.2, "edgecolor": SOFT, "ls": "--"}
        ax.add_patch(Rectangle((x, y), 2, 2, fill=False, zorder=3, **line))
        at = {"ha": "center", "va": "bottom", "fontsize": 9.5, "zorder": 4}
        ax.text(x + 1, y - 0.12, name, color=INK if here else SOFT, **at)


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
