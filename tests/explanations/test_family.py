"""The map family: against pytorch-grad-cam and captum, closed forms, and its one shared form."""

import sys
import warnings
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.explanations import family as cam_family
from hirescam_jax.explanations.cam import gradcam, hirescam
from hirescam_jax.explanations.explain import explain
from hirescam_jax.explanations.family import (
    ablationcam,
    class_activation_map,
    eigencam,
    gradcam_plusplus,
    guided_attention,
    layercam,
    scorecam,
    xgradcam,
)
from hirescam_jax.explanations.methods import METHODS
from hirescam_jax.models import AxialNet
from tests.rounding import assert_same_but_for_rounding

GRIDS = {"1D": (7,), "2D": (4, 3), "3D": (3, 2, 4)}
BATCH, CHANNELS, LABELS, HIDDEN = 2, 5, 4, 6
# Of `METHODS` those that are defined for every head.
FAMILY = {name: method for name, method in METHODS.items() if name != "cam"}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def grad_cam(torch):
    """pytorch-grad-cam, without what it imports for pictures alone."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name in ("cv2", "ttach", "torchvision"):
            patch.setitem(sys.modules, name, MagicMock())
        for name in ("torchvision.transforms", "torchvision.transforms.functional"):
            patch.setitem(sys.modules, name, MagicMock())
        warnings.simplefilter("ignore")
        return pytest.importorskip("pytorch_grad_cam")


def case(grid: tuple[int, ...], head: str = "mlp"):
    """float64 weights, and features as after a ReLU, some of them zero."""
    rng = np.random.default_rng(0)
    inputs = int(np.prod(grid)) * CHANNELS
    if head == "linear":  # no gradient is small
        weights = {"w": rng.choice([-1, 1], (inputs, LABELS)) * rng.uniform(1, 2, (inputs, LABELS))}
    else:
        weights = {"w1": rng.normal(size=(inputs, HIDDEN)) / 2, "b1": rng.normal(size=HIDDEN)}
        weights["w"] = 3 * rng.normal(size=(HIDDEN, LABELS))
    weights["b"] = rng.normal(size=LABELS)
    return weights, np.maximum(rng.normal(size=(BATCH, *grid, CHANNELS)) + 0.4, 0)


def head_of(weights, features):
    """For JAX's arrays and PyTorch's."""
    x = features.reshape(features.shape[0], -1)
    if "w1" in weights:
        x = x @ weights["w1"] + weights["b1"]
        x = jnp.tanh(x) if isinstance(x, jax.Array) else x.tanh()
    return x @ weights["w"] + weights["b"]


def gap_fc(weights, features):
    return features.mean(axis=tuple(range(1, features.ndim - 1))) @ weights["w"] + weights["b"]


def gap_case(grid: tuple[int, ...]):
    _, features = case(grid)
    rng = np.random.default_rng(1)
    return {"w": rng.normal(size=(CHANNELS, LABELS)), "b": rng.normal(size=LABELS)}, features


def gradients(torch, weights, features) -> np.ndarray:
    """[K, B, *grid, C], by PyTorch."""
    tensors = {key: torch.tensor(value) for key, value in weights.items()}
    leaf = torch.tensor(features, requires_grad=True)
    logits = head_of(tensors, leaf)
    rows = [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True) for k in range(LABELS)]
    return np.stack([row[0].numpy() for row in rows])


def all_maps(weights, features, methods=FAMILY, **options) -> dict[str, np.ndarray]:
    """In float64, in one program."""
    with jax.enable_x64(True):
        head = partial(head_of, {key: jnp.asarray(value) for key, value in weights.items()})
        program = jax.jit(lambda x: {n: f(head, x, **options) for n, f in methods.items()})
        return jax.tree.map(np.asarray, program(jnp.asarray(features)))


# -- other implementations ------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["2D", "3D"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_maps_are_those_of_pytorch_grad_cam(torch, grad_cam, head, grid):
    weights, features = case(GRIDS[grid], head)
    maps, grads = all_maps(weights, features), gradients(torch, weights, features)
    classes = {
        "hirescam": grad_cam.HiResCAM,
        "gradcam": grad_cam.GradCAM,
        "xgradcam": grad_cam.XGradCAM,
        "layercam": grad_cam.LayerCAM,
        "eigencam": grad_cam.EigenCAM,
    }
    if head == "linear":  # with small gradients the 1e-6 that it adds to a denominator counts
        classes["gradcam_plusplus"] = grad_cam.GradCAMPlusPlus
    for name, kind in classes.items():
        theirs = kind.__new__(kind)
        theirs.activations_and_grads = SimpleNamespace(release=lambda: None)
        for k in range(LABELS):
            activations, gradient = (np.moveaxis(x, -1, 1) for x in (features, grads[k]))
            expected = theirs.get_cam_image(None, None, None, activations, gradient, False)
            found = maps[name][:, k]
            if name == "eigencam":  # in float32, of any sign
                sign = np.sign((expected * found).sum(axis=tuple(range(1, found.ndim))))
                expected = expected * sign.reshape(-1, *(1,) * (found.ndim - 1))
            tolerance = 1e-12 if name in ("hirescam", "gradcam", "layercam") else 2e-6
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=tolerance * scale, err_msg=name
            )


class Net:
    """Features that are the input, and a head, as a PyTorch module."""

    def __new__(cls, torch, weights):
        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.features = torch.nn.Identity()
                tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in weights.items()}
                self.weights = torch.nn.ParameterDict(tensors)

            def forward(self, x):  # [B, C, H, W]
                return head_of(self.weights, self.features(x).movedim(1, -1))

        return Module()


@pytest.mark.parametrize("name", ["ablationcam", "scorecam"])
def test_gradient_free_maps_are_those_of_pytorch_grad_cam(torch, grad_cam, name, monkeypatch):
    weights, features = case(GRIDS["2D"])
    # A head that scores the input itself, so that both masked inputs and features are at hand.
    net = Net(torch, weights)
    kind = {"ablationcam": grad_cam.AblationCAM, "scorecam": grad_cam.ScoreCAM}[name]
    tensor = torch.tensor(np.moveaxis(features, -1, 1))
    logits = net(tensor).detach().numpy()
    with kind(net, [net.features]) as theirs:
        theirs.batch_size = 3
        weights_of = partial(theirs.get_cam_weights, tensor, net.features)
        for k in range(LABELS):
            targets = [lambda output, k=k: output[..., k]] * BATCH
            channel = weights_of(targets, tensor.numpy(), None)
            expected = np.einsum("bhwc,bc->bhw", features, channel)
            if name == "ablationcam":  # it divides the drop by the logit
                expected *= logits[:, k, None, None]
            with jax.enable_x64(True):
                head = partial(head_of, {key: jnp.asarray(v) for key, v in weights.items()})
                inputs = jnp.asarray(features)
                options = {"model": head, "inputs": inputs} if name == "scorecam" else {}
                found = getattr(cam_family, name)(head, inputs, [k], **options)[:, 0]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def on_an_input(weights, inputs):
    """The head of averages over 2 x 2 (x 2) voxels: features on a grid of half the size."""
    grid = tuple(n // 2 for n in inputs.shape[1:-1])
    split = sum(((n, 2) for n in grid), ())
    features = inputs.reshape(inputs.shape[0], *split, CHANNELS)
    return head_of(weights, features.mean(axis=tuple(range(2, 2 * len(grid) + 1, 2))))


@pytest.mark.parametrize("grid", ["2D", "3D"])
def test_score_cam_enlarges_the_channels(torch, grad_cam, grid, monkeypatch):
    """pytorch-grad-cam's weights in 2D, with half-pixel centres in its place of aligned corners;
    in 3D, which it does not know, PyTorch's enlargement and a pass for each channel."""
    weights, features = case(GRIDS[grid])
    enlarged = tuple(2 * n for n in GRIDS[grid])
    inputs = np.random.default_rng(2).normal(size=(BATCH, *enlarged, CHANNELS))
    tensors = {key: torch.tensor(value) for key, value in weights.items()}
    channels_first, tensor = (torch.tensor(np.moveaxis(x, -1, 1)) for x in (features, inputs))

    def net(x):
        return on_an_input(tensors, x.movedim(1, -1))

    def channel_weights(k):
        mode = "trilinear" if grid == "3D" else "bilinear"
        if grid == "2D":
            half_pixel = partial(torch.nn.Upsample, mode=mode, align_corners=False)
            monkeypatch.setattr(torch.nn, "UpsamplingBilinear2d", half_pixel)
            theirs = grad_cam.ScoreCAM.__new__(grad_cam.ScoreCAM)
            theirs.model, theirs.device = net, "cpu"
            theirs.activations_and_grads = SimpleNamespace(release=lambda: None)
            targets = [lambda output: output[k]] * BATCH
            return theirs.get_cam_weights(tensor, None, targets, channels_first.numpy(), None)
        masks = torch.nn.functional.interpolate(channels_first, enlarged, mode=mode)
        low, high = (
            f(masks.flatten(2), dim=2)[..., None, None, None] for f in (torch.amin, torch.amax)
        )
        masks = (masks - low) / (high - low)
        scores = [net(tensor * masks[:, c : c + 1])[:, k] for c in range(CHANNELS)]
        return torch.softmax(torch.stack(scores, dim=1), dim=1).numpy()

    with jax.enable_x64(True):
        head, model = (
            partial(f, {key: jnp.asarray(v) for key, v in weights.items()})
            for f in (head_of, on_an_input)
        )
        x, options = jnp.asarray(features), {"model": model, "inputs": jnp.asarray(inputs)}
        found = jax.jit(lambda x: scorecam(head, x, **options))(x)
    for k in range(LABELS):
        expected = np.einsum("b...c,bc->b...", features, channel_weights(k))
        np.testing.assert_allclose(found[:, k], expected, rtol=0, atol=2e-6)


