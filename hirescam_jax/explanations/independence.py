"""Whether a head treats the examples of a batch independently of each other, and alike.

Its program is read: the axis of the examples is followed from the features to the logits, through
operations that keep examples apart. That runs nothing and needs no values (parameters may be
traced, and the grid split over devices). Where it meets any other operation (a sum over the batch,
a sort, a loop), gradients on random features decide.

Comparing the logits of a batch with those of each example alone would be simpler, but it cannot
tell a head that mixes examples from one that has numbers of its own for each, as dropout does.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float

MIXES = (
    "the head mixes the examples of a batch: the gradient of one example's logit reaches another's "
    "features. Take BatchNorm (in training mode) or whatever else works across the batch out of "
    "the head, into the features"
)

CALLS = ("jit", "closed_call", "eval_jaxpr", "remat2", "custom_jvp_call", "custom_vjp_call")
# Sums over devices count as such: they are over positions, where a grid is split.
_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type
    copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite
    le lgamma log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or
    pbroadcast pow ppermute psum psum_invariant pvary real reduce_precision rem round rsqrt
    select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
POINTWISE = frozenset(_NAMES.split())
# What works along the axes that one of its parameters names, and along no others.
_NAMES = """
    argmax argmin concatenate cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max
    reduce_min reduce_or reduce_prod reduce_sum rev sort split
"""
ALONG_AXES = frozenset(_NAMES.split())
AXES = ("axes", "axis", "dimension", "dimensions")
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
OVER_DEVICES = ("psum", "ppermute", "all_gather", "all_to_all", "axis_index", "reduce_scatter")
# Sizes of random features: a nonlinearity that is saturated has no gradient.
SCALES = (1e-3, 1.0, 1e3)


class Place(NamedTuple):
    """Where the examples lie: along `axis`, whose size is outer * examples * inner."""

    axis: int
    outer: int = 1
    inner: int = 1


# Of what does not depend on the features: the axes along which it is seen to be constant.
Constant: TypeAlias = frozenset[int]
Value: TypeAlias = Place | Constant


class _UnknownError(Exception):
    """An operation of which it is not known whether it keeps examples apart."""


class _CrossedError(Exception):
    """An operation that works along the examples."""


def check_independent(head: Callable[[Array], Array], features: Float[Array, "B *grid C"]) -> None:
    """Costs tracing; and gradients on random features where the program alone does not tell.

    Raises:
        ValueError: the gradient of one example's logit reaches another's features.
    """
    if features.shape[0] > 1 and mixes(jax.make_jaxpr(head)(features)):
        raise ValueError(MIXES)


def mixes(program: Any, constants: list | None = None) -> bool:
    """Whether gradients reach other examples in a program, features [B, ...] -> logits [B, K].

    Args:
        constants: in place of the program's own; by default random ones where those are traced.
    """
    apart = keeps_apart(program)
    if apart:
        return False
    if any(name in str(program) for name in OVER_DEVICES):
        return apart is False  # it cannot be run by itself
    if constants is None:
        own = enumerate(program.consts)
        constants = [random_like(x, i) if isinstance(x, Tracer) else x for i, x in own]
    return _reaches_others(program, constants)


def keeps_apart(program: Any) -> bool | None:
    """Whether a program, features [B, ...] -> logits [B, K], is seen to keep the examples apart.

    False if something in it works along the examples, which need not reach a gradient; None if
    there is an operation of which that is not known.
    """
    return _Reading(program).apart


def treats_alike(program: Any) -> bool:
    """Whether a program is seen to do the same with each example: not so, or not seen, where it has
    numbers of its own for each."""
    reading = _Reading(program)
    return bool(reading.apart) and reading.alike


class _Reading:
    def __init__(self, program: Any):
        self.count = program.in_avals[0].shape[0]
        self.alike = True
        self.apart: bool | None
        try:
            results = self.follow(program.jaxpr, [Place(0)])
            self.apart = len(results) == 1 and (results[0] == Place(0) or not _is_place(results[0]))
        except _CrossedError:
            self.apart = False
        except _UnknownError:
            self.apart = None

    def follow(self, jaxpr: Any, inputs: list[Value]) -> list[Value]:
        """The values of a program's results."""
        known = {id(v): value for v, value in zip(jaxpr.invars, inputs, strict=True)}

        def value(v: Any) -> Value:
            found = known.get(id(v), Constant())
            if isinstance(found, Place):
                return found
            return found | {i for i, size in enumerate(getattr(v.aval, "shape", ())) if size == 1}

        def values(variables: list) -> list[Value]:
            return list(map(value, variables))

        for equation in jaxpr.eqns:
            before = values(equation.invars)
            if equation.primitive.name in CALLS:
                after = self.follow(_called(equation.params), before)
            elif any(map(_is_place, before)):
                after = self.after(equation, before)
            else:
                after = [_constant_along(equation, before)] * len(equation.outvars)
            known.update(zip(map(id, equation.outvars), after, strict=True))
        return values(jaxpr.outvars)

    def after(self, equation: Any, values: list[Value]) -> list[Value]:
        """The values of an operation's results, of which some input depends on the features."""
        name, params = equation.primitive.name, equation.params
        if name == "cond" and not _is_place(values[0]):
            first, *rest = [self.follow(b.jaxpr, values[1:]) for b in params["branches"]]
            if all(branch == first for branch in rest):
                return first
        shapes = [v.aval.shape for v in equation.invars]
        if name == "dot_general":
            return [self.after_dot(params["dimension_numbers"], shapes, values)]
        places = [(value, s) for value, s in zip(values, shapes, strict=True) if _is_place(value)]
        (place, shape), result = places[0], equation.outvars[0].aval.shape
        assert isinstance(place, Place)
        if any(other != place for other, _ in places):
            raise _CrossedError
        crossed, axis = False, place.axis
        moved = axis
        match name:
            case _ if name in POINTWISE:
                crossed = any(other[axis] != result[axis] for _, other in places)
            case _ if name in ALONG_AXES:
                (axes,) = (np.atleast_1d(params[n]) for n in AXES if n in params)
                crossed = axis in axes
                moved = axis - (len(result) < len(shape)) * int((axes < axis).sum())
            case "broadcast_in_dim":
                moved = params["broadcast_dimensions"][axis]
            case "transpose":
                moved = params["permutation"].index(axis)
            case "reshape" | "squeeze":
                return [_reshaped(shape, place, result, self.count)]
            case "pad":
                crossed = not _is_place(values[0])
                crossed = crossed or tuple(params["padding_config"][axis]) != (0, 0, 0)
            case "slice" | "dynamic_slice":
                crossed = not _is_place(values[0]) or result[axis] != shape[axis]
            case _ if name in WINDOWS:
                at = params["window_dimensions"][axis], tuple(params["padding"][axis])
                crossed = at != (1, (0, 0)) or result[axis] != shape[axis]
            case "conv_general_dilated":
                layout = params["dimension_numbers"]
                crossed = not _is_place(values[0]) or axis != layout.lhs_spec[0]
                crossed = crossed or params["batch_group_count"] != 1 or len(places) > 1
                moved = layout.out_spec[0]
            case _:
                raise _UnknownError
        if crossed:
            raise _CrossedError
        if name in POINTWISE | ALONG_AXES:
            for other, value in zip(shapes, values, strict=True):
                self.alike &= not other or _is_place(value) or axis in value
        return [place._replace(axis=moved)] * len(equation.outvars)

    def after_dot(self, dimensions: Any, shapes: list, values: list[Value]) -> Place:
        contracted, batched = dimensions
        free = [
            [d for d in range(len(shape)) if d not in (*contracted[side], *batched[side])]
            for side, shape in enumerate(shapes)
        ]
        moved = []
        for side, place in enumerate(values):
            if not isinstance(place, Place):
                continue
            other = values[1 - side]
            if place.axis in batched[side]:
                axis = list(batched[side]).index(place.axis)
                self.alike &= isinstance(other, Place) or batched[1 - side][axis] in other
            elif place.axis in free[side] and not isinstance(other, Place):
                axis = len(batched[0]) + side * len(free[0]) + free[side].index(place.axis)
            else:
                raise _CrossedError
            moved.append(place._replace(axis=axis))
        if any(place != moved[0] for place in moved):
            raise _CrossedError
        return moved[0]


