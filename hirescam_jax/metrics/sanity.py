"""Do maps depend on what was learnt, and do they come out again? Similarity of maps, cascading
randomisation of a network's layers, repeatability.

Adebayo et al., Sanity Checks for Saliency Maps (NeurIPS 2018): a map that stays the same when the
weights are random, or when the labels that a model was trained on were permuted, shows the image
and not the model.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.scipy.stats import rankdata
from jaxtyping import Array, Float

from hirescam_jax.metrics.arrays import floating

SSIM_WINDOW = 7


class Similarity(NamedTuple):
    """Of two sets of maps, [B, L] each; NaN where it is not defined.

    ssim: of the maps scaled to [0, 1] by their positive part, as they are shown; not defined for
        two that show nothing.
    spearman: rank correlation of the signed maps.
    spearman_absolute: of their absolute values (Adebayo et al. give both).
    """

    ssim: Float[Array, "B L"]
    spearman: Float[Array, "B L"]
    spearman_absolute: Float[Array, "B L"]


def similarity(first: Array | np.ndarray, second: Array | np.ndarray) -> Similarity:
    """How alike two sets of raw signed maps [B, L, *grid] of the same volumes and labels are.

    For label randomisation give the maps of a model that was trained on the data's labels and of
    one that was trained on permuted labels. SSIM is NaN on grids of less than 3 cells an axis, and
    of two maps without positive evidence, which agree on nothing but that.

    Raises:
        ValueError: maps of different shapes.
    """
    return _similarity(*_pair(first, second))


@jax.jit
def _similarity(first: Array, second: Array) -> Similarity:
    axes = tuple(range(2, first.ndim))

    def shown(maps: Array) -> tuple[Array, Array]:
        maps = jax.nn.relu(maps)
        maps = maps - maps.min(axes, keepdims=True)
        peak = maps.max(axes, keepdims=True)
        return maps / jnp.where(peak > 0, peak, 1), peak.reshape(maps.shape[:2])

    if min(first.shape[2:]) < 3:
        structure = jnp.full(first.shape[:2], jnp.nan)
    else:
        (x, peak_x), (y, peak_y) = shown(first), shown(second)
        structure = jnp.where((peak_x > 0) | (peak_y > 0), ssim(x, y), jnp.nan)
    absolute = spearman(jnp.abs(first), jnp.abs(second))
    return Similarity(structure, spearman(first, second), absolute)


def spearman(first: Array | np.ndarray, second: Array | np.ndarray) -> Float[Array, "B L"]:
    """Spearman's rank correlation over the cells of each map, equal values at their mean rank; NaN
    where a map is constant or holds a NaN.

    Raises:
        ValueError: maps of different shapes.
    """
    return _spearman(*_pair(first, second))


@jax.jit
def _spearman(first: Array, second: Array) -> Array:
    def centred(maps: Array) -> Array:
        cells = maps.reshape(-1, maps[0, 0].size)
        ranks = jax.vmap(rankdata)(cells).reshape(*maps.shape[:2], -1)
        return (ranks - (ranks.shape[-1] + 1) / 2) / ranks.shape[-1]

    x, y = centred(first), centred(second)
    product = (x * x).sum(-1) * (y * y).sum(-1)
    missing = jnp.isnan(first) | jnp.isnan(second)
    known = (product > 0) & ~missing.any(tuple(range(2, first.ndim)))
    return jnp.where(known, (x * y).sum(-1) / jnp.sqrt(jnp.where(known, product, 1)), jnp.nan)


def ssim(
    first: Array | np.ndarray,
    second: Array | np.ndarray,
    *,
    data_range: float = 1.0,
    window: int | None = None,
) -> Float[Array, "B L"]:
    """Mean structural similarity of each pair of maps (Wang et al., IEEE TIP 2004) in any number
    of axes.

    Uniform windows, K1 = 0.01, K2 = 0.03, sample covariance, mean over the windows that lie wholly
    inside the grid: the defaults of scikit-image.

    Args:
        data_range: greatest less least possible value.
        window: cells along each axis of a window, odd; by default 7, less on smaller grids.

    Raises:
        ValueError: maps of different shapes, or a window that is even, below 3 or beyond the grid.
    """
    first, second = _pair(first, second)
    least = min(first.shape[2:])
    window = window or min(SSIM_WINDOW, least - (1 - least % 2))
    if window < 3 or window % 2 == 0 or window > least:
        raise ValueError(
            f"an SSIM window of {window} cells does not fit maps {first.shape}: it must be odd, at "
            "least 3 and within every spatial axis"
        )
    return _ssim(first, second, data_range, window)


@partial(jax.jit, static_argnums=3)
def _ssim(first: Array, second: Array, data_range: Any, window: int) -> Array:
    count = window ** (first.ndim - 2)

    def mean(x: Array) -> Array:
        # Axis by axis: a box of n cells an axis costs n additions and not n^3.
        for axis in range(2, x.ndim):
            size = tuple(window if i == axis else 1 for i in range(x.ndim))
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, size, (1,) * x.ndim, "VALID") / window
        return x

    mean_x, mean_y = mean(first), mean(second)
    scale = count / (count - 1)
    var_x = scale * (mean(first * first) - mean_x**2)
    var_y = scale * (mean(second * second) - mean_y**2)
    covariance = scale * (mean(first * second) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return values.mean(axis=tuple(range(2, first.ndim)))


def repeatability(
    maps: Sequence[Array | np.ndarray],
) -> Similarity:
    """Mean similarity over all pairs of several models' maps of the same volumes: do trainings from
    other seeds explain themselves alike?

    Args:
        maps: raw signed maps of each model, at least two.

    Returns:
        Means over the pairs in which it is defined, [B, L].

    Raises:
        ValueError: fewer than two sets of maps, or of different shapes.
    """
    if len(maps) < 2:
        raise ValueError(f"repeatability needs the maps of two models at least, got {len(maps)}")
    pairs = [similarity(a, b) for a, b in combinations(maps, 2)]

    def mean(*values: Array) -> Array:
        defined = ~jnp.isnan(jnp.stack(values))
        total = jnp.where(defined, jnp.stack(values), 0).sum(0)
        return jnp.where(defined.any(0), total / jnp.maximum(defined.sum(0), 1), jnp.nan)

    return Similarity(*map(mean, *pairs))


def layer_order(function: Callable[..., Any], variables: Any, *inputs: Any) -> list[str]:
    """The layers of a network from the output back to the input, by their first use.

    A layer is a path in the tree of parameters without its last name, "resnet/conv1" for
    params/resnet/conv1/kernel. The tree itself is sorted by name, so the order is read from the
    traced program.

    Args:
        function: (variables, *inputs) -> output, such as `model.apply`.
        variables: {"params": tree, ...}, arrays or their shapes; inputs as well.
    """
    traced = jax.make_jaxpr(function)(variables, *inputs).jaxpr
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    names = {
        id(var): _layer(path)
        for var, path in zip(traced.invars, paths, strict=False)
        if _collection(path) == "params"
    }
    used: dict[str, None] = {}

    def walk(jaxpr: Jaxpr, names: dict[int, str]) -> None:
        for equation in jaxpr.eqns:
            inner = [v.jaxpr for v in equation.params.values() if isinstance(v, ClosedJaxpr)]
            inner += [v for v in equation.params.values() if isinstance(v, Jaxpr)]
            outer = [None if isinstance(v, Literal) else names.get(id(v)) for v in equation.invars]
            fitting = [sub for sub in inner if len(sub.invars) == len(outer)]
            for sub in fitting:  # layers inside jit and remat
                inside = zip(sub.invars, outer, strict=True)
                walk(sub, {id(v): name for v, name in inside if name is not None})
            used.update(dict.fromkeys(name for name in outer if name is not None))

    walk(traced, names)
    missing = [name for name in dict.fromkeys(names.values()) if name not in used]
    return [*missing, *reversed(used)]


def cascading_randomization(
    variables: Any, fresh: Any, order: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Variables with more and more layers as in an untrained network (Adebayo et al. 2018).

    Args:
        variables: of the trained network, {"params": tree, ...}.
        fresh: of the same network, newly initialised.
        order: layers, the first to be randomised first: `layer_order` from the output back. A name
            also stands for all layers inside it.

    Yields:
        (layer, variables) after each; all collections of a layer (BatchNorm's statistics) with it.

    Raises:
        ValueError: a layer that the variables have not, or trees that differ.
    """
    if jax.tree.structure(variables) != jax.tree.structure(fresh):
        raise ValueError("variables and fresh are of different networks: their trees differ")
    layers = {_layer(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)}
    for name in order:
        if not any(_within(layer, name) for layer in layers):
            raise ValueError(f"no layer '{name}' in the variables: {', '.join(sorted(layers))}")

    for count, name in enumerate(order, start=1):
        chosen = order[:count]

        def one(path: Any, old: Any, new: Any, chosen: Sequence[str] = chosen) -> Any:
            return new if any(_within(_layer(path), name) for name in chosen) else old

        yield name, jax.tree_util.tree_map_with_path(one, variables, fresh)


def _layer(path: Any) -> str:
    return jax.tree_util.keystr(path[1:-1], simple=True, separator="/")


def _collection(path: Any) -> str:
    return jax.tree_util.keystr(path[:1], simple=True)


def _within(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}/")


def _pair(first: Any, second: Any) -> tuple[Array, Array]:
    if first.shape != second.shape:
        raise ValueError(f"maps {first.shape} and {second.shape} must agree")
    if len(first.shape) < 3:
        raise ValueError(f"maps must be [B, L, *grid] with a spatial axis, got {first.shape}")
    return floating(first), floating(second)
