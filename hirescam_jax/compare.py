"""Do two runs look at the same places? Their maps of the same volumes, side by side.

Of two trainings that differ in their seed it is the repeatability of the maps. Of a training and
one with `permute_labels` it is the label randomisation of Adebayo et al. (NeurIPS 2018): maps that
stay alike show the image and not what was learnt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hirescam_jax.cam import normalize_map
from hirescam_jax.checkpoint import Run
from hirescam_jax.config import measured_alike
from hirescam_jax.data.pipeline import Source, digest_of, make_batch
from hirescam_jax.errors import UserError
from hirescam_jax.evaluate import EVALUATED, aligned, interval_text
from hirescam_jax.evaluate_checks import chosen_volumes, groups_of, maps_program
from hirescam_jax.files import atomic_file
from hirescam_jax.losses import allowed_of
from hirescam_jax.metrics import (
    ORGAN_IOU_THRESHOLDS,
    best_threshold,
    organ_iou,
    random_maps,
    similarity,
)
from hirescam_jax.progress import progress
from hirescam_jax.resampling import mean_intervals
from hirescam_jax.train import open_data

KINDS = ("ssim", "spearman", "spearman_absolute")
TITLES = {
    "ssim": "SSIM",
    "spearman": "rank corr.",
    "spearman_absolute": "of |map|",
    "organ_iou_a": "OrganIoU A",
    "organ_iou_b": "OrganIoU B",
    "organ_iou_gain": "A less B",
}
NAMES = {"hirescam": "HiResCAM", "gradcam": "Grad-CAM", "random": "A and a random map"}


def compare(runs: Sequence[Run], volumes: int) -> dict[str, Any]:
    """Compares the maps of two runs on `volumes` volumes of the test split, for every label that a
    volume truly has.

    OrganIoU is at each run's own thresholds, those that are best for it on as many volumes of the
    validation split.

    Returns:
        {"runs": [{"path", "step", "seed", "permute_labels"}] * 2, "volumes", "patients", "pairs" of
        volume and label, "methods": {"hirescam", "gradcam", "random": {"ssim", "spearman",
        "spearman_absolute" between the runs' maps (between those of the first run by HiResCAM and a
        random map), "organ_iou_a", "organ_iou_b", "organ_iou_gain" of a over b}, "labels": {label:
        {method: {the same}}}}; each {"value", "low", "high"}, with 95 % bootstrap intervals by
        patient, null where nothing is defined.

    Raises:
        UserError: runs of other labels, grids or data, maps without slices, or more volumes than
            the test split has.
    """
    splits = [[_open(run, split) for run in runs] for split in ("val", "test")]
    _check(runs, splits, volumes)
    (validation, _), (test, _) = splits
    programs = [maps_program(run) for run in runs]
    on_validation = _pairs(runs, programs, validation, min(volumes, len(validation)))
    on_test = _pairs(runs, programs, test, volumes)
    columns: dict[str, dict[str, np.ndarray]] = {}
    for name in (*EVALUATED, "random"):
        measured = {kind: on_test[name, kind] for kind in KINDS}
        for letter in "ab" if name in EVALUATED else "":
            key = name, f"organ_iou_{letter}"
            labels, iou = (on_validation[k] for k in ("label", key))
            measured[key[1]] = _at_best(labels, iou, on_test["label"], on_test[key])
        if name in EVALUATED:
            measured["organ_iou_gain"] = measured["organ_iou_a"] - measured["organ_iou_b"]
        columns[name] = measured
    pairs, patients = on_test["label"], groups_of(test)[on_test["volume"]]
    chosen = chosen_volumes(test, volumes)
    return {
        "runs": [
            {
                "path": str(run.path),
                "step": run.step,
                "seed": run.config.seed,
                "permute_labels": run.config.permute_labels,
            }
            for run in runs
        ],
        "volumes": volumes,
        "patients": len(np.unique(groups_of(test)[chosen])),
        "pairs": len(pairs),
        "methods": _intervals(columns, patients),
        "labels": {
            label: _intervals(
                {m: {n: v[pairs == k] for n, v in of.items()} for m, of in columns.items()},
                patients[pairs == k],
            )
            for k, label in enumerate(runs[0].labels)
            if (pairs == k).any()
        },
    }


def _open(run: Run, split: str) -> Source:
    """A split as `hirescam evaluate` opens it, but without lesions."""
    return open_data(measured_alike(run.config), split)


def _check(runs: Sequence[Run], splits: Sequence[Sequence[Source]], volumes: int) -> None:
    first, second = runs
    for run in runs:
        run.check_maps()
    for sources in splits:
        if any(tuple(s.labels) != run.labels for s, run in zip(sources, runs, strict=True)):
            raise UserError("the data's labels are not those of the runs: give the data they had")
    for name in ("labels", "shape"):
        a, b = getattr(first, name), getattr(second, name)
        if a != b:
            raise UserError(f"{first.path} has {name} {a}, {second.path} {b}: compare runs alike")
    grids = [sources[0][0]["regions"].shape for sources in zip(*splits, strict=True)]
    if grids[0] != grids[1]:
        raise UserError(
            f"{first.path} and {second.path} have maps of {grids[0][1:]} and {grids[1][1:]} cells: "
            "compare runs of one network"
        )
    for a, b in splits:
        if len(a) != len(b) or digest_of(a) != digest_of(b):
            raise UserError(f"{first.path} and {second.path} were trained on other data")
    test = splits[-1][0]
    if not 1 <= volumes <= len(test):
        raise UserError(f"--volumes {volumes}: the test split has {len(test)} volumes")


@jax.jit
def _measured(maps: Any, findings: Any, regions: Any, noise: Any) -> dict[Any, Any]:
    """Of one volume: similarity and OrganIoU at all thresholds, [K, ...], by (method, measure)."""
    first, second = maps
    allowed = allowed_of(findings, regions)
    found = {}
    for name in EVALUATED:
        alike = similarity(first[name], second[name])
        found |= {(name, kind): value[0] for kind, value in alike._asdict().items()}
        for letter, of_run in zip("ab", maps, strict=True):
            iou = organ_iou(normalize_map(of_run[name]), allowed, ORGAN_IOU_THRESHOLDS)
            found[name, f"organ_iou_{letter}"] = iou[0]
    alike = similarity(first["hirescam"], noise)
    return found | {("random", kind): value[0] for kind, value in alike._asdict().items()}


def _pairs(
    runs: Sequence[Run], programs: Sequence[Any], source: Source, count: int
) -> dict[Any, np.ndarray]:
    """`_measured` of all pairs of a volume and a label that it has; their "volume" and "label"."""
    parts: dict[Any, list] = {"volume": [], "label": []}
    for index in progress(chosen_volumes(source, count).tolist(), "compare", "volume"):
        batch = make_batch(source, [index])
        maps = tuple(
            program(run.variables, run.normalize(jnp.asarray(batch["volume"])))
            for run, program in zip(runs, programs, strict=True)
        )
        noise = random_maps(maps[0]["hirescam"].shape, index=[index])
        present = np.flatnonzero(batch["findings"][0].any(-1))
        found = jax.device_get(_measured(maps, batch["findings"], batch["regions"], noise))
        found = {key: value[present] for key, value in found.items()}
        for key, value in {**found, "volume": present * 0 + index, "label": present}.items():
            parts.setdefault(key, []).append(value)
    return {key: np.concatenate(values) for key, values in parts.items()}


def _at_best(
    labels: np.ndarray, on_validation: np.ndarray, test_labels: np.ndarray, on_test: np.ndarray
) -> np.ndarray:
    """OrganIoU [P] at the threshold of each pair's label; NaN where validation has none."""
    result = np.full(len(test_labels), np.nan)
    for label in np.unique(test_labels):
        (chosen,) = best_threshold(on_validation[labels == label][:, None].astype(float))
        if not np.isnan(chosen):
            here = test_labels == label
            result[here] = on_test[here, int(chosen)]
    return result


