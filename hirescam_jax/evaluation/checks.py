"""Checks of a run's maps that take many passes of the model: faithfulness and sanity.

They look at whole volumes, one or a few at a time, on one device of each process. Of a split they
take a random choice of volumes that is always the same; intervals are by patient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes

from hirescam_jax.compiling import compiler_options
from hirescam_jax.data.pipeline import Source, chosen_volumes, groups_of, make_batch
from hirescam_jax.evaluation.result import Faithfulness, MapFaithfulness, OfPairs, Sanity
from hirescam_jax.inference.maps import maps_program
from hirescam_jax.metrics import (
    blur,
    cascading_randomization,
    deletion,
    insertion,
    layer_order,
    nan_mean,
    road,
    similarity,
)
from hirescam_jax.metrics.baselines import baseline_maps
from hirescam_jax.metrics.intervals import UNKNOWN, mean_intervals, null
from hirescam_jax.models.contract import initial_variables, logits_of
from hirescam_jax.progress import progress
from hirescam_jax.reports.figures import ACCENT, charts, save_png
from hirescam_jax.reports.text import MAP_NAMES, map_name
from hirescam_jax.runs.run import Run

STEPS = 16  # of the insertion and deletion curves
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the cells that ROAD removes
BLUR = 1 / 16  # of the largest axis: standard deviation of where insertion starts
AREAS = ("insertion", "deletion", "road")
CURVES = ("insertion_curve", "deletion_curve", "road_most_first", "road_least_first")
COUNT_STYLE = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "color": "#57606a"}


class Pair(NamedTuple):
    """A volume [1, *volume] and a label of it, with M maps [M, *grid]. number: of the volume, from
    which come the order of equal cells and ROAD's noise."""

    number: int
    volume: Array
    label: int
    maps: Array | np.ndarray


def measure_pairs(
    apply: Callable[..., Any],
    variables: Any,
    pairs: Iterable[Pair],
    fill: Callable[[Array], Array],
) -> dict[str, np.ndarray]:
    """Insertion, deletion and ROAD of P pairs, in one program. Insertion starts from the blurred
    volume (`BLUR`).

    Args:
        apply: variables and volumes [n, *volume] -> logits [n, K].
        fill: volume [1, *volume] -> what deletion puts in.

    Returns:
        `AREAS` [P, M], `CURVES` [P, M, ...]: at 0, 1 / STEPS, ... 1 of the cells, of ROAD at
        `FRACTIONS`. NaN of a map that has one; {} without a pair.
    """

    def logits(variables: Any, volumes: Array) -> Array:
        return apply(variables, volumes)

    @partial(jax.jit, compiler_options=compiler_options())
    def measured(
        variables: Any, volume: Array, maps: Array, label: Array, key: Array
    ) -> dict[str, Array]:
        score, axes = Partial(logits, variables), maps.ndim - 2
        labels = jnp.broadcast_to(label, maps.shape[1:2])
        options: Any = {"labels": labels, "chunk": 8, "key": key}
        start = blur(volume, BLUR * max(volume.shape[1 : 1 + axes]), axes)
        put = insertion(score, volume, maps, start=start, steps=STEPS, **options)
        taken = deletion(score, volume, maps, fill=fill(volume), steps=STEPS, **options)
        removed = road(score, volume, maps, fractions=FRACTIONS, **options)
        areas = put.area, taken.area, removed.combined
        curves = put.scores, taken.scores, removed.most_first, removed.least_first
        named = zip((*AREAS, *CURVES), (*areas, *curves), strict=True)
        return {name: value[0] for name, value in named}

    found: dict[str, list[np.ndarray]] = {}
    for number, volume, label, maps in pairs:
        key = jax.random.key(number)
        one = measured(variables, volume, jnp.asarray(maps)[None], jnp.asarray(label), key)
        for name, value in one.items():
            found.setdefault(name, []).append(np.asarray(value))
    return {name: np.stack(values) for name, values in found.items()}


def faithfulness(run: Run, source: Source, prior: np.ndarray, count: int) -> Faithfulness:
    """Insertion, deletion and ROAD of the run's maps and of the baselines, on `count` volumes
    (`chosen_volumes`), for every label that a volume truly has. Deletion fills with the volume's
    mean.

    Args:
        prior: the organ prior [K, d, h, w].
    """
    maps_of = maps_program(run)
    variables = jax.device_put(run.variables)
    volumes: list[int] = []
    numbers = np.arange(len(run.labels))[None]
    chosen = chosen_volumes(source, count)

    def pairs() -> Iterator[Pair]:
        for index in progress(chosen.tolist(), "faithfulness", "volume"):
            batch = make_batch(source, [index])
            volume = run.normalize(jnp.asarray(batch["volume"]))
            baselines = baseline_maps((1, *prior.shape), np.array([index]), numbers, prior[None])
            maps = {**maps_of(variables, volume), **baselines}
            # A prior may be missing: NaN, as all of its measures then are.
            maps_KM = np.stack([np.asarray(maps[name][0]) for name in MAP_NAMES], axis=1)
            for label in np.flatnonzero(batch["findings"][0].any(axis=-1)).tolist():
                volumes.append(index)
                yield Pair(index, volume, label, maps_KM[label])

    values = measure_pairs(partial(logits_of, run.model), variables, pairs(), jnp.mean)
    patients = groups_of(source)
    return Faithfulness(
        volumes=count,
        patients=len(np.unique(patients[chosen])),
        pairs=len(volumes),
        steps=STEPS,
        fractions=FRACTIONS,
        blur_voxels=BLUR * max(source.shape),
        methods={
            name: _means({key: value[:, m] for key, value in values.items()}, patients[volumes])
            for m, name in enumerate(MAP_NAMES)
        },
    )


