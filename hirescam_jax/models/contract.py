"""What a network is, and how it is called: by these functions alone, on one device or on a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hirescam_jax.devices import mesh as sharding
from hirescam_jax.devices.mesh import DATA, DEPTH
from hirescam_jax.errors import UserError


def features_of(model: Any, variables: Any, volumes: Array) -> Array:
    """Volumes -> features [B, *grid, C], with running statistics. Those of padding are zero."""
    return _real_only(model.apply(variables, volumes, method="features"))


def training_features(
    model: Any, variables: Any, volumes: Array, key: Array
) -> tuple[Array, dict[str, Any]]:
    """In training mode; also the new statistics. key: of dropout."""
    features, updates = model.apply(
        variables,
        volumes,
        True,
        method="features",
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return _real_only(features), updates.get("batch_stats", variables.get("batch_stats", {}))


def head_of(model: Any, variables: Any, dropout: Array | None = None) -> Callable[[Array], Array]:
    """The model's head as a function of features alone, for `cam`; dropout: its key in training."""
    if dropout is None:
        return partial(model.apply, variables, method="head")
    return partial(model.apply, variables, train=True, method="head", rngs={"dropout": dropout})


def own_parameters(model: Any, variables: Any, volumes: Array, key: Array) -> Any:
    """The parameters as each device's own (`sharding.own`): over `data` all of them; over `depth`
    those that act on slices, of whose gradient a device has a part, so that the network need not
    say which these are.

    Made a device's own, such a parameter leaves the logits the same on all devices that share a
    volume, since they are sums over the depth; one that acts behind those sums makes them differ.
    The types tell, and nothing is computed.

    Raises:
        ValueError: the logits differ whatever the parameters: the head does not join the slices.
    """
    leaves, structure = jax.tree.flatten(variables["params"])
    on_slices = [False] * len(leaves)

    def trace(volumes: Array) -> None:
        features, _ = training_features(model, variables, volumes, key)

        def differ(leaves: list[Array]) -> bool:
            head = head_of(model, {"params": structure.unflatten(leaves)}, key)
            return sharding.varies(head(features), DEPTH)

        if differ(leaves):
            raise ValueError(
                f"the head of {type(model).__name__} has other logits on each device that shares a "
                "volume: take `depth_mean`, `depth_max` or `DepthDense` over the depth"
            )
        for i, leaf in enumerate(leaves):
            one = sharding.own(leaf, DEPTH)
            on_slices[i] = not differ([*leaves[:i], one, *leaves[i + 1 :]])

    if sharding.split_axes(DEPTH):
        jax.eval_shape(trace, volumes)
    pairs = zip(leaves, on_slices, strict=True)
    return structure.unflatten([sharding.own(leaf, DATA, *[DEPTH] * own) for leaf, own in pairs])


def attention_scale(model: Any, features: Array) -> float:
    """The model's attention scale for the grid of whole volumes, of which these are features."""
    depth, *rest = features.shape[1:-1]
    return model.attention_scale((sharding.whole(depth), *rest))


def feature_grid(model: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(d, h, w) of the model's features for volumes of `shape`, without running it.

    Raises:
        UserError: volumes too small for the model.
    """
    volume = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), volume)
        features = jax.eval_shape(partial(model.apply, method="features"), variables, volume)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.model does not fit volumes of {shape}: {error}") from error
    grid = features.shape[1:-1]
    if min(grid) < 1:
        raise UserError(f"config.model leaves no features of volumes of {shape}: grid {grid}")
    return grid


def _real_only(features: Array) -> Array:
    real = sharding.real(features.shape[1])
    if real is None:
        return features
    return jnp.where(real.reshape(-1, *[1] * (features.ndim - 2)), features, 0)
