"""The networks of the papers and of natural images: full size, ablations, what each can do."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from hirescam_jax import explain
from hirescam_jax.config import Config, Preprocess
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.evaluate import evaluate_run
from hirescam_jax.inference.files import explain_files
from hirescam_jax.inference.store import explain_store
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
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.models.images import adaptive_average_pool
from hirescam_jax.models.layers import Conv, convolution
from hirescam_jax.runs.config_files import from_json, to_json
from hirescam_jax.runs.run import Header, Run
from hirescam_jax.runs.setup import open_data, open_layout
from hirescam_jax.training.loop import train
from hirescam_jax.weights.names import slots_of
from tests.devices.test_mesh import distance, run_program
from tests.models.test_models import random_variables
from tests.rounding import assert_same_but_for_rounding

FULL = (405, 420, 420)
RESNET34 = (3, 4, 6, 3)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def torchvision(torch):
    from tests.weights.torch_models import import_torchvision

    return import_torchvision()


# -- full size ------------------------------------------------------------------------------------


def assert_same_size(model, shape, features, net):
    """Shapes of features and logits, the number of parameters, and all tensors by name; nothing is
    computed. shape: (D, H, W) or (H, W)."""
    slots = slots_of(model, shape)
    theirs = {n: tuple(t.shape) for n, t in net.state_dict().items() if t.ndim}
    assert {name: slot.torch_shape for name, slot in slots.items()} == theirs
    count = sum(math.prod(s.shape) for s in slots.values() if s.path[0] == "params")
    assert count == sum(p.numel() for p in net.parameters())

    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    variables = unflatten_dict({slot.path: float32(slot.shape) for slot in slots.values()})
    x = float32((1, *shape) if len(shape) == 3 else (1, *shape, 3))
    found = jax.eval_shape(partial(model.apply, method="features"), variables, x)
    assert found.shape == (1, *features)
    logits = jax.eval_shape(partial(model.apply, method="head"), variables, found)
    assert logits.shape == (1, model.num_labels)


@pytest.mark.parametrize(
    ("model", "features"),
    [
        (AxialNet(), (135, 6, 6, 16)),
        (AxialNet(pool="dense"), (135, 6, 6, 16)),
        (AxialNet(conv_widths=()), (135, 14, 14, 512)),
        (AxialNet(blocks=RESNET34), (135, 6, 6, 16)),
        (AxialNet(blocks=RESNET34, block="bottleneck"), (135, 6, 6, 16)),
        (BodyConv(), (5, 5, 5, 16)),
        (CTNet(), (18, 5, 5, 16)),
        (Conv3DNet(), (5, 5, 5, 64)),
    ],
    ids=["axialnet", "dense", "no-convs", "34", "50", "bodyconv", "ctnet", "conv3d"],
)
def test_paper_networks_at_full_size(torch, model, features):
    from tests.weights.torch_models import torch_model

    with torch.device("meta"):
        net = torch_model(model, features[:-1], FULL)
        wanted_features, wanted_logits = net(torch.empty(1, *FULL))
    assert wanted_features.shape == (1, *features)
    assert wanted_logits.shape == (1, 80)
    assert_same_size(model, FULL, features, net)


@pytest.mark.parametrize(
    ("name", "model", "features"),
    [
        ("resnet18", ResNetClassifier(), (7, 7, 512)),
        ("resnet34", ResNetClassifier(blocks=RESNET34), (7, 7, 512)),
        ("resnet50", ResNetClassifier(blocks=RESNET34, block="bottleneck"), (7, 7, 2048)),
        ("vgg16", VGG(), (7, 7, 512)),
        ("densenet121", DenseNet(), (7, 7, 1024)),
        ("mobilenet_v2", MobileNetV2(), (7, 7, 1280)),
    ],
)
def test_image_networks_at_full_size(torch, torchvision, name, model, features):
    with torch.device("meta"):
        net = getattr(torchvision.models, name)()
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert_same_size(model, (224, 224), features, net)


# -- explanations ---------------------------------------------------------------------------------

SMALL = {"blocks": (1,), "widths": (6,), "stem": "small"}
BODY = BodyConv(3, **SMALL, conv_widths=(4, 3), channels=2, hidden=(8,))
CT = CTNet(3, (1,), (18,), "small", conv_widths=(4, 3), channels=2, hidden=(8,))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (AxialNet(3, **SMALL, conv_widths=(), pool="dense"), (6, 12, 16)),
        (ResNetClassifier(3, **SMALL), (16, 24, 3)),
        (ResNetClassifier(3, **SMALL, classifier="flatten"), (16, 24, 3)),
        (VGG(3, ((4,), (6,)), classifier="gap"), (16, 24, 3)),
    ],
    ids=["dense", "gap", "flatten", "vgg-gap"],
)
def test_hirescam_is_complete_where_the_head_is_affine(model, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    variables = random_variables(model, x.shape)
    found = explain(model, variables, x)
    scale = np.abs(found.logits).max()
    assert scale > 1e-3
    np.testing.assert_allclose(found.residual, 0, atol=1e-5 * max(scale, 1))


def test_attention_scales():
    grid = (135, 6, 6)
    assert AxialNet(pool="dense").attention_scale(grid) == 1
    assert BodyConv().attention_scale((5, 5, 5)) == CTNet().attention_scale((18, 5, 5)) == 1
    assert ResNetClassifier().attention_scale((7, 5)) == 35
    assert ResNetClassifier(classifier="flatten").attention_scale((7, 5)) == 1
    assert VGG().attention_scale((7, 7)) == 1


# -- layers ---------------------------------------------------------------------------------------


def test_conv3d_of_unequal_kernel_and_stride_is_torchs(torch):
    """Forward and both gradients."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 9, 7, 8, 3)), rng.normal(size=(3, 2, 4, 3, 5))
    x_torch = torch.tensor(x).movedim(-1, 1).requires_grad_()
    w_torch = torch.tensor(w).permute(4, 3, 0, 1, 2).requires_grad_()
    wanted = torch.nn.functional.conv3d(x_torch, w_torch, stride=(3, 1, 2))
    weights = rng.normal(size=tuple(wanted.shape))
    (wanted * torch.tensor(weights)).sum().backward()
    cotangent = np.moveaxis(weights, 1, -1)
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    direct = partial(jax.lax.conv_general_dilated, padding="VALID", dimension_numbers=numbers)
    for convolve in (direct, convolution):
        with jax.enable_x64(True):
            run = jax.jit(lambda x, w, f=convolve: jax.vjp(lambda x, w: f(x, w, (3, 1, 2)), x, w))
            y, pull = run(jnp.asarray(x), jnp.asarray(w))
            grad_x, grad_w = pull(jnp.asarray(cotangent))
        np.testing.assert_allclose(y, wanted.detach().movedim(1, -1), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grad_x, x_torch.grad.movedim(1, -1), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            grad_w, w_torch.grad.permute(2, 3, 4, 1, 0), rtol=1e-12, atol=1e-12
        )


