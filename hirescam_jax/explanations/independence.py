"""Whether a head treats the examples of a batch independently of each other.

Its program is read first: the axis of the examples is followed from the features to the logits,
through operations that keep examples apart. Where it meets any other operation (a sum over the
batch, a sort, a loop), gradients on random features decide.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, Float

MIXES = (
    "the head mixes the examples of a batch: the gradient of one example's logit reaches another's "
    "features. Take BatchNorm (in training mode) or whatever else works across the batch out of "
    "the head, into the features"
)

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# Sums over devices count as such: they are over positions, where a grid is split.
_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
    copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite
    le lgamma log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or
    pbroadcast pcast pow ppermute psum psum_invariant pvary real reduce_precision rem round rsqrt
    select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
POINTWISE = frozenset(_NAMES.split())
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
REDUCTIONS += ("argmax", "argmin")
# Sizes of random features: a nonlinearity that is saturated has no gradient.
SCALES = (1e-3, 1.0, 1e3)
OVER_DEVICES = ("psum", "ppermute", "all_gather", "all_to_all", "axis_index", "reduce_scatter")
ALONG_AN_AXIS = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "split")
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")


class Place(NamedTuple):
    """Where the examples lie: along `axis`, whose size is outer * examples * inner."""

    axis: int
    outer: int = 1
    inner: int = 1


class _UnknownError(Exception):
    """An operation of which it is not known whether it keeps examples apart."""


class _CrossedError(Exception):
    """An operation that works along the examples."""


def check_independent(head: Callable[[Array], Array], features: Float[Array, "B *grid C"]) -> None:
    """Costs tracing; and a gradient of three examples where the program alone does not tell.

    Raises:
        ValueError: the gradient of one example's logit reaches another's features.
    """
    if features.shape[0] < 2:
        return
    program = jax.make_jaxpr(head)(features)
    apart = keeps_apart(program)
    if apart:
        return
    if any(name in str(program) for name in OVER_DEVICES):
        mixes = apart is False  # it cannot be run by itself
    else:
        mixes = _reaches_others(program, head, features)
    if mixes:
        raise ValueError(MIXES)


def keeps_apart(program: Any) -> bool | None:
    """Whether a program, features [B, ...] -> logits [B, K], is seen to keep the examples apart.

    False if something in it works along the examples, which need not reach a gradient; None if
    there is an operation of which that is not known.
    """
    return _kept_apart(program.jaxpr, [Place(0)], program.in_avals[0].shape[0])


def _kept_apart(jaxpr: Any, places: list[Place | None], count: int) -> bool | None:
    try:
        return _follow(jaxpr, places, count) in ([None], [Place(0)])
    except _CrossedError:
        return False
    except _UnknownError:
        return None


def treats_alike(jaxpr: Any, examples: int, count: int) -> bool:
    """Whether a program does the same with each of `count` examples, which lie along the first axis
    of its inputs (their number is `examples`, 0 or 1) and of its result; False if that is not seen.

    No other axis may be a multiple of `count`.
    """
    apart = _kept_apart(jaxpr, [Place(0)] * examples, count)
    return bool(apart) and _others_alike(jaxpr, [True] * examples, count)


def _others_alike(jaxpr: Any, followed: list[bool], count: int) -> bool:
    """Whether what does not depend on the inputs that are followed is the same for all examples: it
    has no axis for them, or one along which it was broadcast."""
    known = {id(v) for v, own in zip(jaxpr.invars, followed, strict=True) if own}

    def has_axis(v: Any) -> bool:
        return any(size % count == 0 for size in getattr(v.aval, "shape", ()))

    def may_differ(equation: Any) -> bool:
        kept = equation.primitive.name in (*POINTWISE, "broadcast_in_dim")
        return not kept and any(map(has_axis, equation.outvars))

    if any(map(has_axis, jaxpr.constvars)):
        return False
    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [id(v) in known for v in equation.invars]
        if name in CALLS:
            if not _others_alike(_called(equation.params), inputs, count):
                return False
        elif not any(inputs) and may_differ(equation):
            return False
        if any(inputs):
            known.update(map(id, equation.outvars))
    return True


def _called(params: Any) -> Any:
    """The program that one of `CALLS` runs."""
    called = params.get("call_jaxpr", params.get("jaxpr", params.get("fun_jaxpr")))
    return getattr(called, "jaxpr", called)


def _follow(jaxpr: Any, places: list[Place | None], count: int) -> list[Place | None]:
    """Where the examples lie in a program's results; None for what does not depend on them."""
    known = {id(v): place for v, place in zip(jaxpr.invars, places, strict=True)}
    for equation in jaxpr.eqns:
        before = [known.get(id(v)) for v in equation.invars]
        if any(before):
            after = _after(equation, before, count)
            known.update(zip(map(id, equation.outvars), after, strict=True))
    return [known.get(id(v)) for v in jaxpr.outvars]


