"""What a network is, and how it is called: by these functions, on one device or on a mesh."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hirescam_jax.devices import mesh
from hirescam_jax.devices.mesh import DATA, DEPTH
from hirescam_jax.errors import UserError


@runtime_checkable
class Network(Protocol):
    """A Flax Linen module with two methods:

    `features`: volumes [B, D, H, W] -> features [B, *grid, C], float32 at least.
    `head`: features -> logits [B, K]; it must not mix the examples of a batch.

    Both may take `train: bool = False`, and are given it then. What else it may have, with the
    value for a network without it:

    `attention_scale(grid) -> float` (1): what turns HiResCAM, on a grid (d, h, w), into the
        attention that the mask loss guides.
    `depth_unit: int` (None): slices that make one feature cell along the depth, of their own, so
        that the slices of a volume can lie on several devices (`config.depth_devices`). Such a
        network pools over the depth by `models.heads`, normalises by `models.layers.BatchNorm`, and
        leaves out slices that make no whole cell before it does.
    `has_slices: bool` (True): whether the first axis of the grid is the depth of the volume, as
        masks of organs and pictures of maps need it.
    """

    def features(self, volumes: Any, /) -> Array: ...

    def head(self, features: Any, /) -> Array: ...

    def init(self, rngs: Any, /, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def depth_unit(model: Network) -> int | None:
    """See `Network`."""
    return getattr(model, "depth_unit", None)


def has_slices(model: Network) -> bool:
    """See `Network`."""
    return getattr(model, "has_slices", True)


def attention_scale(model: Network, features: Array) -> float:
    """Of these features, for the grid of whole volumes; see `Network`."""
    depth, *rest = features.shape[1:-1]
    scale = getattr(model, "attention_scale", None)
    return scale((mesh.whole(depth), *rest)) if scale else 1.0


def initial_variables(model: Network, key: Array, volumes: Array) -> Any:
    """Initial variables {"params": ..., and "batch_stats" where there are any}."""

    def whole(module: Any, volumes: Array) -> Array:
        return module.head(module.features(volumes, **_mode(module.features)), **_mode(module.head))

    return model.init(key, volumes, method=whole)


def logits_of(model: Network, variables: Any, volumes: Array) -> Array:
    """Volumes -> logits [B, K], with running statistics."""
    return head_of(model, variables)(features_of(model, variables, volumes))


def features_of(model: Network, variables: Any, volumes: Array) -> Array:
    """Volumes -> features [B, *grid, C], with running statistics. Those of padding are zero."""
    mode = _mode(model.features)
    return _real_only(model.apply(variables, volumes, method="features", **mode))


def training_features(
    model: Network, variables: Any, volumes: Array, key: Array
) -> tuple[Array, dict[str, Any]]:
    """In training mode; also the new statistics. key: of dropout."""
    options = {"rngs": {"dropout": key}, "mutable": ["batch_stats"], **_mode(model.features, True)}
    features, updates = model.apply(variables, volumes, method="features", **options)
    return _real_only(features), updates.get("batch_stats", variables.get("batch_stats", {}))


def head_of(
    model: Network, variables: Any, dropout: Array | None = None
) -> Callable[[Array], Array]:
    """The model's head as a function of features alone, for `cam`; dropout: its key in training."""
    mode = _mode(model.head, dropout is not None)
    rngs = None if dropout is None else {"dropout": dropout}

    def head(features: Array) -> Array:
        logits = model.apply(variables, features, method="head", rngs=rngs, **mode)
        # A device that has the whole depth need not pool by `heads`, which tell it to the types.
        return mesh.total(logits, DEPTH) if mesh.parts(DEPTH) == 1 else logits

    return head


def own_parameters(model: Network, variables: Any, volumes: Array, key: Array) -> Any:
    """The parameters as each device's own (`mesh.own`): over `data` all of them; over `depth`
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
            return mesh.varies(head(features), DEPTH)

        if differ(leaves):
            raise ValueError(
                f"the head of {type(model).__name__} has other logits on each device that shares a "
                "volume: take `depth_mean`, `depth_max` or `DepthDense` over the depth"
            )
        for i, leaf in enumerate(leaves):
            one = mesh.own(leaf, DEPTH)
            on_slices[i] = not differ([*leaves[:i], one, *leaves[i + 1 :]])

    if mesh.split_axes(DEPTH):
        jax.eval_shape(trace, volumes)
    pairs = zip(leaves, on_slices, strict=True)
    return structure.unflatten([mesh.own(leaf, DATA, *[DEPTH] * own) for leaf, own in pairs])


def feature_grid(model: Network, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(d, h, w) of the model's features for volumes of `shape`, without running it.

    Raises:
        UserError: volumes too small for the model.
    """
    volume = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        variables = jax.eval_shape(partial(initial_variables, model), jax.random.key(0), volume)
        features = jax.eval_shape(partial(features_of, model), variables, volume)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"config.model does not fit volumes of {shape}: {error}") from error
    grid = features.shape[1:-1]
    if min(grid) < 1:
        raise UserError(f"config.model leaves no features of volumes of {shape}: grid {grid}")
    return grid


def _real_only(features: Array) -> Array:
    real = mesh.real(features.shape[1])
    if real is None:
        return features
    return jnp.where(real.reshape(-1, *[1] * (features.ndim - 2)), features, 0)


def _mode(method: Callable[..., Array], train: bool = False) -> dict[str, bool]:
    return {"train": train} if "train" in inspect.signature(method).parameters else {}
