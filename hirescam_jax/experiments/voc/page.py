"""What `hirescam voc` shows: a table on the terminal, pictures, and a page with both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from hirescam_jax.evaluation.checks import AREAS as FAITHFUL
from hirescam_jax.experiments.voc.maps import MEASURES, METHODS, PairMaps, Pairs, enlarged
from hirescam_jax.experiments.voc.photos import CLASSES, VOC, VOID
from hirescam_jax.reports import pages
from hirescam_jax.reports.figures import BLACK, INK, SOFT, figure_of, save_png
from hirescam_jax.reports.text import aligned

SHOWN = 12  # pairs with pictures
TITLES = {
    "hirescam": "HiResCAM",
    "gradcam": "Grad-CAM",
    "centre_blob": "centre blob",
    "random": "random map",
    "iou": "IoU",
    "dice": "Dice",
    "otsu_iou": "IoU (Otsu)",
    "otsu_dice": "Dice (Otsu)",
    "pointing_game": "pointing game",
    "energy": "energy",
    "rank_accuracy": "rank accuracy",
    "average_precision": "avg. precision",
    "insertion": "insertion",
    "deletion": "deletion (low is good)",
    "road": "ROAD",
    "gap": "global average",
    "flatten": "flatten",
}
OUTLINE = "#ffe14b"


def tables_of(result: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Measures of all maps by title, a map a row: over all pairs, over those that each head
    predicts, and faithfulness."""
    heads = result["heads"]
    tables = {
        "All pairs": _rows([(TITLES[head], heads[head]) for head in heads], MEASURES),
        "Predicted pairs": _rows(
            [
                (f"{TITLES[head]} ({of['predictions']['pairs']})", of["predicted"])
                for head, of in heads.items()
                if of["predictions"]["pairs"]
            ],
            MEASURES,
        ),
        "Faithfulness": _rows(
            [
                (f"{TITLES[head]} ({of['faithfulness']['pairs']})", of["faithfulness"])
                for head, of in heads.items()
                if of.get("faithfulness", {}).get("pairs")
            ],
            FAITHFUL,
        ),
    }
    return {title: rows for title, rows in tables.items() if len(rows) > 1}


def _rows(heads: list[tuple[str, dict[str, Any]]], measures: Sequence[str]) -> list[list[str]]:
    rows = [["mean over pairs", *(TITLES[m] for m in measures)]]
    for title, figures in heads:
        for method, of_map in figures["maps"].items():
            cells = [_interval(of_map[m], "{:.2f}") for m in measures]
            rows.append([f"{title}, {TITLES[method]}", *cells])
            if method == METHODS[-1]:
                gain = [_interval(figures["gain"][m], "{:+.2f}") for m in measures]
                rows.append(["  HiResCAM less Grad-CAM", *gain])
    return rows


