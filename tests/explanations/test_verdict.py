"""The verdict on heads, and heads that mix the examples of a batch."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.explanations import explain as explaining
from hirescam_jax.explanations import verdict
from hirescam_jax.explanations.cam import gradcam, hirescam
from hirescam_jax.explanations.explain import explain, model_verdict
from hirescam_jax.explanations.family import class_activation_map
from hirescam_jax.explanations.methods import METHODS
from hirescam_jax.explanations.verdict import head_verdict
from hirescam_jax.models import AxialNet, Conv3DNet

SHAPE = (3, 4, 3, 2, 5)
CELLS, CHANNELS = 4 * 3 * 2, 5
RNG = np.random.default_rng(0)
WIDE = jnp.asarray(RNG.normal(size=(CELLS * CHANNELS, 6)), jnp.float32)
SLICE = jnp.asarray(RNG.normal(size=(3 * 2 * CHANNELS, 6)), jnp.float32)
POOLED = jnp.asarray(RNG.normal(size=(CHANNELS, 6)), jnp.float32)
LAST = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
ZEROS = jnp.zeros(6)
AVERAGE = jnp.full((4, 3, 2), 1 / 24)


def flat(x):
    return x.reshape(x.shape[0], -1)


def pooled(x):
    return x.mean(axis=(1, 2, 3))


def slices(x):
    return x.reshape(*x.shape[:2], -1)


def relu_mlp(x, bias=ZEROS):
    return jax.nn.relu(flat(x) @ WIDE + bias) @ LAST


def nested_zero_bias(x):
    """Its arrays are constants of a compiled function inside."""
    return jax.jit(lambda x: jax.nn.relu(flat(x) @ WIDE + ZEROS) @ LAST)(x)


BATCH_NORM = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.zeros(SHAPE))


def batch_norm_by_running_averages(x):
    return flat(nn.BatchNorm(use_running_average=True).apply(BATCH_NORM, x)) @ WIDE


def own_data(x):
    """Holds data of each of three examples."""
    return flat(x) @ WIDE * jnp.array([[1.0], [-2.0], [3.0]])


def unrolled(x):
    return jnp.stack([jnp.max(slices(x)[i] @ SLICE, axis=0) for i in range(x.shape[0])])


def example_by_example(x):
    return jax.lax.map(lambda x: x.reshape(-1) @ WIDE, x)


def averaged_by_a_matrix(x):
    return jnp.einsum("bdhwc,dhw->bc", x, AVERAGE) @ POOLED + 1


def dropout(x):
    """In training mode: its key makes it one head."""
    layer = nn.Dropout(0.5, deterministic=False)
    return layer.apply({}, flat(x), rngs={"dropout": jax.random.key(0)}) @ WIDE


HEADS = {
    "equal": {
        "pooled": lambda x: pooled(x) @ POOLED + 1,
        "summed": lambda x: (x @ POOLED).sum(axis=(1, 2, 3)),
        "one_cell": (lambda x: flat(x) @ POOLED, (2, 1, 1, CHANNELS)),
        "averaging_matrix": averaged_by_a_matrix,
        "resized": lambda x: pooled(jax.image.resize(x, (len(x), 8, 3, 2, 5), "nearest")) @ POOLED,
        "constant_computed_inside": jax.jit(lambda x: pooled(x) @ (POOLED / jnp.abs(POOLED).max())),
    },
    "exact": {
        "linear": lambda x: flat(x) @ WIDE + 1,
        "slices": lambda x: (slices(x) @ SLICE + 1).mean(axis=1),
        "two_layers": lambda x: (flat(x) @ WIDE + 1) @ LAST,
        "batch_norm_by_running_averages": batch_norm_by_running_averages,
        "example_by_example": example_by_example,
        "own_data": own_data,
        "dropout": dropout,
        "chosen_slices": lambda x: pooled(jnp.where(jnp.arange(2) < 1, x.mT, 0).mT) @ POOLED,
    },
    "complete": {
        "max": lambda x: (slices(x) @ SLICE + 1).max(axis=1),
        "max_zero_bias": lambda x: (slices(x) @ SLICE + ZEROS).max(axis=1),
        "unrolled": unrolled,
    },
    "none": {
        "relu_mlp": relu_mlp,
        "nested_zero_bias": nested_zero_bias,
        "jitted": jax.jit(relu_mlp),
        "tanh": lambda x: jnp.tanh(flat(x) @ WIDE),
        "square": lambda x: pooled(x**2) @ POOLED,
        "softmax_over_slices": lambda x: jax.nn.logsumexp(slices(x) @ SLICE, axis=1),
        "relu_without_bias": lambda x: jax.nn.relu(flat(x) @ WIDE) @ LAST,
        "dropout_then_relu": lambda x: jax.nn.relu(dropout(x)) @ LAST,
        "far_clip": lambda x: jnp.clip(flat(x) @ WIDE, -1e6, 1e6),
        "relu_then_max": lambda x: jax.nn.relu(slices(x) @ SLICE + ZEROS).max(axis=1),
        "overflow": lambda x: jnp.exp(flat(x) @ WIDE),
        "relu_of_pooled": lambda x: jax.nn.relu(pooled(x) @ POOLED) @ LAST,
        "size_of_pooled": lambda x: jnp.abs(pooled(x) @ POOLED),
    },
}
KEEP_THE_SUM = ("relu_without_bias", "dropout_then_relu")
KEEP_THE_SUM += ("relu_of_pooled", "size_of_pooled")
CASES = [(kind, name, head) for kind, heads in HEADS.items() for name, head in heads.items()]


@pytest.mark.parametrize(("kind", "name", "head"), CASES, ids=[case[1] for case in CASES])
def test_kinds(kind, name, head):
    head, shape = head if isinstance(head, tuple) else (head, SHAPE)
    found = head_verdict(head, shape)
    assert found.kind == kind
    # Without a bias, ReLU keeps the sum, without a guarantee.
    keeps = kind != "none" or name in KEEP_THE_SUM
    assert (found.residual < 1e-12) == keeps
    assert (found.gradcam_difference < 1e-6) == (kind == "equal" or name.endswith("of_pooled"))
    assert found.holds_for("hirescam") == found.guaranteed == (kind != "none")
    assert found.holds_for("gradcam") == (kind == "equal")
    assert not any(found.holds_for(m) for m in METHODS if kind != "equal" and m != "hirescam")
    assert found.text.startswith("No guarantee") == (kind == "none")


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_part_that_is_switched_off_is_found(seed, labels):
    """Whatever the weights: over many slices, a maximum seldom falls below a bias."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(20, labels)), jnp.float32)

    def scores(x):
        return slices(x) @ kernel + 0.5

    shape = (1, 64, 2, 2, 5)
    assert head_verdict(lambda x: jax.nn.relu(scores(x)).max(axis=1), shape).kind == "none"
    assert head_verdict(lambda x: jax.nn.relu(scores(x).max(axis=1)), shape).kind == "none"
    assert head_verdict(lambda x: scores(x).max(axis=1), shape).kind == "complete"