def test_ablation_cam_in_3d_has_captums_drops(torch):
    """pytorch-grad-cam's is for images only."""
    captum = pytest.importorskip("captum.attr")
    weights, features = case(GRIDS["3D"])
    net = Net(torch, weights)
    x = torch.tensor(np.moveaxis(features, -1, 1))
    channels = torch.arange(CHANNELS).reshape(1, -1, 1, 1, 1).expand(x.shape)
    maps = all_maps(weights, features, {"ablationcam": ablationcam})["ablationcam"]
    for k in range(LABELS):
        drops = captum.FeatureAblation(net).attribute(x, target=k, feature_mask=channels)
        expected = (x * drops[:, :, :1, :1, :1]).sum(dim=1).detach()
        np.testing.assert_allclose(maps[:, k], expected, rtol=1e-5, atol=1e-6)


def test_gradcam_is_captums(torch):
    captum = pytest.importorskip("captum.attr")
    weights, features = case(GRIDS["3D"])
    maps, net = all_maps(weights, features, {"gradcam": gradcam})["gradcam"], Net(torch, weights)
    method = captum.LayerGradCam(net, net.features)
    for k in range(LABELS):
        tensor = torch.tensor(np.moveaxis(features, -1, 1), requires_grad=True)
        expected = method.attribute(tensor, target=k)[:, 0].detach()
        np.testing.assert_allclose(maps[:, k], expected, rtol=1e-10, atol=1e-12)


