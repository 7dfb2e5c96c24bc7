"""Every kind of derivative of every network with running statistics, on every platform: none of the
layers' ways of computing stands in the way, whatever the image's size."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from hirescam_jax.devices import mesh as sharding
from hirescam_jax.models import (
    VGG,
    AxialNet,
    BodyConv,
    Conv3DNet,
    CTNet,
    DenseNet,
    MobileNetV2,
    ResNetClassifier,
)
from hirescam_jax.models.layers import convolution, max_pool
from tests.devices.test_mesh import ABSTRACT
from tests.models.test_models import random_variables

SMALL = {"blocks": (1,), "widths": (16,), "stem": "small", "conv_padding": "SAME"}
# With shapes of an image, which are odd, of one place, smaller or larger than the kernels.
NETWORKS = {
    "mean": (AxialNet(2, (1,), (4,), "imagenet", (5,), "SAME"), [(1, 6, 33, 20), (1, 3, 2, 3)]),
    "max": (AxialNet(2, **SMALL, conv_widths=(16,), pool="max", remat=True),
            [(1, 6, 8, 8), (2, 3, 1, 1), (1, 6, 5, 3)]),
    "dense": (AxialNet(2, **SMALL, conv_widths=(), pool="dense", block="bottleneck"),
              [(1, 6, 7, 9)]),
    "conv3d": (Conv3DNet(2, (4,), (5,), (6,)), [(1, 3, 3, 3), (1, 7, 8, 5)]),
    "bodyconv": (BodyConv(2, (1,), (6,), "small", (4,), 1, (5,)), [(1, 7, 4, 5)]),
    "ctnet": (CTNet(2, (1,), (6,), "small", (4,), 2, (5,)), [(1, 4, 5, 4)]),
    "resnet": (ResNetClassifier(2, (1,), (4,)), [(1, 1, 1, 3), (1, 9, 14, 3)]),
    "vgg": (VGG(2, ((4,), (6,)), hidden=(5,)), [(1, 4, 4, 3), (1, 9, 7, 3)]),
    "densenet": (DenseNet(2, (1, 1), 4, 4, 2), [(1, 8, 8, 3), (1, 17, 9, 3)]),
    "mobilenet": (MobileNetV2(2, ((2, 4, 1, 1), (2, 6, 1, 2)), 4, 8), [(1, 1, 1, 3), (1, 9, 6, 3)]),
}  # fmt: skip
CASES = [
    pytest.param(name, shape, marks=[pytest.mark.long] if i > 0 else [])
    for name, (_, shapes) in NETWORKS.items()
    for i, shape in enumerate(shapes)
]


# Compiles faster.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_forward_mode_is_finite_differences(monkeypatch, name, shape):
    """Of logits along a direction of parameters and image (`jax.jvp`, `jax.linearize`), and of the
    gradient of a curved function of them (a product with its `jax.hessian`), in float64."""
    model, _ = NETWORKS[name]
    start = random_variables(model, shape)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # of users' networks none is
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        double = partial(jnp.asarray, dtype=jnp.float64)
        at = (jax.tree.map(double, start["params"]), double(rng.normal(size=shape)))
        along = jax.tree.map(lambda x: double(rng.normal(size=x.shape)), at)
        statistics = jax.tree.map(double, start.get("batch_stats", {}))
        network = model.clone(dtype="float64")

        def logits(at):
            return network.apply({"params": at[0], "batch_stats": statistics}, at[1])

        def gradient(at):
            return jax.grad(lambda at: jnp.sin(3 * logits(at)).sum())(at)

        @compiled
        def found():
            y, linear = jax.linearize(logits, at)
            tangent = jax.jvp(logits, (at,), (along,))
            return tangent, (y, linear(along)), jax.jvp(gradient, (at,), (along,))[1]

        @compiled
        def differences():
            def moved(step):
                there = jax.tree.map(lambda x, d: x + step * d, at, along)
                return logits(there), gradient(there)

            step = 1e-6
            ends = lax.map(moved, jnp.asarray([step, -step]))
            return jax.tree.map(lambda x: (x[0] - x[1]) / (2 * step), ends)

        (y, tangent), linear, curved = found()
        wanted, wanted_curved = differences()
    np.testing.assert_allclose(linear, (y, tangent), rtol=1e-12, atol=1e-12)
    assert np.abs(tangent).max() > 1e-3
    # Central differences: rounding 1e-16 / 1e-6, and third derivatives times 1e-12.
    for got, want in zip(
        jax.tree.leaves((tangent, curved)), jax.tree.leaves((wanted, wanted_curved)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * (1 + np.abs(want).max()))


@pytest.mark.parametrize(
    ("image", "kernel", "strides"),
    [((2, 2), (3, 3), 1), ((3, 4), (3, 3), 2), ((1, 1), (3, 3), 1), ((4, 3, 2), (2, 2, 2), 1)],
)
def test_the_hessian_of_a_convolution_is_the_plain_ones(image, kernel, strides):
    """By input and kernel, which it is bilinear in; also for many at once."""
    rng = np.random.default_rng(0)
    letters = "DHW"[-len(image) :]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def plain(x, w):
        pads, each = [(1, 1)] * len(image), (strides,) * len(image)
        return lax.conv_general_dilated(x, w, each, pads, dimension_numbers=numbers)

    def hessians(convolve, x, w):
        def curved(x, w):
            return jnp.sin(convolve(x, w)).sum()

        return jax.vmap(jax.hessian(curved, (0, 1)), (0, None))(x, w)

    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 1, *image, 3)))
        w = jnp.asarray(rng.normal(size=(*kernel, 3, 5)))
        found = jax.jit(partial(hessians, partial(convolution, stride=strides, padding=1)))(x, w)
        wanted = jax.jit(partial(hessians, plain))(x, w)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


ON_A_MESH = {
    "max": (4, 36, 4, 4),
    "dense": (4, 36, 4, 4),
    "conv3d": (4, 36, 5, 5),
    "bodyconv": (4, 36, 4, 4),
}


@pytest.mark.parametrize("name", ON_A_MESH)
def test_forward_mode_on_a_mesh(name):
    """Its types: forward over reverse where volumes and slices are split over devices."""
    model, shape = NETWORKS[name][0], ON_A_MESH[name]
    whole = jax.ShapeDtypeStruct((1, 33, *shape[2:]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), whole)
    variables = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), variables)

    def part(x):
        with sharding.volume_of(2, 3, 33 // model.depth_unit):
            gradient = jax.grad(lambda x: (model.apply(variables, x) ** 2).sum())
            return jax.jvp(gradient, (x,), (x,))[1]

    spec = PartitionSpec("data", "depth")
    split = jax.shard_map(part, mesh=ABSTRACT, in_specs=spec, out_specs=spec)
    assert jax.eval_shape(split, jnp.zeros(shape)).shape == shape


def operations(platform, function, *arguments):
    """How often each operation occurs in the program for a platform, which need not be here."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    found = Counter(re.findall(r"\b(?:stablehlo|chlo)\.([a-z_]+)", program))
    for frame in ("case", "constant", "return"):  # a choice of one, by a constant
        del found[frame]
    return found


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_hold_nothing_of_the_cpus(monkeypatch, platform):
    """Gradients of layers of all kinds are, operation for operation, those of XLA's own."""

    def loss(volume, image, kernel_3d, kernel, large):
        volume = convolution(volume, kernel_3d, 2, padding=1)
        image = max_pool(max_pool(nn_relu(convolution(image, kernel))), 2, 0)
        image = convolution(convolution(image, kernel, padding=1), large, padding=1)
        return (volume**2).sum() + (image**2).sum()

    def nn_relu(x):
        return jnp.maximum(x, 0)

    shapes = [(1, 5, 5, 5, 2), (1, 14, 14, 4), (3, 3, 3, 2, 3), (3, 3, 4, 4), (3, 3, 4, 9)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(loss, tuple(range(len(shapes))))
    cpu = operations("cpu", gradient, *arguments)
    found = operations(platform, gradient, *arguments)
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **_: default(*args))
    jax.clear_caches()
    wanted = operations(platform, jax.grad(loss, tuple(range(len(shapes)))), *arguments)
    assert found == wanted
    assert found["select_and_scatter"] == 2
    assert found["dot_general"] == 0 < cpu["dot_general"]
    assert cpu["select_and_scatter"] == 0


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["mean", "conv3d", "densenet", "vgg"])
def test_forward_mode_is_lowered_for_other_platforms(platform, name):
    model, shapes = NETWORKS[name]
    image = jax.ShapeDtypeStruct(shapes[0], jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def product(variables, x):
        gradient = jax.grad(lambda x: (model.apply(variables, x) ** 2).sum())
        return jax.jvp(gradient, (x,), (x,))[1]

    assert operations(platform, product, variables, image)["convolution"] > 3
