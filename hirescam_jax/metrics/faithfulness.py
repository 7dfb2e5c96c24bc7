"""Does the model use what the map shows? Insertion and deletion, and ROAD.

All take `model` (volumes [n, *volume] -> logits [n, K]), volumes [B, *volume] and maps [B, L,
*grid]. The volume has the spatial axes of the grid; an axis of channels may follow. Maps on a
coarser grid are brought to the volume by linear interpolation; raw, signed maps are best, since a
ReLU leaves cells without an order. Equal cells come in a random order, a function of `key` and of
the grid alone: by their position, the score of a map without any order would tell where the model
looks. A score is the sigmoid of the map's own label; a map that holds a NaN has NaN scores. Volumes
and maps of integers are taken as floats.

One compiled program for all volumes and labels; at a time the model sees `chunk` volumes, which
bounds the memory. Give `jax.tree_util.Partial(apply, variables)` to compile once for all variables.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.sparse.linalg import cg
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hirescam_jax.metrics.arrays import floating

# A sparser system needs more of both: a hole of n cells across about n iterations.
TOLERANCE = 1e-5
MAX_ITERATIONS = 1000


class Curve(NamedTuple):
    """fractions [S + 1] of the cells from 0 to 1, scores [B, L, S + 1] there, and the area [B, L]
    under them by the trapezoidal rule."""

    fractions: Float[Array, "S"]
    scores: Float[Array, "B L S"]
    area: Float[Array, "B L"]


class Road(NamedTuple):
    """Scores with a fraction [F] of the cells removed, the most or the least relevant first,
    [B, L, F]; combined [B, L]: half of the mean of least - most, the higher the better."""

    fractions: Float[Array, "F"]
    most_first: Float[Array, "B L F"]
    least_first: Float[Array, "B L F"]
    combined: Float[Array, "B L"]


def deletion(
    model: Callable[[Array], Array],
    volumes: Array | np.ndarray,
    maps: Array | np.ndarray,
    labels: Any = None,
    *,
    fill: Any = 0.0,
    steps: int = 32,
    key: Array | None = None,
    chunk: int = 8,
) -> Curve:
    """The score while cells are replaced by `fill`, the strongest first (Petsiuk et al., RISE,
    BMVC 2018). A small area is good: the score falls as soon as the evidence is gone.

    Args:
        labels: of the maps: [L] or [B, L]; None for all, L = K.
        fill: scalar or [B, *volume]: what stands for nothing.
        steps: equal steps from the whole volume to none of it.
        key: of the order of equal cells; jax.random.key(0) by default.

    Raises:
        ValueError: shapes that do not fit, or a label that is out of range.
    """
    volumes = floating(volumes)
    fill = jnp.broadcast_to(jnp.asarray(fill, volumes.dtype), volumes.shape)
    return _curve(model, volumes, fill, maps, labels, steps, key, chunk)


def insertion(
    model: Callable[[Array], Array],
    volumes: Array | np.ndarray,
    maps: Array | np.ndarray,
    labels: Any = None,
    *,
    start: Any = 0.0,
    steps: int = 32,
    key: Array | None = None,
    chunk: int = 8,
) -> Curve:
    """The score while the cells of the volume are put into `start`, the strongest first (Petsiuk et
    al. 2018, who start from the blurred image: `blur`). A large area is good.

    Args:
        start: scalar or [B, *volume].
        Others, and errors, as `deletion`.
    """
    volumes = floating(volumes)
    start = jnp.broadcast_to(jnp.asarray(start, volumes.dtype), volumes.shape)
    return _curve(model, start, volumes, maps, labels, steps, key, chunk)


def road(
    model: Callable[[Array], Array],
    volumes: Array | np.ndarray,
    maps: Array | np.ndarray,
    labels: Any = None,
    *,
    key: Array,
    fractions: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    noise: float = 0.01,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    chunk: int = 8,
) -> Road:
    """ROAD: remove and debias (Rong et al., ICML 2022). The score with a fraction of the cells
    replaced by noisy linear imputation, which leaves no edge that would tell what was removed.

    Args:
        key: of the noise, which is the same for all maps, and of the order of equal cells.
        noise: standard deviation of what is added to imputed cells, in the volumes' unit.
        tolerance, max_iterations: as `linear_imputation`.
        Others, and errors, as `deletion`; also without a fraction, or for one outside (0, 1).
    """
    if not len(fractions):
        raise ValueError("fractions is empty: give at least one, between 0 and 1")
    if not all(0 < f < 1 for f in fractions):
        raise ValueError(f"fractions must lie between 0 and 1, got {tuple(fractions)}")
    volumes, maps = floating(volumes), floating(maps)
    model, labels = _checked(model, volumes, maps, labels)
    most, least = _road(
        model,
        volumes,
        maps,
        labels,
        key,
        noise,
        fractions=tuple(fractions),
        tolerance=tolerance,
        max_iterations=max_iterations,
        chunk=chunk,
    )
    return Road(jnp.asarray(fractions), most, least, (least - most).mean(-1) / 2)


def linear_imputation(
    volumes: Array | np.ndarray,
    removed: Array | np.ndarray,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Array:
    """Removed cells become the weighted mean of all their neighbours, known or removed too.

    The weights of Rong et al. 2022 in any number of axes: halved with each further axis in which a
    neighbour differs, so 1/6 and 1/12 (diagonal) in 2D, 1/14, 1/28 and 1/56 in 3D; outside the
    grid there is no neighbour, and the others share its weight. The sparse system is symmetric and
    positive definite, and is solved on the grid by conjugate gradients, preconditioned by its
    diagonal, until the residual is below `tolerance` times the right-hand side.

    Args:
        volumes: [N, *grid] or [N, *grid, C].
        removed: [N, *grid] bool; some cell of each volume must be left.
        max_iterations: the end where the tolerance (of float32, say) is out of reach.

    Raises:
        ValueError: shapes that do not fit.
    """
    channels = volumes.ndim - removed.ndim
    if channels not in (0, 1) or volumes.shape[: removed.ndim] != removed.shape:
        raise ValueError(f"volumes {volumes.shape} and removed {removed.shape} must agree")

    removed = jnp.asarray(removed).astype(bool)
    return _imputed(floating(volumes), removed, tolerance, max_iterations)


@partial(jax.jit, static_argnums=(2, 3))
def _imputed(volumes: Array, removed: Array, tolerance: float, max_iterations: int) -> Array:
    def one(values: Array, removed: Array) -> Array:
        weight = _neighbours(jnp.ones_like(values))

        def system(x: Array) -> Array:
            return jnp.where(removed, weight * x - _neighbours(x), 0)

        known = jnp.where(removed, 0, values)
        mean = known.sum() / jnp.maximum((~removed).sum(), 1)
        solution, _ = cg(
            system,
            jnp.where(removed, _neighbours(known), 0),
            jnp.where(removed, mean, 0),
            tol=tolerance,
            maxiter=max_iterations,
            M=lambda x: x / weight,
        )
        return jnp.where(removed, solution, values)

    if volumes.ndim > removed.ndim:
        return jax.vmap(jax.vmap(one, (-1, None), -1))(volumes, removed)
    return jax.vmap(one)(volumes, removed)


def _neighbours(x: Array) -> Array:
    """The weighted sum of each cell's neighbours, of those inside the grid."""
    total = x
    for axis in range(x.ndim):
        zeros = jnp.zeros_like(jax.lax.slice_in_dim(total, 0, 1, axis=axis))
        before = jax.lax.slice_in_dim(total, 0, -1, axis=axis)
        behind = jax.lax.slice_in_dim(total, 1, None, axis=axis)
        shifted = jnp.concatenate([zeros, before], axis) + jnp.concatenate([behind, zeros], axis)
        total = total + shifted / 2
    return (total - x) / (2**x.ndim - 1)