# -- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_global_pooling_and_one_layer_make_four_methods_one(grid):
    weights, features = gap_case(grid)
    cam = np.einsum("b...c,ck->bk...", features, weights["w"]) / np.prod(grid)
    with jax.enable_x64(True):
        x, four = jnp.asarray(features), (class_activation_map, hirescam, gradcam, xgradcam)
        every = jax.jit(lambda w, x: [f(partial(gap_fc, w), x) for f in four])(weights, x)
        for maps in every:
            np.testing.assert_allclose(maps, cam, rtol=1e-12, atol=1e-14)
        # A channel's share of the logit, times the channel.
        share = weights["w"] * features.mean(axis=tuple(range(1, x.ndim - 1)))[..., None]
        expected = np.einsum("b...c,bck->bk...", features, share)
        maps = ablationcam(partial(gap_fc, weights), x)
        np.testing.assert_allclose(maps, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_papers_formulas_in_numpy(torch, grid):
    weights, features = case(grid)
    maps, g = all_maps(weights, features), gradients(torch, weights, features)
    axes, A = tuple(range(2, features.ndim)), features[None]
    total = A.sum(axis=tuple(a for a in axes), keepdims=True)
    with np.errstate(invalid="ignore"):
        alpha = g**2 / (2 * g**2 + total * g**3)
    w = (alpha * np.maximum(g, 0)).sum(axis=axes, keepdims=True)
    expected = {
        "gradcam_plusplus": w * A,
        "xgradcam": (g * A).sum(axis=axes, keepdims=True) / total * A,
        "layercam": np.maximum(g, 0) * A,
    }
    for name, product in expected.items():
        wanted = np.moveaxis(product.sum(axis=-1), 0, 1)
        np.testing.assert_allclose(maps[name], wanted, rtol=1e-9, atol=1e-10, err_msg=name)
    # XGrad-CAM keeps HiResCAM's sum, for every head.
    sums = (maps[name].sum(axis=axes) for name in ("xgradcam", "hirescam"))
    np.testing.assert_allclose(*sums, rtol=1e-9)

    for b in range(BATCH):
        centred = features[b].reshape(-1, CHANNELS) - features[b].reshape(-1, CHANNELS).mean(axis=0)
        projected = centred @ np.linalg.svd(centred)[2][0]
        projected *= np.sign(projected @ features[b].reshape(-1, CHANNELS).mean(axis=1))
        for k in range(LABELS):
            np.testing.assert_allclose(maps["eigencam"][b, k].ravel(), projected, atol=1e-9)


def test_score_cam_of_traced_labels_out_of_range_is_nan():
    head, features = float32_case(GRIDS["1D"])
    options = {"model": head, "inputs": features}
    program = jax.jit(lambda labels: scorecam(head, features, labels, **options))
    maps = program(jnp.asarray([-1, 2, LABELS]))
    assert np.isnan(maps[:, [0, 2]]).all()
    # Of three labels and of one are two programs. Each weight is the exponential of a score, so
    # that the score's absolute error is the weight's relative one.
    weights, _ = case(GRIDS["1D"])
    inputs = features.reshape(BATCH, -1)
    hidden_error = (np.abs(inputs) @ np.abs(weights["w1"]) + np.abs(weights["b1"])).max()
    score_error = (np.abs(weights["w"][:, 2]).sum() + np.abs(weights["b"][2])) * hidden_error
    assert_same_but_for_rounding(
        maps[:, 1:2],
        program(jnp.asarray([2])),
        terms=inputs.shape[1] + HIDDEN + 2 * CHANNELS,
        scale=score_error * features.max(),
    )


def test_score_cam_by_hand():
    """Two channels that light up one half of the input each; the model sums its left half."""
    features = np.zeros((1, 2, 1, 2), np.float32)
    features[0, 0, 0, 0] = features[0, 1, 0, 1] = 2

    def model(volumes):  # [B, 4, 1]
        return volumes[:, :2].sum(axis=(1, 2))[:, None]

    # Half-pixel centres: cells at 0.5 and 2.5 of voxels 0..3; in between a line, outside constant.
    mask = np.array([1, 0.75, 0.25, 0])
    scores = np.array([mask[:2].sum(), mask[::-1][:2].sum()])
    weights = np.exp(scores) / np.exp(scores).sum()
    maps = scorecam(
        lambda x: x.sum(axis=(1, 2))[:, :1],
        jnp.asarray(features),
        model=model,
        inputs=jnp.ones((1, 4, 1)),
    )
    np.testing.assert_allclose(maps[0, 0, :, 0], 2 * weights, rtol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_guided_attention_is_a_slices_own_score(pool):
    model = AxialNet(num_labels=3, pool=pool)
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 4, 3, 2, 5)), jnp.float32)
    kernel = rng.normal(size=(3 * 2 * 5, 3)).astype(np.float32)
    fc = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(3)}
    head = partial(model.apply, {"params": {"fc": fc}}, method="head")
    maps = np.asarray(guided_attention(head, features, model=model))
    own = np.einsum("bshwc,hwck->bkshw", features, kernel.reshape(3, 2, 5, 3))
    if pool == "max":  # only the winning slice has attention
        scores = own.sum(axis=(3, 4), keepdims=True)
        own = np.where(scores == scores.max(axis=2, keepdims=True), own, 0)
    np.testing.assert_allclose(maps, own, rtol=1e-4, atol=1e-5)


