"""What a head guarantees for its maps: read from its program, and proved on random features."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from hirescam_jax.gradients import MIXES, Head, at_least_float32, is_affine

Kind = Literal["equal", "exact", "complete", "none"]

TEXTS: dict[str, str] = {
    "equal": "The head is affine with the same weights at every position: HiResCAM is exact, and "
    "Grad-CAM and CAM are the same map.",
    "exact": "The head is affine: a HiResCAM map sums to the score minus the bias exactly, a "
    "Grad-CAM map does not.",
    "complete": "The head is not affine, but a HiResCAM map sums to the score minus the head's "
    "bias, as for a maximum over slices: it is exact on the slices that won.",
    "none": "No guarantee: the head is not affine, and a HiResCAM map need not account for the "
    "score.",
    "imprecise": "No guarantee: the head is affine but computes in low precision, and a HiResCAM "
    "map does not sum to the score.",
}
SHORT = {"equal": "exact", "exact": "exact", "complete": "exact on the winning slices"}

# Residuals below it are rounding, relative to the sum of the sizes of all terms.
TOLERANCE = 1e-4
# Features of every size, since a nonlinearity shows only where its input is as large as its bias.
SCALES = tuple(10.0**power for power in range(-2, 5) for _ in range(2))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HeadVerdict:
    """What HiResCAM guarantees for a head.

    kind:
        "equal": affine, with a gradient that is constant over the positions: HiResCAM is exact, and
            so are Grad-CAM and CAM, which are the same.
        "exact": affine: sum of the map = logit - bias.
        "complete": not affine, but sum of the map = logit - head(0) all the same, as for a maximum
            over slices of one linear layer; exact on the positions that were selected.
        "none": no guarantee.
    text: the same as one sentence.
    residual: the worst |sum of the map + head(0) - logit| that was measured, relative to the sum of
        the sizes of all terms.
    gradcam_difference: the largest difference between a HiResCAM and a Grad-CAM map, relative to
        the largest value of the HiResCAM map.

    It is a pytree without leaves, so that it can travel through `jax.jit`.
    """

    kind: Kind
    text: str
    residual: float
    gradcam_difference: float

    @property
    def guaranteed(self) -> bool:
        """Whether HiResCAM accounts for the score."""
        return self.kind != "none"

    def holds_for(self, method: str) -> bool:
        """Whether a method's maps account for the score, where they lie."""
        if method == "hirescam":
            return self.guaranteed
        return self.kind == "equal" and method in ("gradcam", "cam", "xgradcam")

    def short(self, method: str = "hirescam") -> str:
        """A few words on what holds for a method of `cam.METHODS`: for tables and captions."""
        if self.kind == "none":
            reason = self.text.split(",")[0]
            return reason[0].lower() + reason[1:]
        if method == "hirescam":
            return SHORT[self.kind]
        if self.holds_for(method):
            return "exact, the same as HiResCAM for this head"
        return "no guarantee by this method: only HiResCAM's map accounts for the score"


def head_verdict(head: Head, feature_shape: Sequence[int]) -> HeadVerdict:
    """Finds out what HiResCAM guarantees for a head, in one small compiled program.

    Whether a head is affine is read from its traced gradient (which does not depend on the features
    then). The rest is measured on random features of many sizes, two examples at a time, in the
    precision of the head and in float32 at least. The verdict is on the head's structure: its float
    arrays are jittered, so that a bias of zero does not count as none.

    Args:
        head: features [B, *grid, C] -> logits [B, K], without randomness (no dropout). It may
            close over tracers, for which random numbers stand.
        feature_shape: (B, *grid, C). B matters only for a head that takes no other.

    Raises:
        ValueError: the head mixes the examples of a batch, or cannot be run by itself (one that
            asks for the devices of a mesh, say).
    """
    shape = tuple(feature_shape)
    if len(shape) < 3:
        raise ValueError(f"feature_shape must be (B, *grid, C) with a spatial axis, got {shape}")
    traced, shape = _traced(head, shape)
    dtype, logits = traced.in_avals[0].dtype, traced.out_avals[0]
    affine = is_affine(head, np.zeros(shape, dtype), np.zeros(logits.shape, logits.dtype))
    constants = [_jittered(x, seed) for seed, x in enumerate(traced.consts)]

    def closed(constants: list, features: Array) -> Array:
        return jaxpr_as_fun(traced.replace(consts=constants))(features)[0]

    random = np.random.default_rng(0)
    features = random.standard_normal((2, *shape)).astype(dtype)
    mixes = random.standard_normal((len(SCALES), logits.shape[1])).astype(dtype)
    points = features, mixes, np.asarray(SCALES, dtype)
    with eval_context():  # now, even where this is traced
        probes = jax.jit(_probe, static_argnums=0)(closed, constants, *points)
        residual, difference, leak = (float(np.nan_to_num(x, nan=np.inf)) for x in probes)
    if leak > 0:
        raise ValueError(MIXES)
    kind: Kind = "none"
    if residual <= TOLERANCE:
        kind = "complete" if not affine else "equal" if difference <= TOLERANCE else "exact"
    text = TEXTS["imprecise" if affine and kind == "none" else kind]
    return HeadVerdict(kind, text, residual, difference)


