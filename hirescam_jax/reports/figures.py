"""What all figures share: sizes, colours, a CT's window, and the way to a PNG.

Pictures are on black; charts have no ground of their own, so that a page's shows through.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

from hirescam_jax.files import atomic_file

DPI = 110
WINDOW_HU = (-1100.0, 400.0)  # wide: lung and mediastinum in one picture
BLACK, INK, SOFT = "#000000", "#e8e8e8", "#a0a0a0"  # of pictures
ACCENT, MUTED, GRID = "#0b6e99", "#8a8f98", "#e5e7eb"  # of charts; their text is black


def figure_of(width: float, height: float, ground: str = BLACK) -> Figure:
    """An empty figure, in inches. It belongs to no window; nothing has to be closed."""
    made = Figure(figsize=(width, height), facecolor=ground)
    FigureCanvasAgg(made)
    return made


def charts(
    width: float, height: float, columns: int = 1, ground: str = "none", **options: Any
) -> tuple[Figure, list[Axes]]:
    """A row of empty charts: no frame at the top and right, fine lines for the y axis.

    Args:
        options: of `Figure.subplots`.
    """
    made = figure_of(width, height, ground)
    axes = list(made.subplots(1, columns, squeeze=False, **options)[0])
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color=GRID, lw=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9)
    return made, axes


def draw_ct(
    ax: Axes, ct_hw: np.ndarray, extent: tuple[float, float, float, float] | None = None
) -> None:
    """A plane of Hounsfield units in grey."""
    ax.imshow(ct_hw, "gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], extent=extent)
    ax.set_axis_off()


def overlay_colors() -> Colormap:
    """Perceptually even, and transparent where there is little evidence."""
    values = np.linspace(0, 1, 256)
    colors = colormaps["inferno"](0.2 + 0.8 * values)
    colors[:, 3] = 0.65 * np.clip((values - 0.05) / 0.45, 0, 1)
    return ListedColormap(colors)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def save_png(path: Path, figure: Figure) -> None:
    """Writes the figure, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    data = png(figure)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
