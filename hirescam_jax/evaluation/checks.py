"""Checks of a run's maps that take many passes of the model: faithfulness and sanity.

They look at whole volumes, one or a few at a time, on one device of each process. Of a split they
take a random choice of volumes that is always the same; intervals are by patient.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hirescam_jax.compiling import compiler_options
from hirescam_jax.data.pipeline import Source, chosen_volumes, groups_of, make_batch
from hirescam_jax.files import atomic_file
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
from hirescam_jax.metrics.bootstrap import mean_intervals, null
from hirescam_jax.progress import progress
from hirescam_jax.reports.text import MAP_NAMES, aligned, interval_text, map_name
from hirescam_jax.runs.run import Run

STEPS = 16  # of the insertion and deletion curves
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the cells that ROAD removes
BLUR = 1 / 16  # of the largest axis: standard deviation of where insertion starts
MEASURES = {"insertion": "insertion", "deletion": "deletion", "road": "ROAD"}
COUNT_STYLE = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "color": "#57606a"}


def faithfulness(run: Run, source: Source, prior: np.ndarray, count: int) -> dict[str, Any]:
    """Insertion, deletion and ROAD of the run's maps and of the baselines, on `count` volumes
    (`chosen_volumes`), for every label that a volume truly has.

    Deletion fills with the volume's mean; insertion starts from the blurred volume.

    Args:
        prior: the organ prior [K, d, h, w].

    Returns:
        {"volumes", "patients", "pairs" of volume and label, "steps", "fractions" that ROAD removes,
        "blur_voxels", "methods": {method: {"insertion", "deletion" (areas), "road" (combined):
        interval, and "pairs" that it is over, fewer where a baseline has no map of a label;
        "insertion_curve", "deletion_curve": means at 0, 1 / steps, ... 1 of the cells, over the
        same pairs; "road_most_first", "road_least_first": means at `fractions`}}}; methods and
        intervals as in `evaluate`, null where no volume has a finding.
    """
    model: Any = run.model
    sigma = BLUR * max(source.shape)

    def logits(variables: Any, volumes: Array) -> Array:
        return model.apply(variables, volumes)

    @partial(jax.jit, compiler_options=compiler_options())
    def measured(
        variables: Any, volume: Array, maps: Array, label: Array, key: Array
    ) -> dict[str, Array]:
        score = Partial(logits, variables)
        options = {"labels": label[None], "chunk": 8, "key": key}
        taken = deletion(score, volume, maps, fill=volume.mean(), steps=STEPS, **options)
        put = insertion(score, volume, maps, start=blur(volume, sigma, 3), steps=STEPS, **options)
        removed = road(score, volume, maps, fractions=FRACTIONS, **options)
        parts = {
            "insertion": put.area,
            "deletion": taken.area,
            "road": removed.combined,
            "insertion_curve": put.scores,
            "deletion_curve": taken.scores,
            "road_most_first": removed.most_first,
            "road_least_first": removed.least_first,
        }
        return {name: value[0, 0] for name, value in parts.items()}

    maps_of = maps_program(run)
    variables = jax.device_put(run.variables)
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in MAP_NAMES}
    volumes: list[int] = []
    numbers = np.arange(len(run.labels))[None]
    chosen = chosen_volumes(source, count)
    for index in progress(chosen.tolist(), "faithfulness", "volume"):
        key = jax.random.key(index)
        batch = make_batch(source, [index])
        volume = run.normalize(jnp.asarray(batch["volume"]))
        maps = maps_of(variables, volume)
        baselines = baseline_maps(prior[None], np.array([index]), numbers)
        maps |= {name: jnp.asarray(of_labels) for name, of_labels in baselines.items()}
        for label in np.flatnonzero(batch["findings"][0].any(axis=-1)):
            volumes.append(index)
            for name, maps_BK in maps.items():
                # A prior may be missing: NaN, as all of its measures then are.
                map_ = maps_BK[:, label][:, None]
                found[name].append(measured(variables, volume, map_, jnp.asarray(label), key))
    patients = groups_of(source)
    return {
        "volumes": count,
        "patients": len(np.unique(patients[chosen])),
        "pairs": len(volumes),
        "steps": STEPS,
        "fractions": list(FRACTIONS),
        "blur_voxels": sigma,
        "methods": {name: _means(pairs, patients[volumes]) for name, pairs in found.items()},
    }


def _means(pairs: list[dict[str, Any]], groups: np.ndarray) -> dict[str, Any]:
    """Means over pairs of volume and label, the patients drawn for the intervals."""
    if not pairs:
        return {name: {"value": None, "low": None, "high": None, "pairs": 0} for name in MEASURES}
    stacked = {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}
    result: dict[str, Any] = mean_intervals({name: stacked[name] for name in MEASURES}, groups)
    for name in MEASURES:
        result[name] |= {"pairs": int((~np.isnan(stacked[name])).sum())}
    for name in stacked.keys() - MEASURES.keys():
        values = nan_mean(stacked[name], axis=0)
        result[name] = None if np.isnan(values).any() else values.tolist()
    return result


def sanity(run: Run, source: Source, count: int) -> dict[str, Any]:
    """Cascading randomisation on `count` volumes (`chosen_volumes`), all labels: how alike the maps
    stay to those of the trained network while its layers are made as new, from the output back.

    Returns:
        {"volumes", "maps": of a method, one a volume and label, "layers": names in their order,
        "methods": {method: {"ssim", "spearman", "spearman_absolute": mean after each layer, null
        where nothing is defined}}, "defined": the same with how many of the maps are in each mean:
        one that became constant has no correlation}.
    """
    model: Any = run.model
    volumes = run.normalize(
        jnp.asarray(make_batch(source, chosen_volumes(source, count))["volume"])
    )
    variables = jax.device_put(run.variables)
    fresh = jax.jit(model.init)(jax.random.key(run.config.seed + 1), volumes[:1])
    # A restored tree may have an empty collection more, or be of other containers.
    fresh = jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(fresh))
    layers = layer_order(model.apply, variables, volumes[:1])
    program = maps_program(run)
    compare = jax.jit(similarity)

    def maps_of(variables: Any) -> dict[str, Array]:
        parts = [program(variables, volumes[i][None]) for i in range(count)]
        return jax.tree.map(lambda *maps: jnp.concatenate(maps), *parts)

    trained = maps_of(variables)
    kinds = ("ssim", "spearman", "spearman_absolute")
    methods, defined = ({name: {kind: [] for kind in kinds} for name in trained} for _ in "ab")
    cascade = cascading_randomization(variables, fresh, layers)
    for _, randomized in progress(cascade, "sanity", "layer", len(layers)):
        for name, maps in maps_of(randomized).items():
            for kind, values in compare(trained[name], maps)._asdict().items():
                known = np.asarray(values).reshape(-1)
                methods[name][kind].append(null(float(nan_mean(known))))
                defined[name][kind].append(int((~np.isnan(known)).sum()))
    number = count * len(run.labels)
    found = {"volumes": count, "maps": number, "layers": layers}
    return {**found, "methods": methods, "defined": defined}


def faithfulness_table(result: dict[str, Any]) -> str:
    """A map a row; a mean over fewer findings than the header says has their number behind it."""
    of = f"{result['volumes']} volumes of {result['patients']} patients"
    rows = [[f"{result['pairs']} findings in {of}", *MEASURES.values()]]
    rows[0][2] += " (low is good)"
    for name, measures in result["methods"].items():
        cells = []
        for key in MEASURES:
            fewer = measures[key]["pairs"] != result["pairs"]
            cells.append(interval_text(measures[key]) + f" ({measures[key]['pairs']})" * fewer)
        rows.append([map_name(name), *cells])
    return aligned(rows)


def save_sanity_picture(path: Path, result: dict[str, Any]) -> None:
    """Similarity to the trained network's maps, by the number of layers made as new; a mean over
    fewer than all maps has their number at its point."""
    layers = ["trained", *result["layers"]]
    figure = Figure(figsize=(max(7.0, 1.5 + 0.45 * len(layers)) + 2, 4.6), facecolor="white")
    FigureCanvasAgg(figure)
    panels = {"spearman": "rank correlation", "ssim": "SSIM"}
    axes = figure.subplots(1, len(panels), sharey=True)
    colors = {"hirescam": "#0b6e99", "gradcam": "#c2571a"}
    for ax, (kind, title) in zip(axes, panels.items(), strict=True):
        ax.axhline(0, color="#9aa1ab", lw=0.8)
        for name, of_method in result["methods"].items():
            values = [1.0, *(np.nan if v is None else v for v in of_method[kind])]
            ax.plot(values, "o-", ms=4, color=colors.get(name), label=map_name(name))
            _write_counts(ax, values[1:], result["defined"][name][kind], result["maps"])
        ax.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
        ax.set_title(f"{title} with the trained network's maps", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e5e7eb", lw=0.8)
    axes[0].set_ylim(top=1.03)
    axes[0].legend(frameon=False, fontsize=9)
    below = "layers made as new, from the output back, one more each; means over "
    below += f"{result['maps']} maps, or over (n) where the rest cannot be compared"
    figure.supxlabel(below, fontsize=9)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _write_counts(ax: Any, values: list[float], counts: list[int], number: int) -> None:
    """ "(n)" above each point that is a mean over fewer maps than `number`."""
    for place, (value, count) in enumerate(zip(values, counts, strict=True), 1):
        if count < number and np.isfinite(value):
            ax.annotate(f"({count})", (place, value), (0, 4), **COUNT_STYLE)
