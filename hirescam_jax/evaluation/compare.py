"""Do two runs look at the same places? Their maps of the same volumes, side by side.

Of two trainings that differ in their seed it is the repeatability of the maps. Of a training and
one with `permute_labels` it is the label randomisation of Adebayo et al. (NeurIPS 2018): maps that
stay alike show the image and not what was learnt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hirescam_jax.config import measured_alike
from hirescam_jax.data.pipeline import Source, chosen_volumes, digest_of, groups_of, make_batch
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.evaluate import content_of
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.summary import choose_thresholds, named_thresholds
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.files import atomic_file
from hirescam_jax.inference.maps import maps_program
from hirescam_jax.losses import allowed_of
from hirescam_jax.metrics import ORGAN_IOU_THRESHOLDS, organ_iou, random_maps, similarity
from hirescam_jax.metrics.bootstrap import mean_intervals
from hirescam_jax.progress import progress
from hirescam_jax.reports.text import aligned, interval_text
from hirescam_jax.runs.run import Run, load_run
from hirescam_jax.runs.setup import open_data

KINDS = ("ssim", "spearman", "spearman_absolute")
TITLES = {
    "ssim": "SSIM",
    "spearman": "rank corr.",
    "spearman_absolute": "of |map|",
    "organ_iou_a": "OrganIoU A",
    "organ_iou_b": "OrganIoU B",
    "organ_iou_gain": "A less B",
}
NAMES = {**{n: METHODS[n].title for n in EVALUATED}, "random": "A and a random map"}


def compare_folders(
    run_a: Path,
    run_b: Path,
    volumes: int,
    out: Path | None = None,
    which: Literal["best", "latest"] = "best",
) -> str:
    """`compare` of two run folders, as a JSON file; returns its `table` and where it is.

    Args:
        out: default compare_RUN_B.json in the folder of run_a.
        which: of their weights.
    """
    result = compare([load_run(run, which) for run in (run_a, run_b)], volumes)
    target = out or run_a / f"compare_{run_b.resolve().name}.json"
    write(target, result)
    return f"{table(result)}\n{target}"


def compare(runs: Sequence[Run], volumes: int) -> dict[str, Any]:
    """Compares the maps of two runs on `volumes` volumes of the test split, for every label that a
    volume truly has.

    OrganIoU is at each run's own thresholds, those that are best for it on the validation split:
    from its evaluation.json where that is of the same weights and volumes, and measured anew
    otherwise. It is over the pairs for which both runs have one.

    Returns:
        {"runs": [{"path", "step", "seed", "permute_labels", "thresholds": {method: {label: number
        or null}}, "thresholds_from": "evaluation.json" or "validation split"}] * 2, "volumes",
        "patients", "pairs" of volume and label, "methods": {"hirescam", "gradcam", "random":
        {"ssim", "spearman", "spearman_absolute" between the runs' maps (between those of the first
        run by HiResCAM and a random map), "organ_iou_a", "organ_iou_b", "organ_iou_gain" of a over
        b}, "labels": {label: {"pairs", "patients", and method: {the same}}}}; each measure is
        {"value", "low", "high", and "pairs", "patients", "labels" that it is over}, with 95 %
        bootstrap intervals by patient, null where nothing is defined, or of fewer than five
        patients.

    Raises:
        UserError: runs of other labels, grids or data, maps without slices, or more volumes than
            the test split has.
    """
    splits = [[_open(run, split) for run in runs] for split in ("val", "test")]
    _check(runs, splits, volumes)
    (validation, _), (test, _) = splits
    thresholds = [_thresholds(run, validation) for run in runs]
    on_test = _pairs(runs, [maps_program(run) for run in runs], test, volumes)
    columns: dict[str, dict[str, np.ndarray]] = {}
    for name in (*EVALUATED, "random"):
        measured = {kind: on_test[name, kind] for kind in KINDS}
        if name in EVALUATED:
            for letter, (of_run, _) in zip("ab", thresholds, strict=True):
                key = f"organ_iou_{letter}"
                measured[key] = _at(of_run[name], runs[0].labels, on_test, (name, key))
            gain = measured["organ_iou_a"] - measured["organ_iou_b"]
            for letter in "ab":
                measured[f"organ_iou_{letter}"][np.isnan(gain)] = np.nan
            measured["organ_iou_gain"] = gain
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
                "thresholds": of_run,
                "thresholds_from": origin,
            }
            for run, (of_run, origin) in zip(runs, thresholds, strict=True)
        ],
        "volumes": volumes,
        "patients": len(np.unique(groups_of(test)[chosen])),
        "pairs": len(pairs),
        "methods": _intervals(columns, pairs, patients),
        "labels": {
            label: {
                "pairs": int((pairs == k).sum()),
                "patients": len(np.unique(patients[pairs == k])),
                **_intervals(
                    {m: {n: v[pairs == k] for n, v in of.items()} for m, of in columns.items()},
                    pairs[pairs == k],
                    patients[pairs == k],
                ),
            }
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


def _thresholds(run: Run, validation: Source) -> tuple[dict[str, Any], str]:
    """{method: {label: threshold, or None}} that is best on the validation split, and where it
    comes from."""
    evaluated = _evaluated(run.path / "evaluation.json")
    if evaluated and evaluated["step"] == run.step:
        same_labels = all(of.keys() == {*run.labels} for of in evaluated["thresholds"].values())
        if same_labels and evaluated["content"] == content_of(validation):
            return evaluated["thresholds"], "evaluation.json"
    best = choose_thresholds(predict(run, validation, f"validation split of {run.path.name}"))
    found = {method: named_thresholds(run.labels, best[method]) for method in EVALUATED}
    return found, "validation split"


def _evaluated(path: Path) -> dict[str, Any] | None:
    """The step, the content of the validation split and the thresholds of an evaluation; None where
    there is none, or one that does not have them."""
    try:
        found = json.loads(path.read_text())
        content = found.get("validation", found)["content"]
        thresholds = {method: found["organ_iou"][method]["thresholds"] for method in EVALUATED}
        return {"step": found["step"], "content": content, "thresholds": thresholds}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _at(
    thresholds: dict[str, float | None], labels: Sequence[str], measured: dict[Any, Any], key: Any
) -> np.ndarray:
    """OrganIoU [P] at the threshold of each pair's label; NaN where it has none."""
    chosen = [thresholds[labels[int(k)]] for k in measured["label"]]
    numbers = np.array([np.nan if t is None else t for t in chosen], float)
    nearest = np.abs(ORGAN_IOU_THRESHOLDS - np.nan_to_num(numbers)[:, None]).argmin(1)
    values = measured[key][np.arange(len(nearest)), nearest].astype(float)
    return np.where(np.isnan(numbers), np.nan, values)