def test_a_label_of_large_weights_hides_no_other():
    def head(x):
        return jnp.concatenate([1e8 * pooled(x) @ POOLED, flat(x) @ WIDE], axis=-1)

    def selects(x):
        best = (slices(x) @ SLICE).max(axis=1)
        return jnp.concatenate([1e13 * best, jnp.tanh(flat(x) @ WIDE)], axis=-1)

    assert head_verdict(head, SHAPE).kind == "exact"
    assert head_verdict(selects, SHAPE).kind == "none"


MEASURED = {kind: next(iter(heads.values())) for kind, heads in HEADS.items()} | {
    "none": HEADS["none"]["tanh"]
}


@pytest.mark.parametrize(("kind", "head"), MEASURED.items(), ids=MEASURED)
def test_maps_are_what_the_verdict_says(kind, head):
    features = jnp.asarray(np.random.default_rng(3).normal(size=SHAPE), jnp.float32)

    @jax.jit
    def program(x):
        return hirescam(head, x), gradcam(head, x), head(x) - head(x * 0)

    maps, grad, rise = map(np.asarray, program(features))
    left = np.abs(maps.sum(axis=(2, 3, 4)) - rise).max()
    assert (left < 1e-4 * np.abs(rise).max()) == (kind != "none")
    assert (np.abs(maps - grad).max() < 1e-5 * np.abs(maps).max()) == (kind == "equal")


@pytest.mark.parametrize(
    ("model", "grid", "kind"),
    [
        (AxialNet(3), (4, 3, 2), "exact"),
        (AxialNet(3, pool="max"), (4, 3, 2), "complete"),
        (Conv3DNet(3, hidden=(6,)), (2, 3, 2), "none"),
    ],
    ids=["axialnet", "axialnet_max", "conv3d"],
)
def test_models_as_they_are_initialised(model, grid, kind):
    """With all biases zero; the same with any parameters."""
    shape = (1, *grid, 5)
    shapes = jax.eval_shape(partial(model.init, method="head"), jax.random.key(0), jnp.zeros(shape))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.float32(rng.normal(size=x.shape) * (len(x.shape) > 1)), shapes
    )
    assert head_verdict(partial(model.apply, variables, method="head"), shape).kind == kind


