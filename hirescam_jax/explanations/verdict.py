"""What a head guarantees for its maps: read from its program, and checked on random features."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from hirescam_jax.explanations.gradients import Head, at_least_float32, is_affine
from hirescam_jax.explanations.independence import MIXES, mixes, random_like

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
    "partial": "No guarantee: a part of the head has no gradient, and a HiResCAM map does not "
    "account for it.",
}
SHORT = {"equal": "exact", "exact": "exact", "complete": "exact on the winning slices"}

# What is below is rounding, relative to the sum of the sizes of all terms: where the head computes
# in float64, and where something in it is of lower precision.
TOLERANCE, LOW_TOLERANCE = 1e-12, 1e-5
# The curvature and the residual (see `_Measured`) of a head in low precision are less.
NEARLY_AFFINE = 0.1
# A difference between two kinds of maps that is rounding, also of float32 weights.
EQUAL = 1e-5
# Heads on more features are measured in float32 and at three scales, to spare memory and time.
MANY_FEATURES = 200_000
# Features of every size, since a nonlinearity shows only where its input is as large as its bias.
SCALES = tuple(10.0**power for power in range(-3, 9))
EXAMPLES = 3  # so that one has neighbours on both sides


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HeadVerdict:
    """What HiResCAM guarantees for a head.

    kind:
        "equal": affine, with a gradient that is constant over the positions: HiResCAM is exact, and
            so are Grad-CAM and CAM, which are the same; XGrad-CAM too, unless a channel of the
            features sums to zero over the positions, as a normalised one does.
        "exact": affine: sum of the map = logit - bias.
        "complete": not affine, but sum of the map = logit - head(0) all the same, because the head
            selects: a maximum over slices of one linear layer; exact on the positions that won.
        "none": no guarantee. Several layers with ReLU belong here even where they have no bias and
            their maps happen to sum to the score; so do a few heads that select, of which that is
            not seen, such as a maximum of scores whose weights differ between the positions.
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

    @property
    def low_precision(self) -> bool:
        """Whether rounding within the head is all that speaks against a guarantee."""
        return self.text == TEXTS["imprecise"]

    def holds_for(self, method: str) -> bool:
        """Whether a method's maps account for the score, where they lie."""
        if method == "hirescam":
            return self.guaranteed
        # XGrad-CAM's are the same too, but where a channel sums to zero over the positions.
        return self.kind == "equal" and method in ("gradcam", "cam")

    def short(self, method: str = "hirescam") -> str:
        """A few words on what holds for a method of `methods.METHODS`: for tables and captions."""
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
    then). The rest is measured on random features of many sizes, three examples at a time, in
    float64 where the head takes it. The verdict is on the head's structure: arrays of other values
    stand for its own, so that biases of zero do not count as none. Only "equal" may also come from
    the values as they are, as of a matrix that averages. A head that draws random numbers (dropout
    in training mode) is what its key makes of it: with another key it is another head.

    Args:
        head: features [B, *grid, C] -> logits [B, K]. It may close over tracers, for which random
            numbers stand.
        feature_shape: (B, *grid, C). B matters only for a head that takes no other.

    Raises:
        ValueError: the head mixes the examples of a batch, or cannot be run by itself (one that
            asks for the devices of a mesh, say).
    """
    shape = tuple(feature_shape)
    if len(shape) < 3:
        raise ValueError(f"feature_shape must be (B, *grid, C) with a spatial axis, got {shape}")
    traced = _traced(head, shape)
    generic = [_generic(x, seed) for seed, x in enumerate(traced.program.consts)]
    with _precision(traced.float64):
        if mixes(traced.program, generic):
            raise ValueError(MIXES)
    found = _measured(traced, generic)
    low_precision = _has_low_precision(traced.program.jaxpr)
    tolerance = LOW_TOLERANCE if low_precision else TOLERANCE
    kind: Kind = "none"
    text, difference = None, found.difference
    if traced.affine and max(found.residual, found.curvature) <= tolerance:
        if difference > EQUAL and not any(isinstance(x, Tracer) for x in traced.program.consts):
            own = _measured(traced, traced.program.consts)
            difference = own.difference if own.peak > 0 else difference
        kind = "equal" if difference <= EQUAL else "exact"
    elif not traced.affine and max(found.residual, found.shifted) <= tolerance < found.curvature:
        kind = "complete"
    elif traced.affine:
        worst = max(found.residual, found.curvature)
        rounded = low_precision and (worst <= NEARLY_AFFINE or math.isinf(worst))  # or overflow
        text = TEXTS["imprecise" if rounded else "partial"]
    return HeadVerdict(kind, text or TEXTS[kind], found.residual, difference)


class _Traced(NamedTuple):
    """A head's program, the types it was traced with, and whether its gradient is constant."""

    program: Any
    float64: bool
    affine: bool
    probe: Callable[..., "_Measured"]