def test_depthwise_convolutions_and_their_gradients_are_torchs(torch):
    """With a kernel that is larger than the images, where others take the gradient by products."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 2, 2, 6)), rng.normal(size=(3, 3, 1, 6))
    x_torch = torch.tensor(x).movedim(-1, 1).requires_grad_()
    w_torch = torch.tensor(w).permute(3, 2, 0, 1).requires_grad_()
    wanted = torch.nn.functional.conv2d(x_torch, w_torch, padding=1, groups=6)
    weights = rng.normal(size=tuple(wanted.shape))
    (wanted * torch.tensor(weights)).sum().backward()
    with jax.enable_x64(True):
        layer = Conv(6, 3, groups=6, dtype=jnp.float64)
        y, pull = jax.vjp(
            lambda x, w: layer.apply({"params": {"kernel": w}}, x), jnp.asarray(x), jnp.asarray(w)
        )
        grad_x, grad_w = pull(jnp.asarray(np.moveaxis(weights, 1, -1)))
    np.testing.assert_allclose(y, wanted.detach().movedim(1, -1), rtol=1e-12)
    np.testing.assert_allclose(grad_x, x_torch.grad.movedim(1, -1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad_w, w_torch.grad.permute(2, 3, 1, 0), rtol=1e-12)


@pytest.mark.parametrize("size", [(7, 7), (14, 9), (3, 20), (1, 1)])
def test_adaptive_pooling_is_torchs(torch, size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    wanted = torch.nn.AdaptiveAvgPool2d(7)(torch.tensor(x).permute(0, 3, 1, 2).double())
    found = adaptive_average_pool(jnp.asarray(x), 7)
    np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


# -- slices ---------------------------------------------------------------------------------------


def test_slices_that_make_no_cell_change_nothing():
    """Neither BodyConv's features nor BatchNorm's statistics."""
    volume = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 12, 14)), jnp.float32)
    variables = random_variables(BODY, volume.shape)
    assert BODY.depth_unit == 18

    @jax.jit
    def run(volume):
        return BODY.apply(variables, volume, True, method="features", mutable="batch_stats")

    found, wanted = run(volume), run(volume[:, :18])
    assert found[0].shape == (2, 1, 2, 2, 3)
    # Two convolutions in a block and one before it, each with the mean and the variance of all
    # pixels of 18 images, and two convolutions in 3D. The slices left out would move a statistic by
    # about its standard error, which is a hundred times as much.
    products = 9 * 2 + 2 * (9 * 6) + 27 * 6 + 12 * 4
    statistics = 3 * (2 * 18 * 6 * 7 + 4)
    same = partial(assert_same_but_for_rounding, terms=products + statistics)
    jax.tree.map(same, found, wanted)


def test_the_first_axis_of_ctnets_features_is_not_the_slices():
    """Every cell is of all slices: changing one slice changes all cells."""
    volume = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 12, 14)), jnp.float32)
    variables = random_variables(CT, volume.shape)
    run = jax.jit(partial(CT.apply, variables, method="features"))
    before, after = run(volume), run(volume.at[:, 0].add(1.0))
    assert before.shape == (1, 2, 2, 2, 3)
    assert ((before != after).any((0, 2, 3, 4))).all()
    assert CT.depth_unit is None


CT_CONFIG = Config(
    model=CT.clone(num_labels=12),
    data=PhantomData(PhantomConfig(shape=(6, 12, 12)), train_size=2, val_size=2, test_size=2),
    preprocess=Preprocess(rotate=0.0),
    batch_size=2,
    epochs=1,
    mask_weight=0.0,
)


@pytest.mark.long
def test_ctnet_is_trained_and_evaluated(tmp_path):
    run = train(CT_CONFIG, tmp_path / "run")
    result = evaluate_run(run, open_data(run.config, "val"), open_data(run.config, "test"))
    assert result.scores.organ_iou == {}
    assert result.scores.volumes == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"mask_loss": 0.0' in lines


def test_ctnets_maps_are_not_laid_on_volumes(tmp_path):
    run = Run(tmp_path, Header(CT_CONFIG, ("a",), ("b",), (6, 12, 12), (1.0, 1.0, 1.0)), {}, 0)
    with pytest.raises(UserError, match="the maps of CTNet have no slices"):
        explain_files(run, [tmp_path], tmp_path / "maps")
    with pytest.raises(UserError, match="the maps of CTNet have no slices"):
        explain_store(run, tmp_path, "test", tmp_path / "maps")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mask_weight": 0.5}, "config.mask_weight = 0.5: the features of CTNet have no slices"),
        ({"depth_devices": 2}, "config.depth_devices = 2: the features of CTNet are of all slices"),
    ],
)
def test_what_needs_slices_is_refused_for_ctnet(tmp_path, change, line):
    config = Config(**{**vars(CT_CONFIG), **change})
    with pytest.raises(UserError, match=line):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_volumes_too_small_for_bodyconv():
    with pytest.raises(UserError, match=r"config\.model "):
        feature_grid(BODY, (16, 16, 16))
    layout = open_layout(Config(model=BODY), (36, 16, 20))
    assert (layout.grid, layout.unit) == ((2, 3, 4), 18)


@pytest.mark.parametrize("model", [BODY, CT, AxialNet(pool="dense", block="bottleneck")])
def test_configs_with_the_networks_are_kept(model):
    config = Config(model=model, weights="start.pth")
    assert from_json(to_json(config), "run.json") == config
    header = Header(config, ("a",), ("b",), (6, 8, 8), (1.0, 1.0, 1.0))
    assert Run(Path("run"), header, {}, 0).model == model


@pytest.mark.long
@pytest.mark.parametrize("name", ["bodyconv", "axialnet-dense"])
def test_every_mesh_gives_the_step_of_one_device(tmp_path, name):
    """As test_sharding has it, for networks whose cells are of several images, or whose last layer
    is of all cells: exact in float64, with slices that do not divide over the devices."""
    results = run_program(tmp_path, name, "float64", "1", "2,4")
    assert float(results["1"]["['metrics']['mask_loss']"]) > 0
    for label, error in distance(results["1"], results["2,4"]).items():
        assert error < 1e-12, (label, error)