def test_parameters_may_be_traced():
    """As in a jitted function of the parameters: the verdict is on the structure."""
    found = {}

    @jax.jit
    def program(kernel, bias, x):
        found["exact"] = head_verdict(lambda x: flat(x) @ kernel + bias, x.shape)
        found["none"] = head_verdict(lambda x: jax.nn.relu(flat(x) @ kernel + bias), x.shape)
        return x

    program(WIDE, ZEROS, jnp.zeros(SHAPE))
    assert {kind: v.kind for kind, v in found.items()} == {"exact": "exact", "none": "none"}


def test_float64_where_it_is_enabled():
    with jax.enable_x64(True):
        kernel = WIDE.astype(jnp.float64)
        assert head_verdict(lambda x: flat(x) @ kernel, SHAPE).residual < 1e-14


@pytest.mark.parametrize("bias", [1e-3, 1e-7])
def test_small_biases_count(bias):
    """On a wide grid too: what a bias adds is small beside the sum of very many terms."""
    rng = np.random.default_rng(0)
    first, last = (jnp.asarray(rng.normal(size=s) / 50, jnp.float32) for s in ((40_000, 6), (6, 4)))
    biases = jnp.full(6, bias)
    found = head_verdict(lambda x: jax.nn.relu(flat(x) @ first + biases) @ last, (1, 100, 100, 4))
    assert found.kind == "none"
    assert found.residual > 1e-5


def in_bfloat16(head):
    return lambda x: head(x.astype(jnp.bfloat16)).astype(jnp.float32)


def test_low_precision_is_measured():
    found = head_verdict(in_bfloat16(lambda x: flat(x) @ WIDE.astype(jnp.bfloat16)), SHAPE)
    assert (found.kind, found.guaranteed) == ("none", False)
    assert found.short() == "no guarantee: the head is affine but computes in low precision"
    assert 1e-4 < found.residual < 1e-2


def test_float16_overflows_at_some_size():
    def head(x):
        return (pooled(x.astype(jnp.float16)) @ POOLED.astype(jnp.float16)).astype(jnp.float32)

    found = head_verdict(head, SHAPE)
    assert found.low_precision
    assert not found.guaranteed


def test_cam_of_a_head_in_low_precision_says_so():
    head = in_bfloat16(lambda x: pooled(x) @ POOLED.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="computes in low precision: compute it in float32"):
        class_activation_map(head, jnp.ones(SHAPE))


def test_cam_by_an_averaging_matrix():
    x = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    maps = class_activation_map(averaged_by_a_matrix, jnp.asarray(x))
    np.testing.assert_allclose(
        maps, np.einsum("bdhwc,ck->bkdhw", x, POOLED) / CELLS, rtol=1e-5, atol=1e-6
    )


PARTS_WITHOUT_GRADIENT = {
    "stopped": lambda x: flat(x) @ WIDE + jax.lax.stop_gradient(flat(x) @ WIDE),
    "sign": lambda x: flat(x) @ WIDE + jnp.sign(flat(x) @ WIDE),
    "round": lambda x: jnp.round(flat(x) @ WIDE),
    "threshold": lambda x: flat((x > 0).astype(x.dtype)) @ WIDE,
}


@pytest.mark.parametrize("head", PARTS_WITHOUT_GRADIENT.values(), ids=PARTS_WITHOUT_GRADIENT)
def test_parts_without_a_gradient_are_named(head):
    found = head_verdict(head, SHAPE)
    assert found.kind == "none"
    assert found.short() == "no guarantee: a part of the head has no gradient"


def test_words_for_each_method():
    exact, complete, none, equal = (
        verdict.HeadVerdict(kind, verdict.TEXTS[kind], 0.0, 0.0)
        for kind in ("exact", "complete", "none", "equal")
    )
    assert exact.short() == "exact"
    assert complete.short() == "exact on the winning slices"
    assert "no guarantee" in exact.short("gradcam")
    assert {none.short(m) for m in METHODS} == {"no guarantee: the head is not affine"}
    assert [m for m in METHODS if "no guarantee" not in equal.short(m)] == [
        "hirescam",
        "gradcam",
        "cam",
    ]


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"must be \(B, \*grid, C\)"):
        head_verdict(flat, (2, 3))
    with pytest.raises(ValueError, match="cannot be run on features"):
        head_verdict(lambda x: flat(x) @ WIDE, (2, 3, 3))
    with pytest.raises(ValueError, match=r"head must return logits \[B, K\]"):
        head_verdict(lambda x: x.sum(axis=-1), SHAPE)


