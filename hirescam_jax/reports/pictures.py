"""A picture of one label's map on the CT: the slices with the strongest evidence.

Axial, coronal and sagittal planes through the peak of the map, in radiological convention (the
patient's right is on the left), in true proportions and true patient axes, also for a scan that is
stored obliquely or upside down.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy import ndimage

from hirescam_jax.data.grid import resample
from hirescam_jax.data.volume import Volume
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.methods import METHODS
from hirescam_jax.explanations.verdict import HeadVerdict
from hirescam_jax.reports.figures import (
    BLACK,
    INK,
    SOFT,
    WINDOW_HU,
    draw_ct,
    figure_of,
    overlay_colors,
)

MAX_PIXELS = 640  # along a side of a plane
SLICE_DISTANCE_MM = 12.0  # between two axial slices that are shown

WARNING = "#ffb454"
PLANES = ("axial", "coronal", "sagittal")
# Per plane: the world axes (x, y, z) to the right and downwards, both against their direction,
# then the letters at the left, right, top and bottom edge.
PLANE_AXES = ((0, 1), (0, 2), (1, 2))
PLANE_LETTERS = ("RLAP", "RLSI", "APSI")


def place(point_mm: Sequence[float] | np.ndarray) -> str:
    """A point in RAS millimetres in words: "R 52  P 10  I 120"."""
    return "  ".join(_place(axis, point_mm[axis]) for axis in range(3))


def label_picture(
    volume: Volume,
    map_dhw: Float[np.ndarray, "d h w"],
    affine: Float[np.ndarray, "4 4"],
    *,
    label: str,
    probability: float,
    method: str,
    verdict: HeadVerdict | None = None,
) -> Figure:
    """The CT with the positive evidence for one label in colour.

    Upper row: axial, coronal and sagittal through the cell with the strongest evidence. Lower
    row: the same axial slice without colour, and the next two strongest axial slices. Negative
    evidence is not shown; the map's file has it.

    Args:
        volume: Hounsfield units, on its own grid.
        map_dhw: raw signed map on the feature grid.
        affine: [4, 4] of the feature grid, indices -> RAS millimetres.
        label, probability, method: for the title.
        verdict: what the map guarantees, for the line below it; a warning where that is nothing.

    Returns:
        A figure that belongs to no window; nothing has to be closed.
    """
    normalized_dhw = np.asarray(normalize_map(jnp.asarray(map_dhw), spatial_axes=3))
    peak_mm, slices_mm = _strongest(normalized_dhw, affine)
    box_mm = _body_box(volume, peak_mm)

    # Inches: a column is as wide as an axial plane, a row as high as its planes on that scale.
    width, column, gap, head, side = 13.2, 3.95, 0.35, 1.05, 1.1
    _, depth, height = np.minimum(1.5, np.diff(box_mm, axis=0)[0] / np.diff(box_mm[:, 0])) * column
    rows = [max(depth, height), depth]
    total = sum(rows) + head + gap + 0.15
    figure = figure_of(width, total)
    axes = figure.subplots(2, 3, gridspec_kw={"height_ratios": rows})
    figure.subplots_adjust(
        0.15 / width, 0.15 / total, 1 - side / width, 1 - head / total, 0.03, gap * 2 / sum(rows)
    )

    def draw(
        ax: Axes, plane: int, point_mm: np.ndarray, note: str = "", color: bool = True
    ) -> None:
        _draw_plane(ax, volume, normalized_dhw if color else None, affine, plane, point_mm, box_mm)
        position = _place(2 - plane, point_mm[2 - plane])
        ax.set_title(f"{PLANES[plane]}   {position} mm{note}", color=INK, fontsize=10, loc="left")

    for plane in range(3):
        draw(axes[0, plane], plane, peak_mm)
        _draw_cross(axes[0, plane], plane, peak_mm)
    draw(axes[1, 0], 0, peak_mm, ", CT alone", color=False)
    for i, ax in enumerate(axes[1, 1:]):
        if i < len(slices_mm):
            draw(ax, 0, np.array([*peak_mm[:2], slices_mm[i]]))
        else:
            ax.set_axis_off()

    title = f"{label.replace('_', ' ')}   probability {probability:.2f}"
    note = "evidence for the label, share of the maximum"
    if not normalized_dhw.any():
        title += "   no positive evidence"
    figure.text(0.15 / width, 1 - 0.42 / total, title, color=INK, fontsize=17, weight="bold")
    subtitle = f"{METHODS[method].title}   {volume.path.name}"
    figure.text(0.15 / width, 1 - 0.66 / total, subtitle, color=SOFT, fontsize=10.5)
    if verdict is not None:
        color = SOFT if verdict.holds_for(method) else WARNING
        at = {"x": 1 - 0.15 / width, "y": 1 - 0.66 / total, "ha": "right"}
        figure.text(s=verdict.short(method), color=color, fontsize=10.5, **at)
    bar = figure.colorbar(
        ScalarMappable(cmap=overlay_colors()), cax=figure.add_axes((0.945, 0.25, 0.012, 0.5))
    )
    bar.set_label(note, color=INK, fontsize=10)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_edgecolor("#606060")  # pyright: ignore[reportCallIssue]
    return figure


def _strongest(map_dhw: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The place of the peak, and the heights of the two next strongest axial slices, in mm."""
    peak = np.unravel_index(map_dhw.argmax(), map_dhw.shape)
    if not map_dhw.any():
        peak = tuple((np.asarray(map_dhw.shape) - 1) / 2)
    peak_mm = (affine @ [*peak, 1])[:3]
    strength_d = map_dhw.sum(axis=(1, 2))
    heights_mm = affine[2, 3] + affine[2, 0] * np.arange(len(strength_d))
    shown = [float(peak_mm[2])]
    for d in np.argsort(-strength_d, kind="stable"):
        if strength_d[d] > 0 and min(abs(heights_mm[d] - z) for z in shown) >= SLICE_DISTANCE_MM:
            shown.append(float(heights_mm[d]))
    return peak_mm, shown[1:3]