def _interval(interval: dict[str, Any], form: str) -> str:
    """ "0.31 (0.28, 0.34)"; "0" for a difference that is not even rounding, and without an interval
    the value alone."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if value is None:
        return "n/a"
    if "+" in form and max(abs(end) for end in (value, low, high) if end is not None) < 5e-4:
        return "0"
    if low is None:
        return form.format(value)
    return f"{form.format(value)} ({form.format(low)}, {form.format(high)})"


def lines_of(result: dict[str, Any]) -> list[str]:
    """What the figures say about the two maps, one line a fact."""
    lines = []
    for head, figures in result["heads"].items():
        found, verdict = figures["predictions"], figures["verdict"]
        apart, residuals = figures["difference"], figures["residuals"]
        lines += [
            f"{TITLES[head]}: {verdict['text']}",
            f"  predictions: mean average precision "
            f"{_interval(found['average_precision'], '{:.3f}')} over "
            f"{found['average_precision']['classes']} classes, AUROC "
            f"{_interval(found['auroc'], '{:.3f}')} over {found['auroc']['classes']}; "
            f"{found['pairs']} of {result['data']['val']['pairs']} pairs predicted (probability "
            "1/2 or more)",
            f"  |sum of map + bias - score|, largest: HiResCAM "
            f"{residuals['hirescam']:.2g}, Grad-CAM {residuals['gradcam']:.2g}",
        ]
        if "agreement" in figures:
            a = figures["agreement"]
            what = "float32 rounding" if a["at_rounding"] else "MORE THAN float32 ROUNDING"
            lines.append(
                f"  largest difference of the two maps {a['hirescam_gradcam']:.1e} of the map's "
                f"size (to CAM in float64: {a['hirescam_cam64']:.1e} and {a['gradcam_cam64']:.1e}; "
                f"rounding may cost {a['rounding']:.1e}): {what}"
            )
        else:
            lines.append(
                f"  the two maps differ by {apart['relative_l1']:.0%} of HiResCAM's size (L1), "
                f"correlation {apart['correlation']:.2f}; another peak in "
                f"{apart['peak_moved']:.0%} of the pairs, another sign in "
                f"{apart['sign_changed']:.0%} of the cells; of the difference "
                f"{apart['l1_in_object']:.0%} lies in the object, {apart['l1_in_rest']:.0%} in the "
                f"rest of the photo, {apart['l1_in_void']:.0%} in void and padding"
            )
    return lines


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    tables = [f"{title}\n{aligned(rows)}\n" for title, rows in tables_of(result).items()]
    return "\n".join([*tables, *lines_of(result)])


def write_page(
    out: Path, result: dict[str, Any], maps: dict[str, PairMaps], pairs: Pairs, source: VOC
) -> None:
    """Writes pictures/*.png of the pairs whose maps differ most on the flattened head, and
    voc.html, which holds them too.

    Pairs that the network predicts (probability of 1/2 and more) come first.
    """
    (out / "pictures").mkdir()
    found = result["heads"]["flatten"]["pairs"]
    order = sorted(
        range(len(found)),
        key=lambda i: (found[i]["probability"] < 0.5, -np.nan_to_num(found[i]["relative_l1"])),
    )
    shown = []
    for rank, i in enumerate(order[:SHOWN], start=1):
        name = source.names[pairs.photo[i]]
        figure = picture(source[pairs.photo[i]], int(pairs.label[i]), maps, i, name, found[i])
        file = out / "pictures" / f"{rank:02d}_{name}_{CLASSES[pairs.label[i]]}.png"
        save_png(file, figure)
        shown.append({"name": file.stem, "png": pages.picture(file.read_bytes())})
    pages.write_page(
        out / "voc.html",
        "voc.html",
        result=result,
        flatten=result["heads"]["flatten"],
        gap=result["heads"]["gap"],
        tables=tables_of(result),
        lines=lines_of(result),
        pictures=shown,
    )


def picture(
    item: dict[str, np.ndarray],
    label: int,
    maps: dict[str, PairMaps],
    i: int,
    name: str,
    figures: dict[str, Any],
) -> Figure:
    """A pair's photo with the outline of its mask, Grad-CAM, HiResCAM and their difference on the
    flattened head; last HiResCAM on the global-average head. Each map has its own colour scale; its
    end, in units of the score, stands above it."""
    image, mask = item["image"], item["mask"]
    size = len(image)
    inside = mask == label + 1
    rows, columns = (np.flatnonzero(_photo_area(item).any(axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    flat, gap = maps["flatten"], maps["gap"]
    apart = flat.hirescam[i] - flat.gradcam[i]
    gap_apart = np.abs(gap.hirescam[i] - gap.gradcam[i]).max()
    tiny = np.finfo(np.float32).tiny
    scales = [np.abs(m).max() for m in (flat.gradcam[i], flat.hirescam[i], apart, gap.hirescam[i])]
    panels = [
        ("photo and mask", None, 1.0),
        ("Grad-CAM, flatten", flat.gradcam[i], scales[0]),
        ("HiResCAM, flatten", flat.hirescam[i], scales[1]),
        ("HiResCAM − Grad-CAM", apart, scales[2]),
        ("HiResCAM, global average", gap.hirescam[i], scales[3]),
    ]
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    panel = 2.9
    head, foot = 0.95, 0.62
    total = (panel * height / width + head + foot, panel * len(panels))
    figure = figure_of(total[1], total[0])
    axes = figure.subplots(1, len(panels))
    figure.subplots_adjust(0.004, foot / total[0], 0.996, 1 - head / total[0], 0.02)
    for ax, (title, values, peak) in zip(axes, panels, strict=True):
        large = None if values is None else np.asarray(enlarged(values[None], size))[0]
        _draw(ax, image[box], None if large is None else large[box], float(peak), inside[box])
        ax.set_title(title, color=INK, fontsize=11.5, loc="left")
        if large is not None and "−" not in title:
            counted = np.where(mask == VOID, -np.inf, large)
            at = np.unravel_index(counted[box].argmax(), counted[box].shape)
            if counted.max() <= 0:  # it points nowhere
                continue
            (cross,) = ax.plot(at[1], at[0], "+", color="white", ms=13, mew=2, clip_on=False)
            cross.set_path_effects([withStroke(linewidth=4, foreground=BLACK)])
    notes = [
        f"IoU {figures[f'iou_{m}']:.2f}, energy {figures[f'energy_{m}']:.2f}"
        for m in ("gradcam", "hirescam")
    ]
    notes += [
        f"{figures['relative_l1']:.0%} of HiResCAM, correlation {figures['correlation']:.2f}",
        f"Grad-CAM differs by {gap_apart / max(scales[3], tiny):.0e} of it",
    ]
    for ax, note, scale in zip(axes[1:], notes, scales, strict=True):
        place = {"transform": ax.transAxes, "fontsize": 10, "va": "top"}
        ax.text(0, -0.02, note, color=INK, **place)
        ax.text(1, 1.02, f"±{scale:.2g}", color=SOFT, ha="right", **{**place, "va": "bottom"})
    of_gap = 1 / (1 + np.exp(-np.float64(gap.logit[i])))
    title = CLASSES[label]
    note = f"probability {figures['probability']:.2f} flatten, {of_gap:.2f} global average"
    left = 0.06 / total[1]
    figure.text(0.2, 1 - 0.36 / total[0], note, color=SOFT, fontsize=12)
    figure.text(left, 1 - 0.36 / total[0], title, color=INK, fontsize=16, weight="bold")
    note = f"{name}   blue speaks for the class, red against it; + strongest evidence"
    figure.text(left, 0.12 / total[0], note, color=SOFT, fontsize=10)
    return figure


def _photo_area(item: dict[str, np.ndarray]) -> np.ndarray:
    """Where the photo is: the mask's rows and columns that are not all void."""
    seen = item["mask"] != VOID
    return seen.any(1)[:, None] & seen.any(0)[None]


def _draw(
    ax: Axes, image: np.ndarray, values: np.ndarray | None, peak: float, inside: np.ndarray
) -> None:
    """The photo, in grey under a signed map in colour, and the outline of the object."""
    if values is None:
        ax.imshow(image)
    else:
        # The sign is the colour, the size how far it covers the grey.
        grey = 0.15 + 0.75 * (image @ np.array([0.299, 0.587, 0.114]) / 255)
        share = np.clip(values / (peak or 1.0), -1, 1)
        colors = colormaps["RdBu"](0.5 + np.sign(share) * (0.3 + 0.15 * np.abs(share)))[..., :3]
        alpha = (0.9 * np.abs(share) ** 0.8)[..., None]
        ax.imshow(np.clip((1 - alpha) * grey[..., None] + alpha * colors, 0, 1))
    lines = ax.contour(inside.astype(float), [0.5], colors=[OUTLINE], linewidths=1.6)
    lines.set_path_effects([withStroke(linewidth=3.2, foreground=BLACK)])
    ax.set_axis_off()