def _after(equation: Any, places: list[Place | None], count: int) -> list[Place | None]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return _follow(_called(params), places, count)
    if name == "cond" and places[0] is None:
        first, *rest = [_follow(b.jaxpr, places[1:], count) for b in params["branches"]]
        if all(branch == first for branch in rest):
            return first
    if name == "dot_general":
        return [_after_dot(params["dimension_numbers"], equation.invars, places)]
    tracked = [(v.aval.shape, p) for v, p in zip(equation.invars, places, strict=True) if p]
    shape, place = tracked[0]
    axis, result = place.axis, equation.outvars[0].aval.shape
    if any(other != place for _, other in tracked):
        raise _CrossedError
    crossed, moved = False, axis
    match name:
        case _ if name in POINTWISE:
            crossed = any(other != result for other, _ in tracked)
        case "broadcast_in_dim":
            moved = params["broadcast_dimensions"][axis]
        case "transpose":
            moved = params["permutation"].index(axis)
        case "reshape" | "squeeze" | "expand_dims":
            return [_reshaped(shape, place, result, count)]
        case _ if name in REDUCTIONS:
            crossed = axis in params["axes"]
            moved = axis - sum(a < axis for a in params["axes"])
        case _ if name in ALONG_AN_AXIS:
            crossed = axis == params["axis"]
        case "sort" | "concatenate":
            crossed = axis == params["dimension"]
        case "rev":
            crossed = axis in params["dimensions"]
        case "pad":
            crossed = not places[0] or tuple(params["padding_config"][axis]) != (0, 0, 0)
        case "slice" | "dynamic_slice":
            crossed = not places[0] or result[axis] != shape[axis]
        case _ if name in WINDOWS:
            at = params["window_dimensions"][axis], tuple(params["padding"][axis])
            crossed = at != (1, (0, 0)) or result[axis] != shape[axis]
        case "conv_general_dilated":
            layout = params["dimension_numbers"]
            crossed = places[0] is None or axis != layout.lhs_spec[0]
            crossed = crossed or params["batch_group_count"] != 1 or len(tracked) > 1
            moved = layout.out_spec[0]
        case _:
            raise _UnknownError
    if crossed:
        raise _CrossedError
    return [place._replace(axis=moved)] * len(equation.outvars)


def _after_dot(dimensions: Any, operands: list, places: list[Place | None]) -> Place:
    contracted, batched = dimensions
    moved = []
    for side, place in enumerate(places):
        if place is None:
            continue
        free = [
            [d for d in range(v.aval.ndim) if d not in (*contracted[i], *batched[i])]
            for i, v in enumerate(operands)
        ]
        if place.axis in batched[side]:
            axis = list(batched[side]).index(place.axis)
        elif place.axis in free[side] and len([p for p in places if p]) == 1:
            axis = len(batched[0]) + side * len(free[0]) + free[side].index(place.axis)
        else:
            raise _CrossedError
        moved.append(place._replace(axis=axis))
    if any(place != moved[0] for place in moved):
        raise _CrossedError
    return moved[0]


def _reshaped(shape: tuple[int, ...], place: Place, result: tuple[int, ...], count: int) -> Place:
    """The examples' axis may be merged with its neighbours, and split from them again."""
    if 0 in result:
        raise _UnknownError
    before = math.prod(shape[: place.axis]) * place.outer
    for axis, size in enumerate(result):
        outer, rest = divmod(before, math.prod(result[:axis]))
        if rest == 0 and size % (outer * count) == 0:
            return Place(axis, outer, size // (outer * count))
    raise _UnknownError


def _reaches_others(program: Any, head: Callable[[Array], Array], features: Array) -> bool:
    """On random features of three examples."""
    batch = min(3, features.shape[0])
    fewer = jax.ShapeDtypeStruct((batch, *features.shape[1:]), features.dtype)
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # it may take its batch only
        smaller = jax.make_jaxpr(head)(fewer)
        program = smaller if smaller.out_avals[0].shape[0] == batch else program
    consts = enumerate(program.consts)
    constants = [random_like(x, i) if isinstance(x, Tracer) else x for i, x in consts]
    rng = np.random.default_rng(0)
    x, cotangent = (
        rng.standard_normal(aval.shape).astype(features.dtype)
        for aval in (program.in_avals[0], program.out_avals[0])
    )

    def reach(constants: list, x: Array, cotangent: Array) -> Array:
        run = jaxpr_as_fun(program.replace(consts=constants))

        def of_one(point: tuple[Array, Array]) -> Array:
            example, scale = point
            logits, pull_back = jax.vjp(lambda x: run(x)[0], scale * x)
            own = jnp.arange(len(x)) == example
            cotangents = jnp.where(own[:, None], cotangent, 0).astype(logits.dtype)
            return reach_of_others(pull_back(cotangents)[0], own)

        examples, scales = jnp.arange(len(x)), jnp.asarray(SCALES, x.dtype)
        points = jnp.tile(examples, len(scales)), jnp.repeat(scales, len(examples))
        return jax.lax.map(of_one, points).max()

    with eval_context():  # now, even where this is traced
        return bool(jax.jit(reach)(constants, x, cotangent) > 0)


def reach_of_others(gradient: Float[Array, "B *grid C"], own: Bool[Array, "B"]) -> Array:
    """The largest gradient at an example other than the own one."""
    apart = ~own.reshape(-1, *(1,) * (gradient.ndim - 1)) & jnp.isfinite(gradient)
    return jnp.where(apart, jnp.abs(gradient), 0).max()


def random_like(x: Any, seed: int) -> Any:
    """What may stand for an array whose values are not known while a program is traced."""
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = rng.integers(2**31, size=jax.random.key_data(x).shape, dtype=np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return rng.integers(2, size=x.shape).astype(x.dtype)
    return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)  # positive, as a variance must be