def _means(values: Mapping[str, np.ndarray], groups: np.ndarray) -> MapFaithfulness:
    """Means over pairs of volume and label, the patients drawn for the intervals."""
    if not values:
        none = OfPairs(**vars(UNKNOWN), pairs=0)
        return MapFaithfulness(**dict.fromkeys(AREAS, none), **dict.fromkeys(CURVES))
    areas = {
        name: OfPairs(**vars(interval), pairs=int((~np.isnan(values[name])).sum()))
        for name, interval in mean_intervals({n: values[n] for n in AREAS}, groups).items()
    }
    means = [nan_mean(values[name], axis=0) for name in CURVES]
    curves = (None if np.isnan(mean).any() else tuple(mean.tolist()) for mean in means)
    return MapFaithfulness(**areas, **dict(zip(CURVES, curves, strict=True)))


def sanity(run: Run, source: Source, count: int) -> Sanity:
    """Cascading randomisation on `count` volumes (`chosen_volumes`), all labels: how alike the maps
    stay to those of the trained network while its layers are made as new, from the output back.
    """
    volumes = run.normalize(
        jnp.asarray(make_batch(source, chosen_volumes(source, count))["volume"])
    )
    variables = jax.device_put(run.variables)
    fresh = jax.jit(partial(initial_variables, run.model))(
        jax.random.key(run.config.seed + 1), volumes[:1]
    )
    # A restored tree may have an empty collection more, or be of other containers.
    fresh = jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(fresh))
    layers = layer_order(partial(logits_of, run.model), variables, volumes[:1])
    program = maps_program(run)
    compare = jax.jit(similarity)

    def maps_of(variables: Any) -> dict[str, Array]:
        parts = [program(variables, volumes[i][None]) for i in range(count)]
        return jax.tree.map(lambda *maps: jnp.concatenate(maps), *parts)

    trained = maps_of(variables)
    means: dict[str, dict[str, tuple[float | None, ...]]] = {name: {} for name in trained}
    defined: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in trained}
    cascade = cascading_randomization(variables, fresh, layers)
    for _, randomized in progress(cascade, "sanity", "layer", len(layers)):
        for name, maps in maps_of(randomized).items():
            for kind, values in compare(trained[name], maps)._asdict().items():
                known = np.asarray(values).reshape(-1)
                mean, count_known = null(float(nan_mean(known))), int((~np.isnan(known)).sum())
                means[name][kind] = (*means[name].get(kind, ()), mean)
                defined[name][kind] = (*defined[name].get(kind, ()), count_known)
    return Sanity(
        volumes=count,
        maps=count * len(run.labels),
        layers=tuple(layers),
        methods=means,
        defined=defined,
    )


def save_sanity_picture(path: Path, result: Sanity) -> None:
    """Similarity to the trained network's maps, by the number of layers made as new; a mean over
    fewer than all maps has their number at its point."""
    layers = ["trained", *result.layers]
    panels = {"spearman": "rank correlation", "ssim": "SSIM"}
    width = max(7.0, 1.5 + 0.45 * len(layers)) + 2
    figure, axes = charts(width, 4.6, len(panels), ground="white", sharey=True)
    colors = {"hirescam": ACCENT, "gradcam": "#c2571a"}
    for ax, (kind, title) in zip(axes, panels.items(), strict=True):
        ax.axhline(0, color="#9aa1ab", lw=0.8)
        for name, of_method in result.methods.items():
            values = [1.0, *(np.nan if v is None else v for v in of_method[kind])]
            ax.plot(values, "o-", ms=4, color=colors.get(name), label=map_name(name))
            _write_counts(ax, values[1:], result.defined[name][kind], result.maps)
        ax.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
        ax.set_title(f"{title} with the trained network's maps", loc="left", fontsize=10)
    axes[0].set_ylim(top=1.03)
    axes[0].legend(frameon=False, fontsize=9)
    below = "layers made as new, from the output back, one more each; means over "
    below += f"{result.maps} maps, or over (n) where the rest cannot be compared"
    figure.supxlabel(below, fontsize=9)
    figure.tight_layout()
    save_png(path, figure)


def _write_counts(ax: Axes, values: Sequence[float], counts: Sequence[int], number: int) -> None:
    """ "(n)" above each point that is a mean over fewer maps than `number`."""
    for place, (value, count) in enumerate(zip(values, counts, strict=True), 1):
        if count < number and np.isfinite(value):
            ax.annotate(f"({count})", (place, value), (0, 4), **COUNT_STYLE)