def _body_box(volume: Volume, point_mm: np.ndarray) -> np.ndarray:
    """The patient and the point along the world's axes: [2, 3], low and high corner in mm.

    The patient is the largest connected thing denser than air; the air around is left out.
    """
    corners = np.stack(np.meshgrid(*([-0.5, n - 0.5] for n in volume.voxels.shape)), -1)
    corners_mm = corners.reshape(-1, 3) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    low_mm, high_mm = corners_mm.min(axis=0), corners_mm.max(axis=0)
    coarse_mm, margin_mm = 5.0, 12.0
    coarse = np.diag([coarse_mm] * 3 + [1.0])
    coarse[:3, 3] = low_mm + coarse_mm / 2
    shape = np.ceil((high_mm - low_mm) / coarse_mm).astype(int).tolist()
    dense = resample(volume.voxels, volume.affine, coarse, tuple(shape), -1024.0) > -400
    # The opening cuts the patient off the table, which is often one cell thick.
    parts: np.ndarray = ndimage.label(ndimage.binary_opening(dense))[0]  # pyright: ignore[reportIndexIssue]
    boxes = ndimage.find_objects(parts)
    if boxes:
        body = boxes[np.bincount(parts.ravel())[1:].argmax()]
        start, stop = np.array([(s.start, s.stop) for s in body]).T * coarse_mm + low_mm
        low_mm = np.maximum(low_mm, start - margin_mm)
        high_mm = np.minimum(high_mm, stop + margin_mm)
    return np.stack([np.minimum(low_mm, point_mm - 1), np.maximum(high_mm, point_mm + 1)])


def _draw_plane(
    ax: Axes,
    volume: Volume,
    map_dhw: np.ndarray | None,
    affine: np.ndarray,
    plane: int,
    point_mm: np.ndarray,
    box_mm: np.ndarray,
) -> None:
    """The CT on one plane through a point, with the map above it."""
    across, down = PLANE_AXES[plane]
    low_mm, high_mm = box_mm
    spacing_mm = np.linalg.norm(volume.affine[:3, :3], axis=0)
    pixel_mm = max(min(spacing_mm.min(), 1.5), (high_mm - low_mm).max() / MAX_PIXELS)
    rows, columns = np.ceil((high_mm - low_mm)[[down, across]] / pixel_mm).astype(int)

    plane_affine = np.zeros((4, 4))  # (row, column, 0) -> mm, both against the world's axes
    plane_affine[down, 0] = plane_affine[across, 1] = -pixel_mm
    plane_affine[3 - across - down, 2] = 1
    plane_affine[:, 3] = [*point_mm, 1]
    plane_affine[[across, down], 3] = (high_mm - pixel_mm / 2)[[across, down]]

    def cut(values: np.ndarray, values_affine: np.ndarray, outside: float) -> np.ndarray:
        shape = (int(rows), int(columns), 1)
        return resample(values, values_affine, plane_affine, shape, outside)[..., 0]

    # In mm, with the direction of the axes, so that marks can be drawn in mm too.
    right_mm, bottom_mm = (high_mm[[across, down]] - (columns * pixel_mm, rows * pixel_mm)).tolist()
    extent = (float(high_mm[across]), right_mm, bottom_mm, float(high_mm[down]))
    ct = cut(volume.voxels, volume.affine, WINDOW_HU[0])
    draw_ct(ax, ct, extent)
    if map_dhw is not None:
        ax.imshow(cut(map_dhw, affine, 0.0), overlay_colors(), vmin=0, vmax=1, extent=extent)
    ax.set_anchor("NW")
    left, right, top, bottom = PLANE_LETTERS[plane]
    marks = {left: (0.025, 0.5), right: (0.975, 0.5), top: (0.5, 0.965), bottom: (0.5, 0.035)}
    for letter, (x, y) in marks.items():
        text = ax.text(x, y, letter, transform=ax.transAxes, color=INK, ha="center", va="center")
        text.set_path_effects([withStroke(linewidth=2.5, foreground=BLACK)])


def _draw_cross(ax: Axes, plane: int, point_mm: np.ndarray) -> None:
    """Where the two other planes cut this one: fine lines that leave the point itself free."""
    across, down = PLANE_AXES[plane]
    style = {"color": "#7fd4ff", "linewidth": 0.8, "alpha": 0.7}
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    x, y = float(point_mm[across]), float(point_mm[down])
    gap = 20.0
    ax.plot([left, x + gap], [y, y], **style)
    ax.plot([x - gap, right], [y, y], **style)
    ax.plot([x, x], [top, y + gap], **style)
    ax.plot([x, x], [y - gap, bottom], **style)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def _place(axis: int, position_mm: float) -> str:
    letters = ("RL", "AP", "SI")[axis]
    return f"{letters[0] if position_mm >= 0 else letters[1]} {abs(position_mm):.0f}"