def _traced(head: Head, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """The head's program for two examples; for its own batch if it takes no other."""
    dtype = jnp.zeros(()).dtype  # float64 where that is enabled
    problem = ""
    for batch in (2, shape[0]):
        wanted = (batch, *shape[1:])
        try:
            # Without nested programs, so that all of the head's arrays are constants of this one.
            with jax.disable_jit():
                traced = jax.make_jaxpr(head)(jax.ShapeDtypeStruct(wanted, dtype))
        except (TypeError, ValueError, NameError) as error:
            problem = f"the head cannot be run on features {wanted}: {error}"
            continue
        results = [x.shape for x in traced.out_avals]
        if len(results) == 1 and len(results[0]) == 2 and results[0][0] == batch:
            return traced, wanted
        problem = f"head must return logits [B, K] for features {wanted}, got {results}"
    raise ValueError(problem)


def _jittered(x: Any, seed: int) -> Any:
    """An array near `x` with as many different values as it has elements, none of them zero.

    Signs are kept, since a variance must stay positive. Integers and booleans are left alone, and
    plain numbers, such as the 0 of a ReLU.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or (x.ndim == 0 and not isinstance(x, Tracer)):
        if isinstance(x, Tracer):
            raise ValueError("the head holds traced integers, so that it cannot be run by itself")
        return x
    rng = np.random.default_rng(seed)
    random = rng.uniform(0.5, 1.5, np.shape(x))
    if isinstance(x, Tracer):
        return random.astype(x.dtype)
    x = np.asarray(x)
    signs = rng.choice([-1, 1], np.shape(x))
    near = np.where(x == 0, 0.1 * signs * random, x.astype(np.float64) * (0.9 + 0.1 * random))
    return near.astype(x.dtype)


def _probe(
    head: Callable, constants: list, features: Array, mixes: Array, scales: Array
) -> tuple[Array, Array, Array]:
    """The worst residual, difference to Grad-CAM, and gradient that reaches another example.

    Every scale of both sets of features is tried. A random mix of the logits stands for all labels:
    the maps are linear in it.
    """
    at_zero = head(constants, jnp.zeros_like(features[0]))[0]

    def one(point: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index, scale, mix = point
        logits, pull_back = jax.vjp(lambda x: head(constants, x), scale * features[index])
        (gradient,) = pull_back(jnp.zeros_like(logits).at[0].set(mix.astype(logits.dtype)))
        product = gradient[0] * scale * features[index, 0]
        scores = at_least_float32(jnp.stack([at_zero, -logits[0]])) * mix
        terms = jnp.concatenate([product.ravel(), scores.ravel()])
        size = jnp.abs(terms).sum()
        residual = jnp.abs(terms.sum()) / jnp.where(size > 0, size, 1)
        hires = product.sum(axis=-1)
        axes = tuple(range(product.ndim - 1))
        grad = (gradient[0].mean(axis=axes) * scale * features[index, 0]).sum(axis=-1)
        peak = jnp.abs(hires).max()
        difference = jnp.abs(hires - grad).max() / jnp.where(peak > 0, peak, 1)
        reach = jnp.where(jnp.isfinite(gradient[1:]), jnp.abs(gradient[1:]), 0)
        return residual, difference, reach.max(initial=0)

    points = jnp.arange(len(scales)) % len(features), scales, mixes
    return jax.tree.map(lambda x: x.max(), jax.lax.map(one, points))
