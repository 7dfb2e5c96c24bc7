"""A model and its volumes -> logits, maps, residuals and the verdict, in one compiled program."""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from hirescam_jax.compiling import compiler_options
from hirescam_jax.explanations.cam import completeness_residual
from hirescam_jax.explanations.gradients import Labels, at_least_float32, check_labels
from hirescam_jax.explanations.methods import METHODS
from hirescam_jax.explanations.verdict import HeadVerdict, head_verdict


@runtime_checkable
class Model(Protocol):
    """A Flax module with methods `features` and `head`, which may have more."""

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any: ...


class Explanation(NamedTuple):
    """What `explain` returns.

    logits [B, K]: the model's scores, all labels.
    maps [B, L, *grid]: signed maps of the L chosen labels.
    residual [B, L]: |sum of the map + bias - logit|, with bias = the head's output on all-zero
        features. Zero up to rounding is a proof that the map accounts for the whole score, which
        HiResCAM guarantees for an affine head; elsewhere it is the part left unexplained.
    verdict: what the model's head guarantees for every volume, see `head_verdict`; None where the
        model's variables are traced, so that nothing can be tried.
    """

    logits: Float[Array, "B K"]
    maps: Float[Array, "B L *grid"]
    residual: Float[Array, "B L"]
    verdict: HeadVerdict | None = None


def explain(
    model: Model,
    variables: Any,
    volumes: Float[Array, "B *volume"],
    labels: Labels = None,
    method: str = "hirescam",
) -> Explanation:
    """One forward pass and the maps of all (or the chosen) labels of a batch, in one program.

    Args:
        model: a Flax module with methods `features` (volumes -> [B, *grid, C]) and `head`
            (features -> logits [B, K]), as all models of this package are.
        variables: its variables, `{"params": ..., "batch_stats": ...}`.
        volumes: what `model.features` takes (for AxialNet: normalised volumes [B, D, H, W]).
        labels: None (all), [L] or [B, L].
        method: one of `methods.METHODS`.

    Raises:
        ValueError: an unknown method, or as `hirescam`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if 0 in jnp.shape(volumes):
        raise ValueError(f"volumes are empty: got {jnp.shape(volumes)}")
    if labels is not None and not isinstance(labels, Tracer):
        labels = np.asarray(labels)
        _, num_labels = jax.eval_shape(partial(_logits, model), variables, volumes).shape
        check_labels(labels, volumes.shape[0], num_labels)
    verdict = None
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(variables)):
        verdict = model_verdict(model, variables, jnp.shape(volumes))
    leaves = jax.tree.leaves((variables, volumes, labels))
    inside = any(isinstance(leaf, Tracer) for leaf in leaves)  # the outer jit has its own options
    program = _explain if inside else _explain_program(model)
    return program(model, variables, volumes, labels, method)._replace(verdict=verdict)


def model_verdict(model: Model, variables: Any, volumes_shape: tuple[int, ...]) -> HeadVerdict:
    """`head_verdict` of a model for volumes of a shape, with any values of its variables.

    Raises:
        ValueError: as `head_verdict`.
    """
    leaves, tree = jax.tree.flatten(variables)
    forms = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    find = _verdict_of_form if _hashable(model) else _verdict_of_form.__wrapped__
    return find(model, tree, forms, volumes_shape[1:])


@lru_cache(maxsize=64)
def _verdict_of_form(model: Model, tree: Any, forms: tuple, volume_shape: tuple) -> HeadVerdict:
    found = []

    def of_traced(variables: Any, volumes: Array) -> None:
        features = jax.eval_shape(partial(model.apply, method="features"), variables, volumes)
        found.append(head_verdict(partial(model.apply, variables, method="head"), features.shape))

    variables = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*form) for form in forms])
    jax.eval_shape(of_traced, variables, jax.ShapeDtypeStruct((1, *volume_shape), jnp.float32))
    return found[0]


def _hashable(model: Model) -> bool:
    """Not so for a module with an array among its attributes: nothing of it can be kept."""
    try:
        hash(model)
    except TypeError:
        return False
    return True


def _explain_program(model: Model) -> Callable[..., Explanation]:
    if _hashable(model):
        return _compiled_explain()
    program = jax.jit(
        partial(_explain, model), static_argnames="method", compiler_options=compiler_options()
    )
    return lambda _, variables, volumes, labels, method: program(
        variables, volumes, labels, method=method
    )


@cache
def _compiled_explain() -> Callable[..., Explanation]:
    return jax.jit(
        _explain, static_argnames=("model", "method"), compiler_options=compiler_options()
    )


def _logits(model: Model, variables: Any, volumes: Array) -> Array:
    features = model.apply(variables, volumes, method="features")
    return model.apply(variables, features, method="head")


def _explain(model: Model, variables: Any, volumes: Array, labels: Labels, method: str):
    features = at_least_float32(model.apply(variables, volumes, method="features"))
    head = partial(model.apply, variables, method="head")
    logits = head(features)
    maps = METHODS[method](head, features, labels)
    return Explanation(logits, maps, completeness_residual(head, features, logits, maps, labels))