def _traced(head: Head, shape: tuple[int, ...]) -> _Traced:
    """For three examples, or for its own batch if the head takes no other; in float64 if it can."""
    problem = ""
    for float64 in (False,) if math.prod(shape[1:]) > MANY_FEATURES else (True, False):
        for batch in (EXAMPLES, shape[0]):
            wanted = (batch, *shape[1:])
            try:
                with _precision(float64):
                    x = jax.ShapeDtypeStruct(wanted, jnp.zeros(()).dtype)
                    # Without nested programs, so that all of the head's arrays are constants.
                    with jax.disable_jit():
                        program = jax.make_jaxpr(head)(x)
                    results = [aval.shape for aval in program.out_avals]
                    if len(results) == 1 and len(results[0]) == 2 and results[0][0] == batch:
                        affine = is_affine(head, x)
                        probe = jax.jit(partial(_probe, program))
                        return _Traced(program, float64, affine, probe)
            except (TypeError, ValueError, NameError) as error:
                problem = f"the head cannot be run on features {wanted}: {error}"
                continue
            problem = f"head must return logits [B, K] for features {wanted}, got {results}"
    raise ValueError(problem)


@contextlib.contextmanager
def _precision(float64: bool):
    """As exact as can be: without TF32 and the like, which GPUs use for float32."""
    with contextlib.ExitStack() as stack:
        if float64:
            stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.default_matmul_precision("highest"))
        yield


def _has_low_precision(jaxpr: Any) -> bool:
    """Whether anything that a program computes is a float of less than 64 bits."""
    if any(equation.primitive.name == "reduce_precision" for equation in jaxpr.eqns):
        return True
    dtypes = [v.aval.dtype for equation in jaxpr.eqns for v in equation.outvars]
    return any(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8 for dtype in dtypes)


def _generic(x: Any, seed: int) -> Any:
    """An array like `x` with as many different values as it has elements, none of them near zero.

    Signs are kept, since a variance must stay positive. Integers and booleans are left alone, and
    plain numbers, such as the 0 of a ReLU.
    """
    if isinstance(x, Tracer):
        return random_like(x, seed)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0:
        return x
    random = np.random.default_rng(seed).uniform(0.5, 1.5, np.shape(x))
    values = np.asarray(x).astype(np.float64)
    signs = np.where(values < 0, -1, 1)
    return (signs * np.maximum(np.abs(values), 0.1) * (0.5 + 0.5 * random)).astype(x.dtype)


class _Measured(NamedTuple):
    """The worst of all random features, each relative to the sum of the sizes of its terms.

    residual: sum of the map + head(0) - logit.
    shifted: the same for x -> head(x + c) with one c for all positions: zero where the head selects
        between places of equal weights, but not where parts of it are switched off.
    curvature: head(x + y) - head(x) - head(y) + head(0), zero for an affine head only.
    difference: of a HiResCAM map to a Grad-CAM map, relative to its largest value, the peak.
    """

    residual: Any
    shifted: Any
    curvature: Any
    difference: Any
    peak: Any


def _measured(traced: _Traced, constants: list) -> _Measured:
    """With these in place of the head's own arrays."""
    aval, logits = traced.program.in_avals[0], traced.program.out_avals[0]
    rng = np.random.default_rng(0)
    # Each example and channel has its own mean: what is pooled must be no smaller than what is not.
    means = rng.standard_normal((aval.shape[0], *[1] * (len(aval.shape) - 2), aval.shape[-1]))
    features = (means + rng.standard_normal(aval.shape)).astype(aval.dtype)
    shift = rng.standard_normal(aval.shape[-1]).astype(aval.dtype)
    few = math.prod(aval.shape[1:]) > MANY_FEATURES
    scales = np.asarray(SCALES[1::4] if few else SCALES, aval.dtype)
    mixes = rng.standard_normal((len(scales), logits.shape[1])).astype(aval.dtype)
    with _precision(traced.float64), eval_context():  # now, even where this is traced
        found = traced.probe(constants, features, shift, mixes, scales)
        return _Measured(*(float(np.nan_to_num(x, nan=np.inf)) for x in found))