def _intervals(columns: dict[str, dict[str, np.ndarray]], patients: np.ndarray) -> dict[str, Any]:
    flat = {(m, name): v for m, of_method in columns.items() for name, v in of_method.items()}
    found = mean_intervals(flat, patients)
    return {m: {name: found[m, name] for name in of_method} for m, of_method in columns.items()}


def table(result: dict[str, Any]) -> str:
    """For the terminal: the runs, the means over all pairs, then a label a row for HiResCAM."""
    lines = []
    for letter, run in zip("AB", result["runs"], strict=True):
        permuted = ", trained on permuted labels" if run["permute_labels"] else ""
        lines.append(f"{letter}: {run['path']}, step {run['step']}, seed {run['seed']}{permuted}")
    of = f"{result['volumes']} volumes of {result['patients']} patients"
    lines.append(f"{result['pairs']} findings in {of}; 95 % bootstrap intervals by patient")
    head = list(TITLES.values())

    def row(title: str, measures: dict[str, Any]) -> list[str]:
        return [title, *(interval_text(measures[n]) if n in measures else "" for n in TITLES)]

    means = [row(NAMES[name], measures) for name, measures in result["methods"].items()]
    labels = [row(label, of_label["hirescam"]) for label, of_label in result["labels"].items()]
    tables = [[["A and B, mean", *head], *means], [["HiResCAM, by label", *head], *labels]]
    return "\n".join([*lines, *(f"\n{aligned(rows)}" for rows in tables)])


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2))
