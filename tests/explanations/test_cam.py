"""The maps: against PyTorch's autograd, closed forms, and their theorems."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hirescam_jax.explanations.cam import completeness_residual, gradcam, hirescam, normalize_map
from hirescam_jax.explanations.explain import explain
from hirescam_jax.explanations.gradients import has_one_gradient
from hirescam_jax.explanations.inputs import occlusion
from hirescam_jax.explanations.methods import METHODS
from hirescam_jax.losses import mask_loss
from hirescam_jax.models import AxialNet, Conv3DNet
from tests.rounding import assert_same_but_for_rounding

GRIDS = {"1D": (7,), "2D": (5, 4), "3D": (4, 3, 2)}
HEADS = ("linear", "gap_fc", "max_slices", "mlp")
BATCH, CHANNELS, LABELS, HIDDEN = 3, 4, 6, 5


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


occlude = partial(occlusion, window=1)


def weights_of(name: str, grid: tuple[int, ...], rng: np.random.Generator) -> dict:
    cells = int(np.prod(grid))
    inputs = {
        "linear": cells * CHANNELS,
        "gap_fc": CHANNELS,
        "max_slices": cells // grid[0] * CHANNELS,
        "mlp": cells * CHANNELS,
    }[name]
    shapes = {"w": (inputs, LABELS), "b": (LABELS,)}
    if name == "mlp":
        shapes = {"w1": (inputs, HIDDEN), "b1": (HIDDEN,), "w": (HIDDEN, LABELS), "b": (LABELS,)}
    return {key: rng.normal(size=shape) for key, shape in shapes.items()}


def head_in_jax(name: str, weights: dict, features):
    batch, *grid, _ = features.shape
    if name == "gap_fc":
        x = features.mean(axis=tuple(range(1, features.ndim - 1)))
    elif name == "max_slices":
        return (features.reshape(batch, grid[0], -1) @ weights["w"] + weights["b"]).max(axis=1)
    else:
        x = features.reshape(batch, -1)
    if name == "mlp":
        x = jnp.tanh(x @ weights["w1"] + weights["b1"])
    return x @ weights["w"] + weights["b"]


def head_in_torch(name: str, weights: dict, features):
    if name == "gap_fc":
        x = features.flatten(1, -2).mean(1)
    elif name == "max_slices":
        return (features.flatten(2) @ weights["w"] + weights["b"]).amax(1)
    else:
        x = features.flatten(1)
    if name == "mlp":
        x = (x @ weights["w1"] + weights["b1"]).tanh()
    return x @ weights["w"] + weights["b"]


def maps_in_torch(torch, head, features, average: bool, create_graph: bool = False):
    """One backward pass a label and example, as the definition says."""
    logits = head(features)
    rows = []
    for b in range(logits.shape[0]):
        for k in range(logits.shape[1]):
            (gradient,) = torch.autograd.grad(
                logits[b, k], features, retain_graph=True, create_graph=create_graph
            )
            gradient = gradient[b]
            if average:
                gradient = gradient.flatten(0, -2).mean(0)
            rows.append((gradient * features[b]).sum(-1))
    return torch.stack(rows).reshape(*logits.shape, *features.shape[1:-1])


def random_case(name: str, grid: tuple[int, ...], seed: int = 0):
    rng = np.random.default_rng(seed)
    return weights_of(name, grid, rng), rng.normal(size=(BATCH, *grid, CHANNELS))


# -- the definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", HEADS)
def test_maps_are_those_of_torch_autograd(torch, name, grid):
    weights, features = random_case(name, grid)
    tensors = {key: torch.tensor(value) for key, value in weights.items()}
    leaf = torch.tensor(features, requires_grad=True)
    with jax.enable_x64(True):
        head = partial(head_in_jax, name, {k: jnp.asarray(v) for k, v in weights.items()})
        for function, average in ((hirescam, False), (gradcam, True)):
            expected = maps_in_torch(torch, partial(head_in_torch, name, tensors), leaf, average)
            maps = jax.jit(partial(function, head))(jnp.asarray(features))
            assert maps.dtype == jnp.float64
            np.testing.assert_allclose(maps, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_maps_are_those_of_torch_autograd_in_float32(torch, name):
    weights, features = random_case(name, GRIDS["3D"])
    tensors = {key: torch.tensor(value) for key, value in weights.items()}
    leaf = torch.tensor(features, requires_grad=True)
    head = partial(head_in_jax, name, {k: jnp.asarray(v, jnp.float32) for k, v in weights.items()})
    for function, average in ((hirescam, False), (gradcam, True)):
        expected = maps_in_torch(torch, partial(head_in_torch, name, tensors), leaf, average)
        maps = function(head, jnp.asarray(features, jnp.float32))
        assert maps.dtype == jnp.float32
        np.testing.assert_allclose(maps, expected.detach(), rtol=1e-5, atol=1e-5)


def test_linear_head_has_a_closed_form():
    weights, features = random_case("linear", (4, 3, 2))
    with jax.enable_x64(True):
        maps = hirescam(partial(head_in_jax, "linear", weights), jnp.asarray(features))
    w = weights["w"].reshape(4, 3, 2, CHANNELS, LABELS)
    np.testing.assert_allclose(
        maps, np.einsum("bdhwc,dhwck->bkdhw", features, w), rtol=1e-12, atol=1e-12
    )


def test_gradient_that_changes_sign_over_space_separates_the_methods():
    def head(features):  # left cell speaks for the label, right cell against it
        return features[:, :1, 0] - features[:, 1:, 0]

    features = jnp.asarray([[[3.0], [2.0]]])
    np.testing.assert_array_equal(hirescam(head, features), [[[3, -2]]])
    np.testing.assert_array_equal(gradcam(head, features), [[[0, 0]]])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_global_average_pooling_makes_cam_gradcam_and_hirescam_one(grid):
    weights, features = random_case("gap_fc", grid)
    with jax.enable_x64(True):
        head = partial(head_in_jax, "gap_fc", weights)
        hires, grad = (f(head, jnp.asarray(features)) for f in (hirescam, gradcam))
    cam = np.einsum("b...c,ck->bk...", features, weights["w"]) / np.prod(grid)
    np.testing.assert_allclose(hires, cam, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grad, cam, rtol=1e-12, atol=1e-14)


def test_max_head_looks_only_at_the_winning_slice():
    weights, features = random_case("max_slices", (4, 3, 2))
    maps = np.asarray(
        hirescam(partial(head_in_jax, "max_slices", weights), jnp.asarray(features, jnp.float32))
    )
    scores = features.reshape(BATCH, 4, -1) @ weights["w"]
    for b in range(BATCH):
        for k in range(LABELS):
            seen = np.flatnonzero(np.abs(maps[b, k]).sum(axis=(1, 2)))
            assert seen.tolist() == [scores[b, :, k].argmax()]


def test_plain_and_linen_heads_give_the_same_maps():
    model = AxialNet(num_labels=5)
    features = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 6, 16)), jnp.float32)
    params = {"params": {"fc": dense(6 * 6 * 16, 5)}}
    maps = hirescam(partial(model.apply, params, method="head"), features)
    kernel = np.asarray(params["params"]["fc"]["kernel"], np.float64).reshape(6, 6, 16, 5)
    expected = np.einsum("bshwc,hwck->bkshw", np.asarray(features, np.float64), kernel) / 6
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-6)


def dense(inputs: int, outputs: int) -> dict:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return {
        "kernel": jnp.asarray(kernel, jnp.float32),
        "bias": jnp.asarray(rng.normal(size=outputs), jnp.float32),
    }


# -- labels ---------------------------------------------------------------------------------------

# Of a map by the head of two layers: once through them and once back, and a sum over channels.
MLP_TERMS = 2 * (4 * 3 * 2 * CHANNELS + HIDDEN) + CHANNELS


@pytest.mark.parametrize("function", [hirescam, gradcam])
@pytest.mark.parametrize("as_type", [list, np.asarray, jnp.asarray])
def test_chosen_labels_are_rows_of_all_labels(function, as_type):
    weights, features = random_case("mlp", (4, 3, 2))
    head, features = partial(head_in_jax, "mlp", weights), jnp.asarray(features, jnp.float32)
    every = np.asarray(function(head, features))
    assert every.shape == (BATCH, LABELS, 4, 3, 2)

    same = function(head, features, as_type([5, 0, 5]))
    assert_same_but_for_rounding(same, every[:, [5, 0, 5]], terms=MLP_TERMS)

    labels_BL = [[1, 2], [3, 0], [5, 5]]
    each = function(head, features, np.asarray(labels_BL))
    expected = np.stack([every[b, row] for b, row in enumerate(labels_BL)])
    assert_same_but_for_rounding(each, expected, terms=MLP_TERMS)


def test_labels_may_be_traced():
    weights, features = random_case("linear", (5, 4))
    head, features = partial(head_in_jax, "linear", weights), jnp.asarray(features, jnp.float32)
    traced = jax.jit(partial(hirescam, head))(features, jnp.asarray([4, 1]))
    expected = hirescam(head, features)[:, [4, 1]]  # its gradient is a column of the weights
    assert_same_but_for_rounding(traced, expected, terms=CHANNELS)


@pytest.mark.parametrize("method", [*METHODS.values(), occlude], ids=[*METHODS, "occlusion"])
def test_traced_labels_out_of_range_give_nan(method):
    weights, features = random_case("gap_fc", (2, 2))
    head, features = partial(head_in_jax, "gap_fc", weights), jnp.asarray(features, jnp.float32)
    maps = np.asarray(jax.jit(partial(method, head))(features, jnp.asarray([1, -1, LABELS])))
    assert np.isfinite(maps[:, 0]).all()
    assert np.isnan(maps[:, 1:]).all()


def test_traced_labels_of_each_example():
    weights, features = random_case("mlp", (5, 4))
    head, features = partial(head_in_jax, "mlp", weights), jnp.asarray(features, jnp.float32)
    traced = jax.jit(partial(hirescam, head))
    found = np.array(traced(features, jnp.asarray([[0, 9], [-1, 2], [1, 3]])))
    assert np.isnan(found[[0, 1], [1, 0]]).all()
    found[[0, 1], [1, 0]] = 0
    expected = np.array(traced(features, jnp.asarray([[0, 0], [0, 2], [1, 3]])))
    expected[[0, 1], [1, 0]] = 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("function", [hirescam, gradcam])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labels are given"),
        (np.zeros((BATCH, 0), int), "no labels are given"),
        ([LABELS], f"label {LABELS} is out of range"),
        ([0, -1], "label -1 is out of range"),
        (jnp.asarray([99]), "label 99 is out of range"),
        (np.asarray([0.5]), "must be integers"),
        (np.zeros((BATCH + 1, 2), int), r"must be \[L\] or \[B, L\]"),
        (np.zeros((BATCH, 2, 2), int), r"must be \[L\] or \[B, L\]"),
        (np.asarray(1), r"must be \[L\] or \[B, L\]"),
    ],
    ids=[
        "none",
        "none_each",
        "high",
        "negative",
        "jax",
        "float",
        "other_batch",
        "rank_3",
        "rank_0",
    ],
)
def test_bad_labels(function, labels, message):
    weights, features = random_case("linear", (5, 4))
    with pytest.raises(ValueError, match=message):
        function(partial(head_in_jax, "linear", weights), jnp.asarray(features), labels)


def test_bad_features_and_heads():
    with pytest.raises(ValueError, match="at least one spatial axis"):
        hirescam(lambda x: x, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"head must return logits \[B, K\]"):
        hirescam(lambda x: x.sum(-1), jnp.ones((2, 3, 4, 5)))
    with pytest.raises(ValueError, match="with B = 2"):
        hirescam(lambda x: x.sum(axis=(0, 1))[None], jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="real floating-point logits, got int32"):
        hirescam(lambda x: jnp.argmax(x.sum(axis=1), axis=-1, keepdims=True), jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"must return logits \[B, K\].*, got a tuple"):
        hirescam(lambda x: (x.sum(axis=1), 1), jnp.ones((2, 3, 4)))


@pytest.mark.parametrize("method", [*METHODS.values(), occlude], ids=[*METHODS, "occlusion"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_features(method, shape):
    with pytest.raises(ValueError, match="features are empty"):
        method(lambda x: x.sum(axis=1), jnp.ones(shape))


# -- heads that do not treat all examples alike ---------------------------------------------------

OWN_RNG = np.random.default_rng(5)
OWN_KERNEL = jnp.asarray(OWN_RNG.normal(size=(12, 2)), jnp.float32)
TABLE = jnp.asarray(OWN_RNG.normal(size=(64, 1)), jnp.float32)


def drawn(count):
    return np.random.default_rng(0).normal(size=(count, 1)).astype(np.float32)


def dropped(count):
    return jax.random.bernoulli(jax.random.key(0), 0.5, (count, 1))


FACTORS = {  # of so many examples, one for each
    "start_of_a_table": lambda count: TABLE[:count],
    "part_of_a_table": lambda count: jax.lax.dynamic_slice_in_dim(TABLE, 2, count),
    "counted_by_numpy": lambda count: np.arange(count, dtype=np.float32)[:, None],
    "counted": lambda count: jnp.arange(count)[:, None],
    "linspace": lambda count: jnp.linspace(1, 2, count)[:, None],
    "summed_up": lambda count: jnp.cumsum(jnp.ones((count, 1)), axis=0),
    "drawn": drawn,
    "dropped": dropped,
    "counted_within": lambda count: jax.jit(lambda: jnp.cumsum(jnp.ones((count, 1)), axis=0))(),
    "the_same": lambda count: jnp.full((count, 1), 3.0) * 2 - TABLE[0],
}


def example_by_example(x):
    return jnp.stack([row * (i + 1) for i, row in enumerate(x.reshape(len(x), -1) @ OWN_KERNEL)])


OWN = {
    name: lambda x, factors=factors: x.reshape(len(x), -1) @ OWN_KERNEL * factors(len(x))
    for name, factors in FACTORS.items()
} | {"example_by_example": example_by_example}


@pytest.mark.parametrize("head", OWN.values(), ids=OWN)
def test_each_example_has_its_own_gradient(head):
    features = jnp.asarray(OWN_RNG.normal(size=(4, 3, 4)), jnp.float32)
    jacobian = np.asarray(jax.jacrev(head)(features))
    own = np.stack([jacobian[i, :, i] for i in range(4)])
    expected = (own * np.asarray(features)[:, None]).sum(axis=-1)
    for maps_of in (partial(hirescam, head), jax.jit(partial(hirescam, head))):
        np.testing.assert_allclose(maps_of(features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "gap_fc", "the_same"])
def test_one_gradient_serves_a_batch_where_it_can(name):
    head = OWN.get(name) or partial(head_in_jax, name, random_case(name, (5, 4))[0])
    features = jnp.ones((4, 3, 4) if name in OWN else (BATCH, 5, 4, CHANNELS))
    assert has_one_gradient(head, features, head(features))


@pytest.mark.parametrize("own", [False, True], ids=["alike", "own"])
def test_one_gradient_serves_a_batch_on_a_mesh_too(own):
    """Where sums over devices are in the head's program."""
    features = jnp.asarray(OWN_RNG.normal(size=(4, 3, 4)), jnp.float32)
    mesh = jax.make_mesh((1,), ("depth",), axis_types=(jax.sharding.AxisType.Auto,))
    found = []

    def head(kernel, x):
        logits = jax.lax.psum(x.sum(axis=1), "depth") @ kernel[:4] + kernel[0]
        return logits * jnp.arange(1, 5)[:, None] if own else logits

    def maps_of(kernel, x):
        logits = head(kernel, x)
        found.append(has_one_gradient(partial(head, kernel), x, logits))
        return hirescam(partial(head, kernel), x)

    specs = PartitionSpec(), PartitionSpec(None, "depth")
    out = PartitionSpec(None, None, "depth")
    maps = jax.jit(jax.shard_map(maps_of, mesh=mesh, in_specs=specs, out_specs=out))(
        OWN_KERNEL, features
    )
    assert found == [not own]
    expected = jnp.einsum("bdc,ck->bkd", features, OWN_KERNEL[:4])
    expected = expected * jnp.arange(1, 5)[:, None, None] if own else expected
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_takes_no_batch_of_one():
    def head(x):
        return x.reshape(4, -1) @ OWN_KERNEL

    features = jnp.asarray(OWN_RNG.normal(size=(4, 3, 4)), jnp.float32)
    expected = jnp.einsum("bdc,dck->bkd", features, OWN_KERNEL.reshape(3, 4, 2))
    np.testing.assert_allclose(hirescam(head, features), expected, rtol=1e-5, atol=1e-6)