def _is_place(value: Value) -> bool:
    return isinstance(value, Place)


def _called(params: Any) -> Any:
    """The program that one of `CALLS` runs."""
    called = params.get("call_jaxpr", params.get("jaxpr"))
    return getattr(called, "jaxpr", called)


def _constant_along(equation: Any, values: list[Value]) -> Constant:
    """The axes of a result along which it is seen to be constant, of such inputs."""
    axes = set(range(len(getattr(equation.outvars[0].aval, "shape", ()))))
    name = equation.primitive.name
    operands = [(v.aval.shape, value) for v, value in zip(equation.invars, values, strict=True)]
    if name == "broadcast_in_dim":
        (shape, value), places = operands[0], equation.params["broadcast_dimensions"]
        axes -= {places[i] for i in range(len(shape)) if i not in value}
    elif name in POINTWISE:
        axes.intersection_update(*(value for shape, value in operands if shape))
    else:
        axes = ()
    return Constant(axes)


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


def _reaches_others(program: Any, constants: list) -> bool:
    """On random features: from the logits of the first, the middle and the last example."""
    rng = np.random.default_rng(0)
    x, cotangent = (
        rng.standard_normal(aval.shape).astype(program.in_avals[0].dtype)
        for aval in (program.in_avals[0], program.out_avals[0])
    )
    examples = np.unique([0, len(x) // 2, len(x) - 1])

    def reach(constants: list, x: Array, cotangent: Array) -> Array:
        run = jaxpr_as_fun(program.replace(consts=constants))

        def of_one(point: tuple[Array, Array]) -> Array:
            example, scale = point
            logits, pull_back = jax.vjp(lambda x: run(x)[0], scale * x)
            own = jnp.arange(len(x)) == example
            cotangents = jnp.where(own[:, None], cotangent, 0).astype(logits.dtype)
            (gradient,) = pull_back(cotangents)
            apart = ~own.reshape(-1, *(1,) * (gradient.ndim - 1)) & jnp.isfinite(gradient)
            return jnp.where(apart, jnp.abs(gradient), 0).max()

        scales = jnp.asarray(SCALES, x.dtype)
        points = jnp.tile(examples, len(scales)), jnp.repeat(scales, len(examples))
        return jax.lax.map(of_one, points).max()

    with eval_context():  # now, even where this is traced
        return bool(jax.jit(reach)(constants, x, cotangent) > 0)


def random_like(x: Any, seed: int) -> Any:
    """What may stand for an array whose values are not known while a program is traced."""
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = rng.integers(2**31, size=jax.random.key_data(x).shape, dtype=np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return rng.integers(2, size=x.shape).astype(x.dtype)
    return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)  # positive, as a variance must be