# -- heads that mix examples ----------------------------------------------------------------------


def after_the_one_before(x):
    return flat(x + jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])) @ WIDE


def in_a_loop(x):
    return jax.lax.scan(lambda c, v: (c + v, c + v), jnp.zeros_like(flat(x)[0]), flat(x))[1] @ WIDE


ONE_WAY = {
    "cumsum": lambda x: flat(jnp.cumsum(x, axis=0)) @ WIDE,
    "from_the_end": lambda x: flat(jnp.cumsum(x[::-1], axis=0)[::-1]) @ WIDE,
    "scan": in_a_loop,
    "previous": after_the_one_before,
}


@pytest.mark.parametrize("head", ONE_WAY.values(), ids=ONE_WAY)
def test_mixing_in_one_direction_is_seen(head):
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        head_verdict(head, SHAPE)


# -- explain --------------------------------------------------------------------------------------


def small(pool: str):
    model = AxialNet(3, (1,), (4,), "small", (3,), "SAME", pool=pool)
    volumes = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 8, 8)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), volumes)
    rng = np.random.default_rng(2)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), shapes), volumes


def test_explain_tells_it_once_for_a_model_and_shape(monkeypatch):
    asked = []
    explaining._verdict_of_form.cache_clear()
    monkeypatch.setattr(
        explaining, "head_verdict", lambda *a: asked.append(a) or verdict.head_verdict(*a)
    )
    model, variables, volumes = small("max")
    found = explain(model, variables, volumes)
    assert found.verdict is not None
    assert found.verdict.kind == "complete"
    assert explain(model, variables, volumes).verdict == found.verdict
    assert len(asked) == 1
    # As an argument and as a result of a compiled function.
    again = jax.jit(lambda e: e._replace(logits=e.logits + 1))(found)
    assert again.verdict == found.verdict
    assert len(jax.tree.leaves(found)) == 3

    inside = jax.eval_shape(lambda v: explain(model, variables, v), volumes)
    assert inside.verdict == found.verdict  # only the volumes are traced
    traced = jax.eval_shape(lambda variables: explain(model, variables, volumes), variables)
    assert traced.verdict is None
    assert traced.maps.shape == found.maps.shape


class Layers(nn.Module):
    """Features that are the input; a head of two layers with ReLU, and any attribute."""

    weights: object = None

    def setup(self):
        self.layers = nn.Dense(6), nn.Dense(4)

    def features(self, x):
        return x

    def head(self, features):
        first, last = self.layers
        return last(nn.relu(first(flat(features)))) + (0 if self.weights is None else self.weights)

    def __call__(self, x):
        return self.head(self.features(x))


def test_the_verdict_on_a_model_does_not_depend_on_its_values():
    model = Layers()
    x = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    explaining._verdict_of_form.cache_clear()
    found = []
    for bias in (1e-7, 1.0):
        moved = jax.tree.map(lambda v, b=bias: v if v.ndim > 1 else v + b, variables)
        found.append(model_verdict(model, moved, SHAPE))
    assert found[0] == found[1]
    assert found[0].kind == "none"
    info = explaining._verdict_of_form.cache_info()
    assert (info.hits, info.misses) == (1, 1)
    assert info.maxsize


def test_a_model_with_an_array_among_its_attributes():
    """It cannot be hashed, so that nothing is kept for it."""
    x = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
    plain, model = Layers(), Layers(jnp.arange(4.0))
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    found, expected = explain(model, variables, x, [1, 2]), explain(plain, variables, x, [1, 2])
    np.testing.assert_allclose(found.logits, expected.logits + jnp.arange(4.0), rtol=1e-6)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-6)
    assert found.verdict.kind == "none"


class MixingNet(AxialNet):
    def head(self, features, train=False):
        return super().head(features - features.mean(axis=0, keepdims=True), train)


def test_explain_refuses_a_head_that_mixes_examples():
    _, variables, volumes = small("mean")
    model = MixingNet(3, (1,), (4,), "small", (3,), "SAME")
    for batch in (volumes, volumes[:1]):
        with pytest.raises(ValueError, match="mixes the examples of a batch"):
            explain(model, variables, batch)


def test_a_verdict_is_hashable_and_comparable():
    found = head_verdict(HEADS["exact"]["linear"], SHAPE)
    assert found == dataclasses.replace(found)
    assert len({found, dataclasses.replace(found), dataclasses.replace(found, kind="none")}) == 2
