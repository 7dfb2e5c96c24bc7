"""What is in a store: counts, labels and what goes with what, Hounsfield units, regions, pictures.

Headers and findings of all volumes are read, the voxels of a sample only.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hirescam_jax.data.store.codec import Record
from hirescam_jax.data.store.store import Store, read_header
from hirescam_jax.data.study import ANYWHERE
from hirescam_jax.errors import UserError
from hirescam_jax.progress import progress
from hirescam_jax.reports import pages
from hirescam_jax.reports.figures import ACCENT, charts, draw_ct, figure_of
from hirescam_jax.reports.text import aligned

HU_EDGES = np.arange(-1050, 1551, 20)
SAMPLE = 24  # volumes whose voxels are read
THUMBNAILS = 12
OUTLINES = ("#4be3ff", "#ffb14b", "#ff6b9d", "#8df06b", "#c49bff", "#ffe14b", "#ff7b54", "#5fe0b7")


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """Of a store.

    counts: volumes by split.
    positives: volumes with each label, by split.
    together: volumes with both labels.
    found_in: volumes with the label in the region.
    missing: volumes without a voxel of the region.
    scan_spacing_mm: of each scan, sorted from its finest to its coarsest axis.
    histogram: share of voxels between two `HU_EDGES`, in a sample; the ends hold what is beyond.
    """

    path: Path
    header: dict[str, Any]
    size: int
    patients: int
    counts: dict[str, int]
    positives: dict[str, Int[np.ndarray, "K"]]
    together: Int[np.ndarray, "K K"]
    found_in: Int[np.ndarray, "K R"]
    missing: Int[np.ndarray, "R"]
    scan_spacing_mm: Float[np.ndarray, "n 3"]
    histogram: Float[np.ndarray, "bins"]
    sampled: int

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def inspect_store(path: Path) -> Summary:
    """Reads what `Summary` holds.

    Raises:
        UserError: as `Store` does.
    """
    header = read_header(path)
    sources = _splits(path, header)
    count = len(header["labels"])
    positives: dict[str, np.ndarray] = {}
    together = np.zeros((count, count), int)
    found_in = np.zeros((count, len(header["regions"])), int)
    missing = np.zeros(len(header["regions"]), int)
    patients, spacings = set(), []
    for split, source in sources.items():
        positives[split] = np.zeros(count, int)
        for i in progress(range(len(source)), f"reading {split}", "header"):
            head, findings = source.head(i)
            present = (findings > 0).any(axis=1)
            positives[split] += present
            together += np.outer(present, present)
            found_in += findings > 0
            missing += [not size for size in head["mask_bytes"]]
            patients.add(head["patient"])
            if "affine" in head["source"]:
                axes = np.asarray(head["source"]["affine"])[:3, :3]
                spacings.append(np.sort(np.linalg.norm(axes, axis=0)))
    sample = _sample(sources, SAMPLE)
    histogram = np.zeros(len(HU_EDGES) - 1)
    for source, i in progress(sample, "reading voxels", "volume"):
        values = np.clip(source[i]["volume"], HU_EDGES[0], HU_EDGES[-1] - 1)
        histogram += np.bincount((values.ravel() - HU_EDGES[0]) // 20, minlength=len(histogram))
    return Summary(
        path=path,
        header=header,
        size=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        patients=len(patients),
        counts={split: len(source) for split, source in sources.items()},
        positives=positives,
        together=together,
        found_in=found_in,
        missing=missing,
        scan_spacing_mm=np.reshape(np.array(spacings, np.float64), (-1, 3)),
        histogram=histogram / histogram.sum(),
        sampled=len(sample),
    )


def text(summary: Summary) -> str:
    """The summary in lines for a terminal."""
    header = summary.header
    shape = " x ".join(map(str, header["shape"]))
    spacing = " x ".join(f"{s:g}" for s in header["spacing_mm"])
    counts = ", ".join(f"{count} {split}" for split, count in summary.counts.items())
    lines = [
        f"{summary.path}: {summary.total} volumes ({counts}) of {summary.patients} patients, "
        f"{summary.size / 1e9:.2f} GB",
        f"grid {shape} voxels of {spacing} mm",
        f"{header.get('rejects', 0)} left out, {header.get('region_fallbacks', 0)} with coarse "
        "organ masks",
    ]
    if len(summary.scan_spacing_mm):
        low, middle, high = (
            " x ".join(f"{s:.2f}" for s in np.quantile(summary.scan_spacing_mm, q, axis=0))
            for q in (0, 0.5, 1)
        )
        lines.append(f"scans of {middle} mm (median; {low} to {high})")
    hu = ", ".join(f"{q:.0%} {_quantile(summary, q):.0f}" for q in (0.01, 0.25, 0.5, 0.75, 0.99))
    lines += [f"Hounsfield units, quantiles of {summary.sampled} volumes: {hu}", ""]
    rows = [["label", *summary.counts, "share", "most often with"]]
    for k, label in enumerate(header["labels"]):
        numbers = [str(found[k]) for found in summary.positives.values()]
        share = f"{summary.together[k, k] / summary.total:.1%}"
        rows.append([label, *numbers, share, _companion(summary, k)])
    regions = [["region", "missing", "findings"]]
    for r, region in enumerate(header["regions"]):
        regions.append([region, str(summary.missing[r]), str(summary.found_in[:, r].sum())])
    return "\n".join([*lines, aligned(rows), "", aligned(regions)])


def write_page(out: Path, path: Path, summary: Summary) -> None:
    """Writes one self-contained HTML page (no network) with pictures of some volumes.

    Raises:
        UserError: a damaged store, or a page that cannot be written.
    """
    header = summary.header
    sources = _splits(path, header)
    names = [name for name in header["regions"] if name != ANYWHERE]
    colors = {name: OUTLINES[i % len(OUTLINES)] for i, name in enumerate(names)}
    pictures = []
    for source, i in progress(_sample(sources, THUMBNAILS), "drawing", "volume"):
        record = source.record(i)
        found = [
            label for label, row in zip(header["labels"], record.findings, strict=True) if row.any()
        ]
        pictures.append(
            {
                "id": record.id,
                "split": next(name for name, other in sources.items() if other is source),
                "found": [label.replace("_", " ") for label in found],
                "coarse": header.get("fallbacks", {}).get(record.id),
                "picture": pages.picture(_thumbnail(record, header, colors)),
            }
        )
    pages.write_page(
        out,
        "inspect.html",
        summary=summary,
        header=header,
        companions=[_companion(summary, k) for k in range(len(header["labels"]))],
        quantiles=np.quantile(summary.scan_spacing_mm, (0, 0.5, 1), axis=0).tolist()
        if len(summary.scan_spacing_mm)
        else None,
        histogram=pages.chart(_histogram(summary), "Share of the voxels by Hounsfield units"),
        together=pages.chart(_together(summary), "Labels that are present together")
        if len(header["labels"]) > 1
        else None,
        colors=colors,
        pictures=pictures,
    )


def _splits(path: Path, header: dict[str, Any]) -> dict[str, Store]:
    names = [name for name in header["splits"] if header.get("counts", {}).get(name)]
    if not names:
        raise UserError(f"{path}: holds no volumes: look at its rejects.csv")
    return {name: Store(path, name, (1, 1, 1)) for name in names}


def _sample(sources: dict[str, Store], count: int) -> list[tuple[Store, int]]:
    """Volumes at even steps through all splits."""
    every = [(source, i) for source in sources.values() for i in range(len(source))]
    chosen = np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))
    return [every[i] for i in chosen]


def _companion(summary: Summary, k: int) -> str:
    """The label that is most often present together with label k, as a share of k's volumes."""
    both = summary.together[k].copy()
    both[k] = 0
    if not both.any():
        return ""
    other = int(both.argmax())
    name = summary.header["labels"][other]
    return f"{name} ({both[other] / summary.together[k, k]:.0%})"