# -- transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [hirescam, gradcam])
def test_vmap_over_a_further_axis(function):
    weights, _ = random_case("max_slices", (4, 3, 2))
    features = np.random.default_rng(1).normal(size=(5, BATCH, 4, 3, 2, CHANNELS))
    features = jnp.asarray(features, jnp.float32)
    maps_of = partial(function, partial(head_in_jax, "max_slices", weights))
    together = jax.jit(jax.vmap(maps_of))(features)
    one_by_one = np.stack([maps_of(f) for f in features])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "max_slices", "mlp"])
@pytest.mark.parametrize("max_gradient_bytes", [1, 2**30], ids=["chunked", "at_once"])
def test_mask_loss_differentiates_through_the_maps(torch, name, max_gradient_bytes):
    grid, scale = (4, 3, 2), 4.0
    weights, features = random_case(name, grid)
    allowed = np.random.default_rng(2).random((BATCH, LABELS, *grid)) < 0.3

    tensors = {k: torch.tensor(v, requires_grad=True) for k, v in weights.items()}
    leaf = torch.tensor(features, requires_grad=True)
    maps = maps_in_torch(torch, partial(head_in_torch, name, tensors), leaf, False, True)
    forbidden = torch.tensor(~allowed)
    cells = torch.nn.functional.softplus(maps * scale)
    per_volume = [cells[b][forbidden[b]].mean() for b in range(BATCH)]
    expected = sum(per_volume) / BATCH
    expected.backward()

    with jax.enable_x64(True):

        def loss(weights, features):
            head = partial(head_in_jax, name, weights)
            maps = hirescam(head, features, max_gradient_bytes=max_gradient_bytes)
            return mask_loss(maps * scale, jnp.asarray(allowed))

        arrays = {k: jnp.asarray(v) for k, v in weights.items()}
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            arrays, jnp.asarray(features)
        )
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    for key, tensor in tensors.items():
        # The logit's bias does not move the map of an affine head: no path in torch's graph.
        wanted = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        np.testing.assert_allclose(gradients[0][key], wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradients[1], leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("function", [hirescam, gradcam])
def test_half_precision_features_are_computed_in_float32(function, dtype):
    weights, features = random_case("mlp", (4, 3, 2))
    head = partial(head_in_jax, "mlp", {k: jnp.asarray(v, jnp.float32) for k, v in weights.items()})
    half = jnp.asarray(features, dtype)
    maps = function(head, half)
    assert maps.dtype == jnp.float32
    np.testing.assert_array_equal(maps, function(head, half.astype(jnp.float32)))


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [hirescam, gradcam])
@pytest.mark.parametrize("labels_at_once", [1, 2, 4, 5])
def test_chunks_of_labels_do_not_change_the_maps(function, labels_at_once):
    weights, features = random_case("mlp", (4, 3, 2))
    head, features = partial(head_in_jax, "mlp", weights), jnp.asarray(features, jnp.float32)
    limit = labels_at_once * features.size * 4
    for labels in (None, [3, 3, 1, 0, 2], np.arange(15).reshape(BATCH, 5) % LABELS):
        chunked = function(head, features, labels, max_gradient_bytes=limit)
        expected = function(head, features, labels)
        assert_same_but_for_rounding(chunked, expected, terms=MLP_TERMS)


