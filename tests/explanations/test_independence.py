"""Heads that mix the examples of a batch are refused by every method, and no others are."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.explanations.cam import hirescam
from hirescam_jax.explanations.explain import explain
from hirescam_jax.explanations.family import scorecam
from hirescam_jax.explanations.independence import keeps_apart
from hirescam_jax.explanations.inputs import (
    input_gradient,
    integrated_gradients,
    occlusion,
    smoothgrad,
)
from hirescam_jax.explanations.methods import METHODS
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
from tests.explanations.test_verdict import (
    BATCH_NORM,
    ONE_WAY,
    POOLED,
    RNG,
    SHAPE,
    WIDE,
    batch_norm_by_running_averages,
    example_by_example,
    flat,
    own_data,
    pooled,
    unrolled,
)


def batch_norm(x):
    x = (x - x.mean(axis=(0, 1, 2, 3))) / jnp.sqrt(x.var(axis=(0, 1, 2, 3)) + 1e-5)
    return pooled(x) @ POOLED


def linen_batch_norm(x):
    layer = nn.BatchNorm(use_running_average=False)
    return flat(layer.apply(BATCH_NORM, x, mutable=["batch_stats"])[0]) @ WIDE


def attention_between_examples(x):
    y = pooled(x) @ POOLED
    return jax.nn.softmax(y @ y.T) @ y


MIXING = {
    "batch_norm": batch_norm,
    "linen_batch_norm": linen_batch_norm,
    "jitted": jax.jit(batch_norm),
    "remat": jax.checkpoint(batch_norm),
    "mean": lambda x: (pooled(x) - pooled(x).mean(axis=0)) @ POOLED,
    "max": lambda x: (pooled(x) / jnp.abs(pooled(x)).max()) @ POOLED,
    "attention": attention_between_examples,
}


MIXING |= ONE_WAY | {
    "roll": lambda x: flat(jnp.roll(x, 1, axis=0)) @ WIDE,
    "flip": lambda x: flat(x[::-1]) @ WIDE,
    "sort": lambda x: flat(jnp.sort(x, axis=0)) @ WIDE,
    "median": lambda x: (flat(x) - jnp.median(flat(x), axis=0)) @ WIDE,
    "first": lambda x: (flat(x) - flat(x)[:1]) @ WIDE,
    "tanh_of_cumsum": lambda x: jnp.tanh(flat(jnp.cumsum(x, axis=0)) @ WIDE),
}
METHODS_OF_ALL = METHODS | {
    "scorecam": lambda head, x, labels=None: scorecam(head, x, labels, model=head, inputs=x),
    "input_gradient": input_gradient,
    "integrated_gradients": integrated_gradients,
    "smoothgrad": partial(smoothgrad, key=jax.random.key(0), std=0.1),
    "occlusion": partial(occlusion, window=2),
}


@pytest.mark.parametrize("head", MIXING.values(), ids=MIXING)
def test_heads_that_mix_examples_are_refused(head):
    features = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    with pytest.raises(ValueError, match=r"mixes the examples of a batch.*BatchNorm"):
        jax.eval_shape(partial(hirescam, head), features)
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        hirescam(head, features[:2], np.zeros((2, 1), int))
    one = jax.eval_shape(partial(hirescam, head), features[:1])  # nothing to mix with
    assert one.shape == (1, 6, *SHAPE[1:-1])


@pytest.mark.parametrize("method", METHODS_OF_ALL.values(), ids=METHODS_OF_ALL)
def test_every_method_refuses_them(method):
    features = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        jax.eval_shape(partial(method, batch_norm), features)


def test_score_cam_refuses_a_model_that_mixes_examples():
    features = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        scorecam(example_by_example, features, model=batch_norm, inputs=features)


def test_parameters_and_features_may_be_traced():
    @jax.jit
    def program(kernel, x):
        hirescam(lambda x: flat(x) @ kernel, x)
        with pytest.raises(ValueError, match="mixes the examples of a batch"):
            hirescam(lambda x: flat(jnp.sort(x, axis=0)) @ kernel, x)
        return x

    program(WIDE, jnp.ones(SHAPE))


ALONE = {
    "own_data": own_data,
    "unrolled": unrolled,
    "example_by_example": example_by_example,
    "running_averages": batch_norm_by_running_averages,
    "stopped": lambda x: flat(x) @ WIDE / jax.lax.stop_gradient(jnp.abs(x).max()),
}


@pytest.mark.parametrize("head", ALONE.values(), ids=ALONE)
def test_heads_that_only_look_as_if_they_did(head):
    """No gradient reaches another example: the maps are those of the whole Jacobian."""
    features = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    maps, jacobian = jax.jit(lambda x: (hirescam(head, x), jax.jacrev(head)(x)))(features)
    jacobian = np.asarray(jacobian)  # [B, K, B, *grid, C]
    apart = [jacobian[b, :, c] for b in range(3) for c in range(3) if b != c]
    assert not np.any(apart)
    own = np.stack([jacobian[b, :, b] for b in range(3)])
    expected = (own * np.asarray(features)[:, None]).sum(axis=-1)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hidden", "labels"),
    [((116, 124), 5), ((232, 248), 80), ((899, 7), 5), ((62, 8), 58), ((3, 3), 3)],
)
def test_no_width_of_a_layer_is_taken_for_the_batch(hidden, labels):
    widths = (int(np.prod(SHAPE[1:])), *hidden, labels)
    kernels = [np.ones(pair, np.float32) for pair in pairwise(widths)]

    def head(x):
        x = flat(x)
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return x

    maps = jax.eval_shape(partial(hirescam, head), jnp.ones(SHAPE))
    assert maps.shape == (3, labels, *SHAPE[1:-1])


def test_a_network_with_such_layers():
    model = Conv3DNet(5, widths=(4,), narrow=(3,), hidden=(116, 124))
    volumes = jax.ShapeDtypeStruct((2, 9, 9, 9), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), volumes)
    maps = jax.eval_shape(partial(explain, model), variables, volumes).maps
    assert maps.shape == (2, 5, 3, 3, 3)


NETWORKS = {
    "axialnet": (AxialNet(3, (1, 1), (4, 8), "small", (3,)), (6, 32, 32)),
    "axialnet_max": (AxialNet(3, (1, 1), (4, 8), "small", (3,), pool="max"), (6, 32, 32)),
    "axialnet_dense": (AxialNet(3, (1, 1), (4, 8), "small", (3,), pool="dense"), (6, 32, 32)),
    "conv3d": (Conv3DNet(3, widths=(4,), narrow=(3,), hidden=(6,)), (9, 9, 9)),
    "bodyconv": (BodyConv(3), (405, 420, 420)),
    "ctnet": (CTNet(3), (405, 420, 420)),
    "resnet": (ResNetClassifier(5), (64, 64, 3)),
    "vgg": (VGG(5, ((4,), (6,)), hidden=(8,)), (50, 60, 3)),
    "densenet": (DenseNet(5, (2, 3), 4, 6, 2), (64, 64, 3)),
    "mobilenet": (MobileNetV2(5), (64, 64, 3)),
}


@pytest.mark.parametrize(("model", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_whole_networks_are_seen_to_keep_examples_apart(model, shape):
    """By their programs alone: gradients of three volumes would cost too much."""
    volumes = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), volumes)
    seen = []

    def program(variables, volumes):
        traced = jax.make_jaxpr(partial(model.apply, variables))(volumes)
        seen.append(keeps_apart(traced))

    jax.eval_shape(program, variables, volumes)
    assert seen == [True]


SEEN = {
    "merged and split": (True, lambda x: flat(x.reshape(12, 6, 5) * 2.0).reshape(3, -1)),
    "merged behind": (True, lambda x: x.swapaxes(0, 1).reshape(12, 30).reshape(4, 3, 30).sum(0)),
    "split elsewhere": (None, lambda x: x.reshape(4, 3, 30).sum(axis=0)),
    "transposed": (False, lambda x: x.reshape(3, -1)[:, :3].T),
    "padded": (False, lambda x: jnp.pad(flat(x), ((1, 0), (0, 0)))[:3]),
    "a window": (False, lambda x: jax.lax.cumsum(flat(x))),
    "scaled": (True, lambda x: flat(x / jnp.abs(x).max(axis=(2, 3, 4), keepdims=True))),
    "of two": (True, lambda x: jnp.einsum("bi,bj->bij", flat(x), flat(x)).sum(axis=2)),
    "a loop": (None, lambda x: jax.lax.map(jnp.ravel, x)),
    "no features": (True, lambda x: jnp.ones((3, 2))),
}


@pytest.mark.parametrize(("apart", "function"), SEEN.values(), ids=SEEN)
def test_what_is_read_from_a_program(apart, function):
    """Against the whole Jacobian."""
    x = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    assert keeps_apart(jax.make_jaxpr(function)(x)) == apart
    jacobian = np.asarray(jax.jacrev(function)(x))
    crossing = any(jacobian[b, :, c].any() for b in range(3) for c in range(3) if b != c)
    assert apart is None or crossing != apart