# -- the shared form ------------------------------------------------------------------------------


def float32_case(grid=GRIDS["3D"]):
    weights, features = case(grid)
    head = partial(head_of, {key: jnp.asarray(v, jnp.float32) for key, v in weights.items()})
    return head, jnp.asarray(features, jnp.float32)


def test_labels_dtypes_chunks_and_vmap():
    head, features = float32_case()
    labels_BL = np.array([[1, 3, 1], [2, 0, 2]])

    def of(labels, limit=2**30):
        def program(x):
            limits = {n: {} if n == "eigencam" else {"max_gradient_bytes": limit} for n in FAMILY}
            return {n: f(head, x, labels, **limits[n]) for n, f in FAMILY.items()}

        return program

    every, each = jax.jit(of(None)), jax.jit(of(labels_BL))(features)
    chunked = jax.jit(of([3, 1, 0], 2 * features.size * 4))(features)
    mapped = jax.jit(jax.vmap(of(None)))(jnp.stack([features, features[::-1]]))
    half = features.astype(jnp.bfloat16)
    of_half, of_same = every(half), every(half.astype(jnp.float32))
    for name, maps in jax.tree.map(np.asarray, every(features)).items():
        close = partial(
            np.testing.assert_allclose, rtol=0, atol=2e-5 * np.abs(maps).max(), err_msg=name
        )
        assert maps.shape == (BATCH, LABELS, *GRIDS["3D"])
        assert maps.dtype == of_half[name].dtype == np.float32
        close(each[name], np.stack([maps[b, row] for b, row in enumerate(labels_BL)]))
        close(chunked[name], maps[:, [3, 1, 0]])
        close(mapped[name][0], maps)
        close(mapped[name][1], maps[::-1])
        close(of_half[name], of_same[name])