def fc_then_mean(fc, features):
    return (features.reshape(*features.shape[:2], -1) @ fc["kernel"] + fc["bias"]).mean(axis=1)


def mean_then_fc(fc, features):
    return features.mean(axis=1).reshape(features.shape[0], -1) @ fc["kernel"] + fc["bias"]


def relu_then_fc(fc, features):
    return fc_then_mean(fc, jax.nn.relu(features))


@pytest.mark.parametrize("function", [hirescam, gradcam])
@pytest.mark.parametrize("head", [fc_then_mean, mean_then_fc, relu_then_fc])
def test_eighty_labels_on_wide_features_stay_below_one_gibibyte(head, function):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    fc = {"kernel": array(14 * 14 * 512, 80), "bias": array(80)}
    compiled = (
        jax.jit(lambda fc, features: function(partial(head, fc), features))
        .lower(fc, array(2, 135, 14, 14, 512))
        .compile()
    )
    analysis = compiled.memory_analysis()
    assert analysis.output_size_in_bytes == 2 * 80 * 135 * 14 * 14 * 4
    assert analysis.temp_size_in_bytes <= 2**30


# -- the theorem ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_completeness_on_axialnets_head_at_full_size(pool):
    model = AxialNet(pool=pool)
    features = np.maximum(np.random.default_rng(0).normal(size=(1, 135, 6, 6, 16)), 0)
    features, fc = jnp.asarray(features, jnp.float32), dense(6 * 6 * 16, 80)
    head = partial(model.apply, {"params": {"fc": fc}}, method="head")
    logits, maps = head(features), hirescam(head, features)
    total = np.asarray(maps, np.float64).sum(axis=(2, 3, 4)) + np.asarray(fc["bias"])
    assert np.abs(total - np.asarray(logits)).max() <= 1e-4
    assert np.asarray(completeness_residual(head, features, logits, maps)).max() <= 1e-4
    assert np.abs(np.asarray(logits)).max() > 0.1
    # Grad-CAM has no such property.
    grad = np.asarray(gradcam(head, features), np.float64).sum(axis=(2, 3, 4)) + fc["bias"]
    assert np.abs(grad - np.asarray(logits)).max() > 1e-2


