"""Do two runs look at the same places? Their maps of the same volumes, side by side.

Of two trainings that differ in their seed it is the repeatability of the maps. Of a training and
one with `permute_labels` it is the label randomisation of Adebayo et al. (NeurIPS 2018): maps that
stay alike show the image and not what was learnt.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hirescam_jax.config import measured_alike
from hirescam_jax.data.pipeline import Source, chosen_volumes, digest_of, groups_of, make_batch
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.evaluate import content_of
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.result import OfPairs, RunEvaluation, Thresholds, left_out, plain
from hirescam_jax.evaluation.summary import choose_thresholds, named_thresholds
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.files import atomic_file
from hirescam_jax.inference.maps import maps_program
from hirescam_jax.losses import allowed_of
from hirescam_jax.metrics import ORGAN_IOU_THRESHOLDS, organ_iou, random_maps, similarity
from hirescam_jax.metrics.intervals import mean_intervals
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


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """thresholds: by method; thresholds_from: "evaluation.json" or "validation split"."""

    path: str
    step: int
    seed: int
    permute_labels: bool
    thresholds: dict[str, Thresholds]
    thresholds_from: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared(OfPairs):
    """Also of how many patients and labels the pairs are."""

    patients: int
    labels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedMaps:
    """Similarity of both runs' maps, OrganIoU of each, and what a gains over b."""

    ssim: Compared
    spearman: Compared
    spearman_absolute: Compared
    organ_iou_a: Compared | None = left_out()
    organ_iou_b: Compared | None = left_out()
    organ_iou_gain: Compared | None = left_out()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedLabel:
    """random: the first run's maps by HiResCAM and random ones."""

    pairs: int
    patients: int
    hirescam: ComparedMaps
    gradcam: ComparedMaps
    random: ComparedMaps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs, on pairs of a volume and a label that it truly has.

    Each interval is 95 %, of a bootstrap by patient; None where nothing is defined, or of fewer
    than five patients. methods: "hirescam", "gradcam" and "random", as in `ComparedLabel`; labels:
    those that some volume has.
    """

    runs: tuple[ComparedRun, ComparedRun]
    volumes: int
    patients: int
    pairs: int
    methods: dict[str, ComparedMaps]
    labels: dict[str, ComparedLabel]


def compare(runs: Sequence[Run], volumes: int) -> Comparison:
    """Compares the maps of two runs on `volumes` volumes of the test split, for every label that a
    volume truly has.

    OrganIoU is at each run's own thresholds, those that are best for it on the validation split:
    from its evaluation.json where that is of the same weights and volumes, and measured anew
    otherwise. It is over the pairs for which both runs have one.

    Raises:
        UserError: runs of other labels, grids or data, maps without slices, or more volumes than
            the test split has.
    """
    splits = [[_open(run, split) for run in runs] for split in ("val", "test")]
    _check(runs, splits, volumes)
    (validation, _), (test, _) = splits
    thresholds = [_thresholds(run, validation) for run in runs]
    on_test = _pairs(runs, test, volumes)
    pairs, patients = on_test.label, groups_of(test)[on_test.volume]
    names = [runs[0].labels[k] for k in pairs]
    columns: dict[str, dict[str, np.ndarray]] = {}
    for name in (*EVALUATED, "random"):
        measured = {kind: on_test.values[name, kind] for kind in KINDS}
        if name in EVALUATED:
            for letter, (of_run, _) in zip("ab", thresholds, strict=True):
                key = f"organ_iou_{letter}"
                measured[key] = _at(of_run[name], names, on_test.values[name, key])
            gain = measured["organ_iou_a"] - measured["organ_iou_b"]
            for letter in "ab":
                measured[f"organ_iou_{letter}"][np.isnan(gain)] = np.nan
            measured["organ_iou_gain"] = gain
        columns[name] = measured
    chosen = chosen_volumes(test, volumes)
    first, second = (
        ComparedRun(
            str(run.path), run.step, run.config.seed, run.config.permute_labels, of_run, origin
        )
        for run, (of_run, origin) in zip(runs, thresholds, strict=True)
    )
    return Comparison(
        runs=(first, second),
        volumes=volumes,
        patients=len(np.unique(groups_of(test)[chosen])),
        pairs=len(pairs),
        methods=_intervals(columns, pairs, patients),
        labels={
            label: ComparedLabel(
                pairs=int((pairs == k).sum()),
                patients=len(np.unique(patients[pairs == k])),
                **_intervals(
                    {m: {n: v[pairs == k] for n, v in of.items()} for m, of in columns.items()},
                    pairs[pairs == k],
                    patients[pairs == k],
                ),
            )
            for k, label in enumerate(runs[0].labels)
            if (pairs == k).any()
        },
    )


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
def _measured(
    maps: tuple[dict[str, Array], dict[str, Array]], findings: Array, regions: Array, noise: Array
) -> dict[tuple[str, str], Array]:
    """Of one volume: similarity and OrganIoU at all thresholds, [K, ...], by (method, measure)."""
    first, second = maps
    allowed = allowed_of(findings, regions)
    found: dict[tuple[str, str], Array] = {}
    for name in EVALUATED:
        alike = similarity(first[name], second[name])
        found |= {(name, kind): value[0] for kind, value in alike._asdict().items()}
        for letter, of_run in zip("ab", maps, strict=True):
            iou = organ_iou(normalize_map(of_run[name]), allowed, ORGAN_IOU_THRESHOLDS)
            found[name, f"organ_iou_{letter}"] = iou[0]
    alike = similarity(first["hirescam"], noise)
    return found | {("random", kind): value[0] for kind, value in alike._asdict().items()}


class _Pairs(NamedTuple):
    """Of all pairs of a volume and a label that it has: both numbers [P], and `_measured`."""

    volume: np.ndarray
    label: np.ndarray
    values: dict[tuple[str, str], np.ndarray]


def _pairs(runs: Sequence[Run], source: Source, count: int) -> _Pairs:
    programs = [maps_program(run) for run in runs]
    volumes: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    for index in progress(chosen_volumes(source, count).tolist(), "compare", "volume"):
        batch = make_batch(source, [index])
        maps = tuple(
            program(run.variables, run.normalize(jnp.asarray(batch["volume"])))
            for run, program in zip(runs, programs, strict=True)
        )
        noise = random_maps(maps[0]["hirescam"].shape, index=[index])
        present = np.flatnonzero(batch["findings"][0].any(-1))
        volumes.append(present * 0 + index)
        labels.append(present)
        found = jax.device_get(_measured(maps, batch["findings"], batch["regions"], noise))
        for key, value in found.items():
            parts.setdefault(key, []).append(value[present])
    values = {key: np.concatenate(value) for key, value in parts.items()}
    return _Pairs(np.concatenate(volumes), np.concatenate(labels), values)


def _thresholds(run: Run, validation: Source) -> tuple[dict[str, Thresholds], str]:
    """By method those that are best on the validation split, and where they come from."""
    found = _evaluated(run.path / "evaluation.json", run, content_of(validation))
    if found:
        return found, "evaluation.json"
    best = choose_thresholds(predict(run, validation, f"validation split of {run.path.name}"))
    found = {method: named_thresholds(run.labels, best[method]) for method in EVALUATED}
    return found, "validation split"


def _evaluated(path: Path, run: Run, content: str) -> dict[str, Thresholds]:
    """The thresholds in a run's evaluation; {} where it is of other weights or of a validation
    split of other content, does not have them, or where there is none."""
    try:
        evaluation = RunEvaluation.load(path)
    except UserError:
        return {}
    split = evaluation.validation or evaluation.scores
    if evaluation.step != run.step or split.content != content:
        return {}
    maps = evaluation.scores.organ_iou
    found = {method: maps[method].thresholds or {} for method in EVALUATED if method in maps}
    whole = [method for method, of in found.items() if of.keys() == {*run.labels}]
    return found if len(whole) == len(EVALUATED) else {}


def _at(thresholds: Thresholds, labels: Sequence[str], iou_PT: np.ndarray) -> np.ndarray:
    """OrganIoU [P] at the threshold of each pair's label; NaN where it has none."""
    chosen = [thresholds[label] for label in labels]
    numbers = np.array([np.nan if t is None else t for t in chosen], float)
    nearest = np.abs(ORGAN_IOU_THRESHOLDS - np.nan_to_num(numbers)[:, None]).argmin(1)
    values = iou_PT[np.arange(len(nearest)), nearest].astype(float)
    return np.where(np.isnan(numbers), np.nan, values)


