"""The programs that explain batches of a run's volumes."""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hirescam_jax.compiling import compiler_options
from hirescam_jax.config import Config
from hirescam_jax.devices import mesh
from hirescam_jax.devices.layout import Layout
from hirescam_jax.devices.mesh import DATA, DEPTH
from hirescam_jax.errors import UserError
from hirescam_jax.explanations.explain import model_verdict
from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.explanations.verdict import HeadVerdict
from hirescam_jax.models.contract import features_of, head_of
from hirescam_jax.runs.run import Run


def explain_program(
    config: Config, layout: Layout, method: str, labels: Sequence[int] | None = None
) -> Any:
    """Variables and int16 volumes [B, D, H, W] -> logits [B, L] and maps [B, L, d, h, w], compiled.

    A volume's whole maps lie where its first slices are: unlike volumes and features they are small
    enough to be gathered over `depth`, and a file then is the same on every mesh."""

    def program(variables: Any, volume: Array) -> tuple[Array, Array]:
        logits, maps = explain_step(
            variables, volume, config=config, layout=layout, methods=(method,), labels=labels
        )
        logits = logits if labels is None else logits[:, np.asarray(labels)]
        return logits, maps[method].astype(jnp.float32)

    split = NamedSharding(layout.mesh, PartitionSpec(DATA))
    return jax.jit(program, out_shardings=split, compiler_options=compiler_options())


def own_rows(*arrays: Array) -> Iterator[tuple[Any, ...]]:
    """(row, value, ...) of each row that this process is to write, of arrays that are split over
    their first axis in the same way; every row is one process's."""
    for shards in zip(*(array.addressable_shards for array in arrays), strict=True):
        if shards[0].replica_id == 0:
            first = shards[0].index[0].start or 0
            values = [np.asarray(shard.data) for shard in shards]
            for row in range(len(values[0])):
                yield first + row, *(value[row] for value in values)


def explain_step(
    variables: Any,
    volume: Array,
    *,
    config: Config,
    layout: Layout,
    methods: Sequence[str] = EVALUATED,
    labels: Sequence[int] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Logits [B, K] and raw signed maps [B, K, d, h, w] of int16 volumes [B, D, H, W] that lie on a
    mesh; each device explains its own volumes and slices. With `labels`, maps of those only."""
    model, local = config.model, layout.padded_cells // layout.mesh.shape[DEPTH]

    def part(variables: Any, volume: Array) -> tuple[Array, dict[str, Array]]:
        with mesh.volume_of(volume.shape[0], local, layout.cells):
            features = features_of(model, variables, config.preprocess.normalize(volume))
            head, maps = head_of(model, variables), {}
            for name in methods:
                options = {}
                if METHODS[name].over_grid and mesh.split_axes(DEPTH):
                    options = {"axis_name": DEPTH, "positions": math.prod(layout.grid)}
                maps[name] = METHODS[name](head, features, labels, **options)
            return head(features), maps

    specs = (mesh.WHOLE, mesh.SPECS["volume"]), (PartitionSpec(DATA), mesh.MAPS)
    logits, maps = mesh.split(part, layout.mesh, *specs)(variables, volume)
    return logits, {name: map_BKdhw[:, :, : layout.cells] for name, map_BKdhw in maps.items()}


def head_bias(run: Run) -> Float[np.ndarray, " K"]:
    """The head's output on all-zero features, from which completeness residuals are counted."""

    @jax.jit
    def program(variables: Any) -> Array:
        volume = jax.ShapeDtypeStruct((1, *run.shape), jnp.float32)
        features = jax.eval_shape(partial(features_of, run.model), variables, volume)
        return head_of(run.model, variables)(jnp.zeros(features.shape, jnp.float32))[0]

    return np.asarray(program(run.variables), np.float32)


def maps_program(run: Run) -> Callable[[Any, Array], dict[str, Array]]:
    """(variables, volumes [B, D, H, W]) -> raw maps [B, K, d, h, w] by method."""

    @partial(jax.jit, compiler_options=compiler_options())
    def program(variables: Any, volumes: Array) -> dict[str, Array]:
        features, head = features_of(run.model, variables, volumes), head_of(run.model, variables)
        return {name: METHODS[name](head, features) for name in EVALUATED}

    return program


def verdict_of(run: Run, method: str) -> HeadVerdict:
    """What the run's head guarantees.

    Raises:
        UserError: a head that mixes examples, or one for which the method is not defined.
    """
    try:
        verdict = model_verdict(run.model, run.variables, (1, *run.shape))
    except ValueError as error:
        raise UserError(f"{run.path}: {error}") from error
    if METHODS[method].of_pooling and verdict.kind != "equal":
        raise UserError(
            f"{run.path}: {METHODS[method].title} needs a head of global pooling and one linear "
            "layer, which this model does not have: use --method hirescam"
        )
    return verdict


def label_indices(wanted: Sequence[str], labels: tuple[str, ...]) -> tuple[int, ...]:
    for label in wanted:
        if label not in labels:
            near = difflib.get_close_matches(label, labels, 1, cutoff=0)[0]
            raise UserError(
                f"unknown label '{label}': did you mean '{near}'? The model knows: "
                f"{', '.join(labels)}"
            )
    return tuple(dict.fromkeys(labels.index(label) for label in wanted))