def _quantile(summary: Summary, q: float) -> float:
    return float(HU_EDGES[int(np.searchsorted(np.cumsum(summary.histogram), q))])


# -- pictures -------------------------------------------------------------------------------------


def _thumbnail(record: Record, header: dict[str, Any], colors: dict[str, str]) -> Figure:
    """Axial, coronal and sagittal plane through the middle of the masks, with their outlines."""
    shown = {name: record.masks[r] for r, name in enumerate(header["regions"]) if name != ANYWHERE}
    extent_mm = np.asarray(record.volume.shape) * header["spacing_mm"]
    middle = _middle([mask for mask in shown.values() if mask.any()], record.volume.shape)
    d_mm, h_mm, w_mm = extent_mm / extent_mm.max() * 3.2
    sizes = ((h_mm, w_mm), (d_mm, w_mm), (d_mm, h_mm))
    figure = figure_of(sum(w for _, w in sizes), max(h_mm, d_mm))
    ratios = [w for _, w in sizes]
    axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": ratios}, squeeze=False)[0]
    figure.subplots_adjust(0, 0, 1, 1, 0.01, 0)
    for axis, ax in enumerate(axes):
        cut = record.volume.take(middle[axis], axis)
        rows, columns = (extent_mm[a] for a in range(3) if a != axis)
        place = (0.0, float(columns), float(rows), 0.0)
        draw_ct(ax, cut, place)
        for name, mask in shown.items():
            outline = mask.take(middle[axis], axis)
            if outline.any() and not outline.all():
                line = {"colors": colors[name], "linewidths": 1.2}
                ax.contour(outline, [0.5], origin="upper", extent=place, **line)
        ax.set_ylim(rows, 0)
    return figure