def _intervals(
    columns: Mapping[str, Mapping[str, np.ndarray]], labels: np.ndarray, patients: np.ndarray
) -> dict[str, ComparedMaps]:
    flat = {(m, name): v for m, of_method in columns.items() for name, v in of_method.items()}
    found: dict[str, dict[str, Compared]] = {m: {} for m in columns}
    for (method, name), interval in mean_intervals(flat, patients).items():
        known = ~np.isnan(flat[method, name].astype(float))
        found[method][name] = Compared(
            **vars(interval),
            pairs=int(known.sum()),
            patients=len(np.unique(patients[known])),
            labels=len(np.unique(labels[known])),
        )
    return {method: ComparedMaps(**measures) for method, measures in found.items()}


def table(result: Comparison) -> str:
    """For the terminal: the runs, the means over all pairs, then a label a row for HiResCAM. A mean
    over fewer findings than its row has tells over how many, and of how many labels."""
    lines = []
    for letter, run in zip("AB", result.runs, strict=True):
        permuted = ", trained on permuted labels" if run.permute_labels else ""
        lines.append(
            f"{letter}: {run.path}, step {run.step}, seed {run.seed}{permuted}; "
            f"thresholds of its {run.thresholds_from}"
        )
    lines.append(
        f"{result.pairs} findings of {len(result.labels)} labels in {result.volumes} "
        f"volumes of {result.patients} patients; 95 % bootstrap intervals by patient: none for "
        "fewer than five, too narrow for fewer than ten"
    )
    head = list(TITLES.values())
    all_labels = len(result.labels)

    def cell(measure: Compared | None, pairs: int, labels: int) -> str:
        if measure is None:
            return ""
        few = f" ({measure.pairs}" * (0 < (measure.pairs or 0) < pairs)
        few += f" of {measure.labels} labels" * bool(few and measure.labels < labels)
        return interval_text(measure) + few + ")" * bool(few)

    def row(texts: list[str], maps: ComparedMaps, pairs: int, labels: int) -> list[str]:
        return [*texts, *(cell(getattr(maps, name), pairs, labels) for name in TITLES)]

    means = [
        row([NAMES[name]], maps, result.pairs, all_labels) for name, maps in result.methods.items()
    ]
    labels = [
        row([label, str(of.pairs), str(of.patients)], of.hirescam, of.pairs, 1)
        for label, of in result.labels.items()
    ]
    text = [
        *lines,
        f"\n{aligned([['A and B, mean', *head], *means])}",
        f"\n{aligned([['HiResCAM, by label', 'findings', 'patients', *head], *labels])}",
    ]
    if any(" (" in cell for cells in (*means, *labels) for cell in cells[1:]):
        text.append("(n): over n of the findings, those for which the measure is defined")
    return "\n".join(text)


def write(path: Path, result: Comparison) -> None:
    """As JSON."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(plain(result), indent=2))