TINY = {"blocks": (1, 1), "widths": (4, 8), "stem": "small", "conv_widths": (6,)}


@pytest.fixture(scope="module", params=["mean", "max"])
def tiny(request):
    model = AxialNet(num_labels=80, pool=request.param, **TINY)
    volumes = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 32, 28)), jnp.float32)
    return model, random_variables(model, volumes), volumes


def random_variables(model, volumes):
    """Random parameters, biases included; BatchNorm as it starts."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), volumes)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1], dtype=int) if leaf.ndim > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    def at_start(path, leaf):
        return jnp.full(leaf.shape, float(path[-1].key == "var"), jnp.float32)

    stats = jax.tree_util.tree_map_with_path(at_start, shapes.get("batch_stats", {}))
    return {"params": jax.tree.map(draw, shapes["params"]), "batch_stats": stats}


def test_explain_whole_network(tiny):
    model, variables, volumes = tiny
    result = explain(model, variables, volumes)
    features = jax.jit(partial(model.apply, method="features"))(variables, volumes)
    grid = features.shape[1:-1]
    assert (result.logits.shape, result.maps.shape) == ((2, 80), (2, 80, *grid))
    np.testing.assert_allclose(
        result.logits, jax.jit(model.apply)(variables, volumes), rtol=1e-5, atol=1e-5
    )
    assert result.residual.shape == (2, 80)
    assert result.residual.max() <= 1e-4
    bias = np.asarray(variables["params"]["fc"]["bias"], np.float64)
    total = np.asarray(result.maps, np.float64).sum(axis=(2, 3, 4)) + bias
    np.testing.assert_allclose(total, result.logits, atol=1e-4)

    some = explain(model, variables, volumes, labels=[7, 3])
    np.testing.assert_allclose(some.maps, result.maps[:, [7, 3]], rtol=1e-5, atol=1e-6)
    assert some.logits.shape == (2, 80)
    assert some.residual.shape == (2, 2)
    assert some.residual.max() <= 1e-4

    grad = explain(model, variables, volumes, labels=np.asarray([[1], [2]]), method="gradcam")
    head = partial(model.apply, variables, method="head")
    expected = gradcam(head, features, np.asarray([[1], [2]]))
    np.testing.assert_allclose(grad.maps, expected, rtol=1e-5, atol=1e-6)
    assert grad.residual.max() > 1e-3


def test_residual_of_a_head_with_relu_is_what_the_map_leaves_unexplained():
    model = Conv3DNet(num_labels=3, widths=(4,), narrow=(3,), hidden=(6,))
    volumes = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 9, 9)), jnp.float32)
    variables = random_variables(model, volumes)
    result = explain(model, variables, volumes)
    head = partial(model.apply, variables, method="head")
    features = jax.jit(partial(model.apply, method="features"))(variables, volumes)
    at_zero = head(features * 0)
    left = np.abs(np.asarray(result.maps).sum(axis=(2, 3, 4)) + at_zero - result.logits)
    np.testing.assert_allclose(result.residual, left, rtol=1e-4, atol=1e-6)
    assert result.residual.max() > 1e-2


@pytest.mark.parametrize("labels", [[80], [-1], np.asarray([[0], [80]]), jnp.asarray([80])])
def test_explain_refuses_labels_out_of_range(tiny, labels):
    with pytest.raises(ValueError, match="out of range"):
        explain(*tiny, labels=labels)


def test_explain_refuses_other_bad_arguments(tiny):
    model, variables, volumes = tiny
    with pytest.raises(ValueError, match="unknown method 'lime': choose one of hirescam, gradcam"):
        explain(model, variables, volumes, method="lime")
    with pytest.raises(ValueError, match=r"must be \[L\] or \[B, L\]"):
        explain(model, variables, volumes, labels=np.zeros((3, 1), int))
    with pytest.raises(ValueError, match="do not divide into images of 3 slices"):
        explain(model, variables, volumes[:, :11])
    with pytest.raises(ValueError, match=r"volumes are empty: got \(0, 12"):
        explain(model, variables, volumes[:0])
    with pytest.raises(ValueError, match="no labels are given"):
        explain(model, variables, volumes, labels=[])


def test_explain_with_traced_labels_out_of_range(tiny):
    found = jax.jit(partial(explain, *tiny))(labels=jnp.asarray([2, 80, -1]))
    assert np.isfinite(found.maps[:, 0]).all()
    assert np.isfinite(found.residual[:, 0]).all()
    assert np.isnan(found.maps[:, 1:]).all()
    assert np.isnan(found.residual[:, 1:]).all()


# -- normalisation --------------------------------------------------------------------------------


def test_normalize_map_by_hand():
    maps = np.random.default_rng(0).normal(size=(2, 5, 4, 3, 2)).astype(np.float32)
    maps[0, 0] = 0
    maps[0, 1] = 7
    maps[0, 2] = -np.abs(maps[0, 2])
    maps[1, 3] = np.abs(maps[1, 3]) + 1
    result = np.asarray(jax.jit(normalize_map)(maps))
    for b in range(2):
        for k in range(5):
            expected = np.maximum(maps[b, k], 0)
            expected = expected - expected.min()
            if expected.max() > 0:
                expected = expected / expected.max()
            np.testing.assert_allclose(result[b, k], expected, rtol=1e-6, atol=1e-7)
    assert not result[0, :3].any()
    assert result.max() == 1
    assert result[1, 3].min() == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_normalize_map_hides_no_value_that_is_not_finite(broken):
    maps = jnp.asarray([[[1.0, broken, 2.0], [1.0, 3.0, 2.0]]])
    np.testing.assert_array_equal(normalize_map(maps), [[[np.nan] * 3, [0, 1, 0.5]]])


def test_normalize_map_of_the_last_axes_only():
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 4)), jnp.float32)
    flat = np.reshape(normalize_map(maps.reshape(6, 1, 4, 4)), maps.shape)
    # Each value is subtracted from once, and divided once.
    same = partial(assert_same_but_for_rounding, terms=2)
    same(normalize_map(maps, spatial_axes=2), flat)
    same(normalize_map(maps[0, 0], spatial_axes=2), flat[0, 0])


def test_normalize_map_has_a_finite_gradient_at_zero_maps():
    gradient = jax.grad(lambda maps: normalize_map(maps).sum())(jnp.zeros((1, 1, 3, 3)))
    assert np.isfinite(gradient).all()


def per_example_maps(head, features):
    """HiResCAM from the whole Jacobian, example by example of one batch."""
    jacobian = jax.jacrev(head)(features)  # [B, K, B, *grid, C]
    own = jnp.stack([jacobian[b, :, b] for b in range(features.shape[0])])
    return (own * features[:, None]).sum(-1)


def affine_with_dropout(features):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4 * 3 * 2, 5)), jnp.float32)
    flat = features.reshape(features.shape[0], -1)
    return (flat * jax.random.bernoulli(jax.random.key(0), 0.5, flat.shape)) @ weights


def affine_with_data_of_each_example(features):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4 * 3 * 2, 5)), jnp.float32)
    scale = jnp.asarray([[1.0], [-2.0], [3.0]])
    return features.reshape(features.shape[0], -1) @ weights * scale


def affine_by_number(features):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4 * 3 * 2, 5)), jnp.float32)
    return features.reshape(features.shape[0], -1) @ weights * jnp.arange(len(features))[:, None]


@pytest.mark.parametrize(
    "head", [affine_with_dropout, affine_with_data_of_each_example, affine_by_number]
)
@pytest.mark.parametrize("jit", [False, True])
def test_affine_heads_that_treat_examples_differently(head, jit):
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.normal(size=(3, 4, 3, 2)), jnp.float32)
    run = jax.jit(partial(hirescam, head)) if jit else partial(hirescam, head)
    np.testing.assert_allclose(run(features), per_example_maps(head, features), atol=1e-5)