@pytest.mark.parametrize("name", FAMILY)
def test_bad_input(name):
    head, features = float32_case()
    method = FAMILY[name]
    with pytest.raises(ValueError, match="at least one spatial axis"):
        method(head, features.reshape(BATCH, -1))
    with pytest.raises(ValueError, match=f"label {LABELS} is out of range"):
        method(head, features, [LABELS])
    with pytest.raises(ValueError, match=r"head must return logits \[B, K\]"):
        method(lambda x: x.sum(axis=-1), features)


def test_cam_and_score_cam_refuse_what_they_are_not_defined_for():
    head, features = float32_case()
    with pytest.raises(ValueError, match="CAM needs a head of global pooling"):
        class_activation_map(head, features)
    with pytest.raises(ValueError, match="with 3 spatial axes, got"):
        scorecam(head, features, model=head, inputs=features[..., 0, 0])
    with pytest.raises(ValueError, match=f"model has 1 labels and head {LABELS}"):
        scorecam(head, features, model=lambda x: head(x)[:, :1], inputs=features)
    model = AxialNet(2, (1,), (4,), "small", (3,), "SAME")
    volumes = jnp.zeros((1, 6, 8, 8))
    shapes = jax.eval_shape(model.init, jax.random.key(0), volumes)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    with pytest.raises(ValueError, match="CAM needs a head of global pooling"):
        explain(model, variables, volumes, method="cam")


def test_features_without_variance_have_an_empty_eigen_cam():
    head, features = float32_case()
    zeros = jnp.zeros_like(features)

    @jax.jit
    def program():
        return [eigencam(head, zeros + 1), *(m(head, zeros) for m in three)]

    three = (xgradcam, gradcam_plusplus, layercam)
    for maps in program():
        np.testing.assert_array_equal(maps, 0)