def blur(volumes: Array, sigma: float, spatial_axes: int) -> Array:
    """Gaussian blur of the `spatial_axes` axes behind the first, to three sigma; the cells at
    the border go on outside."""
    volumes = floating(volumes)
    radius = max(1, round(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in range(1, 1 + spatial_axes):
        size = volumes.shape[axis]
        places = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
        matrix = np.zeros((size, size), np.float32)
        np.add.at(matrix, (np.arange(size)[:, None], places), kernel)
        moved = jnp.tensordot(volumes, jnp.asarray(matrix, volumes.dtype), ((axis,), (1,)))
        volumes = jnp.moveaxis(moved, -1, axis)
    return volumes


def _curve(
    model: Any, first: Any, last: Any, maps: Any, labels: Any, steps: int, key: Any, chunk: int
) -> Curve:
    """The score from `first` to `last`, whose cells are taken strongest first."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    maps = floating(maps)
    model, labels = _checked(model, first, maps, labels)
    key = jax.random.key(0) if key is None else key
    scores = _curve_scores(model, first, last, maps, labels, key, steps=steps, chunk=chunk)
    fractions = jnp.linspace(0, 1, steps + 1)
    return Curve(fractions, scores, jnp.trapezoid(scores, fractions, axis=-1))


@partial(jax.jit, static_argnames=("steps", "chunk"))
def _curve_scores(
    model: Any, first: Any, last: Any, maps: Any, labels: Any, key: Array, *, steps: int, chunk: int
) -> Array:
    def one_map(b: Array, map_: Array, label: Array) -> Array:
        rank = _ranks(map_, first.shape[1 : maps.ndim - 1], key)
        # In float32 a product would not tell the cells of a large volume apart.
        taken = jnp.asarray(np.round(np.arange(steps + 1) * (rank.size / steps)).astype(np.int32))

        def changed(count: Array) -> Array:
            return jnp.where(_like(rank < count, first[b]), last[b], first[b])

        return _scores(model, changed, taken, label, chunk)

    return _each_map(one_map, maps, labels)


@partial(jax.jit, static_argnames=("fractions", "tolerance", "max_iterations", "chunk"))
def _road(
    model: Any,
    volumes: Array,
    maps: Array,
    labels: Array,
    key: Array,
    noise: Any,
    *,
    fractions: tuple[float, ...],
    tolerance: float,
    max_iterations: int,
    chunk: int,
) -> tuple[Array, Array]:
    noise_of_cells = noise * jax.random.normal(key, volumes.shape[1:], volumes.dtype)

    def one_map(b: Array, map_: Array, label: Array) -> Array:
        rank = _ranks(map_, volumes.shape[1 : maps.ndim - 1], jax.random.fold_in(key, 1))
        counts = jnp.asarray(np.round(np.array(fractions) * rank.size).astype(np.int32))

        def changed(order: tuple[Array, Array]) -> Array:
            count, least = order
            removed = jnp.where(least, rank >= rank.size - count, rank < count)
            imputed = linear_imputation(
                volumes[b][None],
                removed[None],
                tolerance=tolerance,
                max_iterations=max_iterations,
            )[0]
            return imputed + jnp.where(_like(removed, volumes[b]), noise_of_cells, 0)

        both = jnp.tile(counts, 2), jnp.arange(2 * len(fractions)) >= len(fractions)
        return _scores(model, changed, both, label, chunk)

    scores = _each_map(one_map, maps, labels)
    return scores[..., : len(fractions)], scores[..., len(fractions) :]


def _each_map(function: Callable[..., Array], maps: Array, labels: Array) -> Array:
    """One map after the other: [B, L, ...] of `function(b, map, label)`, NaN of a NaN map."""
    batch, count = maps.shape[:2]
    pairs = (
        jnp.repeat(jnp.arange(batch), count),
        maps.reshape(-1, *maps.shape[2:]),
        labels.reshape(-1),
    )

    def of_pair(pair: tuple[Array, Array, Array]) -> Array:
        return jnp.where(jnp.isnan(pair[1]).any(), jnp.nan, function(*pair))

    results = jax.lax.map(of_pair, pairs)
    return results.reshape(batch, count, *results.shape[1:])


def _scores(model: Any, changed: Callable, changes: Any, label: Array, chunk: int) -> Array:
    """The label's sigmoid for each of the changed volumes, `chunk` of them at a time."""
    count = jax.tree.leaves(changes)[0].shape[0]
    chunk = min(chunk, count)
    missing = -count % chunk  # whole chunks only: one shape for the model
    changes = jax.tree.map(
        lambda x: jnp.concatenate([x, x[:missing]]).reshape(-1, chunk, *x.shape[1:]), changes
    )

    def some(changes: Any) -> Array:
        return jax.nn.sigmoid(model(jax.vmap(changed)(changes))[:, label])

    return jax.lax.map(some, changes).reshape(-1)[:count]


def _ranks(map_: Array, shape: Sequence[int], key: Array) -> Array:
    """Each cell's place, 0 the strongest, on the grid of the volume; equal cells at random."""
    method = jax.image.ResizeMethod.LINEAR
    fine = jax.image.resize(map_, tuple(shape), method, antialias=False).reshape(-1)
    places = jnp.arange(fine.size, dtype=jnp.int32)
    order = jax.lax.sort((-fine, jax.random.bits(key, fine.shape), places), num_keys=2)[2]
    return jnp.zeros_like(places).at[order].set(places, unique_indices=True).reshape(tuple(shape))


def _like(mask: Array, volume: Array) -> Array:
    """A mask [*grid] for a volume [*grid] or [*grid, C]."""
    return mask.reshape(*mask.shape, *[1] * (volume.ndim - mask.ndim))


def _checked(model: Any, volumes: Any, maps: Any, labels: Any) -> tuple[Any, Array]:
    """The model as something that `jit` takes, and the labels as [B, L]."""
    channels = volumes.ndim - (maps.ndim - 1)
    if maps.ndim < 3 or channels not in (0, 1) or len(maps) != len(volumes):
        raise ValueError(
            f"maps {maps.shape} do not fit volumes {volumes.shape}: they must be [B, L, *grid] and "
            "[B, *volume] with as many spatial axes, and channels at most behind them"
        )
    model = model if isinstance(model, Partial) else Partial(model)
    num_labels = jax.eval_shape(model, volumes[:1]).shape[1]
    if labels is None:
        labels = np.arange(num_labels)
    shape = np.shape(labels)
    if shape not in ((maps.shape[1],), maps.shape[:2]):
        raise ValueError(
            f"labels {shape} do not fit maps {maps.shape}: give [L] or [B, L], one a map"
        )
    if not isinstance(labels, Tracer):
        wrong = np.asarray(labels)[(np.asarray(labels) < 0) | (np.asarray(labels) >= num_labels)]
        if wrong.size:
            raise ValueError(f"label {wrong[0]} is out of range: the model has {num_labels} labels")
    return model, jnp.broadcast_to(jnp.asarray(labels), maps.shape[:2])