# What is tried at each scale: multiples of features x, of others y and of a shift c.
TRIED = {"0": (0, 0, 0), "x": (1, 0, 0), "y": (0, 1, 0), "x+y": (1, 1, 0), "c": (0, 0, 1)}
TRIED["x+c"] = (1, 0, 1)


class _Found(NamedTuple):
    """Of one input: the score, and of its gradient times x the sum and the sum of sizes; the
    difference to Grad-CAM and the peak as in `_Measured`."""

    score: Array
    total: Array
    size: Array
    difference: Array
    peak: Array


def _probe(
    program: Any, constants: list, features: Array, shift: Array, mixes: Array, scales: Array
) -> _Measured:
    """Every scale is tried, with one of the examples after the other.

    A random mix of the logits stands for all labels: the maps are linear in it. Each label counts
    alike in it, however large its weights. One input after the other, so that the head is compiled
    once.
    """
    run = jaxpr_as_fun(program.replace(consts=constants))

    def rises(scale: Array) -> Array:
        return jnp.abs(run(scale * features)[0] - run(0 * features)[0]).max(axis=0)

    sizes = jax.lax.map(rises, scales).astype(mixes.dtype)
    mixes = mixes / jnp.where(jnp.isfinite(sizes) & (sizes > 0), sizes, 1)

    def one(point: tuple[Array, Array, Array]) -> _Found:
        index, scale, multiples = point
        example = index % len(features)
        own = jnp.arange(len(features)) == example
        x = scale * features
        of_x, of_y, of_shift = multiples * scale
        # Both ways: a part that is switched on by c is off at -c.
        of_shift *= jnp.where(index % 2, -1, 1)
        tried = of_x * features + of_y * jnp.roll(features, 1, axis=0) + of_shift * shift
        logits, pull_back = jax.vjp(lambda x: run(x)[0], tried)
        cotangent = jnp.where(own[:, None], mixes[index], 0).astype(logits.dtype)
        (gradient,) = pull_back(cotangent)
        product = gradient[example] * x[example]
        hires = product.sum(axis=-1)
        mean = gradient[example].mean(axis=tuple(range(hires.ndim)))
        peak = jnp.abs(hires).max()
        difference = jnp.abs(hires - (mean * x[example]).sum(axis=-1)).max()
        return _Found(
            (at_least_float32(logits[example]) * mixes[index]).sum().astype(x.dtype),
            product.sum(),
            jnp.abs(product).sum(),
            difference / jnp.where(peak > 0, peak, 1),
            peak,
        )

    indices = jnp.repeat(jnp.arange(len(scales)), len(TRIED))
    multiples = jnp.tile(jnp.asarray(list(TRIED.values()), features.dtype), (len(scales), 1))
    every = jax.lax.map(one, (indices, scales[indices], multiples))
    at = {
        name: _Found(*(values.reshape(len(scales), -1)[:, i] for values in every))
        for i, name in enumerate(TRIED)
    }
    score = {name: found.score for name, found in at.items()}

    def incomplete(name: str, baseline: str) -> Array:
        """How far a map is from the score, for a head that is `baseline` where x is 0."""
        rest = score[name] - score[baseline]
        size = at[name].size + jnp.abs(score[name]) + jnp.abs(score[baseline])
        return _relative(at[name].total - rest, size)

    corners = jnp.stack([score["x+y"], -score["x"], -score["y"], score["0"]])
    return _Measured(
        incomplete("x", "0").max(),
        incomplete("x+c", "c").max(),
        _relative(corners.sum(axis=0), jnp.abs(corners).sum(axis=0)).max(),
        at["x"].difference.max(),
        at["x"].peak.max(),
    )


def _relative(value: Array, size: Array) -> Array:
    return jnp.abs(value) / jnp.where(size > 0, size, 1)