def _middle(masks: list[Shaped[np.ndarray, "D H W"]], shape: tuple[int, ...]) -> list[int]:
    """Of the box around all masks, a little off the centre line, where the lungs are."""
    middle = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        marked = [np.flatnonzero(mask.any(axis=others)) for mask in masks]
        low = min((int(m[0]) for m in marked), default=0)
        high = max((int(m[-1]) for m in marked), default=shape[axis] - 1)
        share = 0.3 if axis == 2 else 0.5
        middle.append(low + int(share * (high - low)))
    return middle


def _histogram(summary: Summary) -> Figure:
    figure, (ax,) = charts(9.6, 2.6)
    ax.stairs(100 * summary.histogram, HU_EDGES, fill=True, color=ACCENT)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylim(0)
    ax.set_yticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    ax.set_xlabel("Hounsfield units", fontsize=9)
    ax.set_ylabel("% of the voxels", fontsize=9)
    figure.tight_layout()
    return figure


def _together(summary: Summary) -> Figure:
    """Row by row: of the volumes with this label, the share that also have the other one."""
    labels = [label.replace("_", " ") for label in summary.header["labels"]]
    count = np.maximum(1, np.diag(summary.together))[:, None]
    share = np.where(np.eye(len(labels), dtype=bool), np.nan, summary.together / count)
    side = float(np.clip(0.26 * len(labels), 2.2, 14))
    figure = figure_of(side + 2.6, side + 1.8, "none")
    ax = figure.subplots()
    clear = LinearSegmentedColormap.from_list("", [f"{ACCENT}00", ACCENT])  # on any ground
    clear = clear.with_extremes(bad="#80808040")
    image = ax.imshow(share, clear, vmin=0, vmax=1, interpolation="none")
    size = 8.5 if len(labels) <= 40 else 6
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.set_facecolor("none")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    bar = figure.colorbar(image, ax=ax, fraction=0.04, pad=0.03)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # fine lines between its steps otherwise
    bar.ax.set_facecolor("none")
    bar.ax.tick_params(labelsize=8)
    figure.tight_layout()
    return figure