def _intervals(
    columns: dict[str, dict[str, np.ndarray]], labels: np.ndarray, patients: np.ndarray
) -> dict[str, Any]:
    flat = {(m, name): v for m, of_method in columns.items() for name, v in of_method.items()}
    found = mean_intervals(flat, patients)
    for key, values in flat.items():
        known = ~np.isnan(values.astype(float))
        found[key] |= {
            "pairs": int(known.sum()),
            "patients": len(np.unique(patients[known])),
            "labels": len(np.unique(labels[known])),
        }
    return {m: {name: found[m, name] for name in of_method} for m, of_method in columns.items()}


def table(result: dict[str, Any]) -> str:
    """For the terminal: the runs, the means over all pairs, then a label a row for HiResCAM. A mean
    over fewer findings than its row has tells over how many, and of how many labels."""
    lines = []
    for letter, run in zip("AB", result["runs"], strict=True):
        permuted = ", trained on permuted labels" if run["permute_labels"] else ""
        lines.append(
            f"{letter}: {run['path']}, step {run['step']}, seed {run['seed']}{permuted}; "
            f"thresholds of its {run['thresholds_from']}"
        )
    lines.append(
        f"{result['pairs']} findings of {len(result['labels'])} labels in {result['volumes']} "
        f"volumes of {result['patients']} patients; 95 % bootstrap intervals by patient: none for "
        "fewer than five, too narrow for fewer than ten"
    )
    head = list(TITLES.values())
    all_labels = len(result["labels"])

    def cell(measure: dict[str, Any], pairs: int, labels: int) -> str:
        few = f" ({measure['pairs']}" * (0 < measure["pairs"] < pairs)
        few += f" of {measure['labels']} labels" * bool(few and measure["labels"] < labels)
        return interval_text(measure) + few + ")" * bool(few)

    def row(texts: list[str], measures: dict[str, Any], pairs: int, labels: int) -> list[str]:
        found = (cell(measures[n], pairs, labels) if n in measures else "" for n in TITLES)
        return [*texts, *found]

    means = [
        row([NAMES[name]], measures, result["pairs"], all_labels)
        for name, measures in result["methods"].items()
    ]
    labels = [
        row([label, str(of["pairs"]), str(of["patients"])], of["hirescam"], of["pairs"], 1)
        for label, of in result["labels"].items()
    ]
    text = [
        *lines,
        f"\n{aligned([['A and B, mean', *head], *means])}",
        f"\n{aligned([['HiResCAM, by label', 'findings', 'patients', *head], *labels])}",
    ]
    if any(" (" in cell for cells in (*means, *labels) for cell in cells[1:]):
        text.append("(n): over n of the findings, those for which the measure is defined")
    return "\n".join(text)


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2))
