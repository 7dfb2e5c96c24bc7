"""The networks: layer by layer the same as in PyTorch, and the fast convolutions."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.models import AxialNet, Conv3DNet
from hirescam_jax.models.axialnet import stack_slices
from hirescam_jax.models.cpu import (
    convolution_by_planes,
    convolution_by_product,
    max_pool_by_slices,
)
from hirescam_jax.models.layers import (
    Conv,
    convolution,
    max_pool,
    max_pool_by_window,
    normalize_batch,
)
from tests.rounding import assert_same_but_for_rounding

FULL = (405, 420, 420)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


# -- the same networks in PyTorch -----------------------------------------------------------------


def torch_resnet(torch, blocks, widths, stem, channels):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.down = None
            if stride != 1 or inputs != width:
                self.down = nn.Sequential(
                    nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + (x if self.down is None else self.down(x))).relu()

    kernel = 7 if stem == "imagenet" else 3
    layers = {
        "conv1": nn.Conv2d(channels, widths[0], kernel, 2, kernel // 2, bias=False),
        "bn1": nn.BatchNorm2d(widths[0]),
        "relu": nn.ReLU(),
    }
    if stem == "imagenet":
        layers["pool"] = nn.MaxPool2d(3, 2, 1)
    inputs = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for i in range(count):
            layers[f"layer{stage + 1}_{i}"] = Block(inputs, width, 2 if stage and i == 0 else 1)
            inputs = width
    return nn.ModuleDict(layers)


def torch_axialnet(torch, model: AxialNet, fc_inputs: int):
    nn = torch.nn
    padding = "same" if model.conv_padding == "SAME" else 0
    widths = (model.widths[-1], *model.conv_widths)
    pairs = itertools.pairwise(widths)
    net = nn.ModuleDict(
        {
            "resnet": torch_resnet(torch, model.blocks, model.widths, model.stem, model.channels),
            "convs": nn.ModuleList([nn.Conv2d(a, b, 3, padding=padding) for a, b in pairs]),
            "fc": nn.Linear(fc_inputs, model.num_labels),
        }
    )

    def forward(volume):  # [B, D, H, W] -> features [B, S, C, h, w], logits [B, K]
        batch, depth = volume.shape[:2]
        x = volume.reshape(batch * depth // model.channels, model.channels, *volume.shape[2:])
        for layer in net["resnet"].values():
            x = layer(x)
        for layer in net["convs"]:
            x = layer(x).relu()
        features = x.reshape(batch, -1, *x.shape[1:])
        scores = net["fc"](features.movedim(2, -1).flatten(2))
        return features, scores.mean(1) if model.pool == "mean" else scores.amax(1)

    return net, forward


def copy_weights(torch, variables, net):
    """Fills a PyTorch ResNet or list of convolutions from Linen's variables, in place."""

    def put(target, array):
        assert target.shape == array.shape
        target.data.copy_(torch.tensor(array))

    def convolution(target, params):
        kernel = np.asarray(params["kernel"], np.float64)
        put(target.weight, np.moveaxis(kernel, (-1, -2), (0, 1)))
        if "bias" in params:
            put(target.bias, np.asarray(params["bias"], np.float64))

    def norm(target, params, stats):
        put(target.weight, np.asarray(params["scale"], np.float64))
        put(target.bias, np.asarray(params["bias"], np.float64))
        put(target.running_mean, np.asarray(stats["mean"], np.float64))
        put(target.running_var, np.asarray(stats["var"], np.float64))

    params, stats = variables["params"], variables.get("batch_stats", {})
    if "resnet" in params:
        p, s = params["resnet"], stats["resnet"]
        convolution(net["resnet"]["conv1"], p["conv1"])
        norm(net["resnet"]["bn1"], p["bn1"], s["bn1"])
        for name in (n for n in p if n.startswith("layer")):
            block = net["resnet"][name]
            convolution(block.conv1, p[name]["conv1"])
            convolution(block.conv2, p[name]["conv2"])
            norm(block.bn1, p[name]["bn1"], s[name]["bn1"])
            norm(block.bn2, p[name]["bn2"], s[name]["bn2"])
            assert (block.down is not None) == ("downsample_conv" in p[name])
            if block.down is not None:
                convolution(block.down[0], p[name]["downsample_conv"])
                norm(block.down[1], p[name]["downsample_bn"], s[name]["downsample_bn"])
    for kind in ("convs", "narrows"):
        for name in (n for n in params if n.startswith(f"{kind}_")):
            convolution(net[kind][int(name.split("_")[1])], params[name])
    for name in (n for n in params if n.startswith(("fc", "hiddens_"))):
        layer = net["fc"] if name == "fc" else net["hiddens"][int(name.split("_")[1])]
        put(layer.weight, np.asarray(params[name]["kernel"], np.float64).T)
        put(layer.bias, np.asarray(params[name]["bias"], np.float64))


def random_variables(model, shape):
    """Random parameters and running statistics of a tame size, with every bias and scale moved."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))

    def draw(path, leaf):
        name = path[-1].key
        x = rng.normal(size=leaf.shape)
        if name == "kernel":
            x *= math.sqrt(2 / math.prod(leaf.shape[:-1]))
        elif name in ("scale", "var"):
            x = np.exp(0.2 * x)
        else:
            x *= 0.2
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


AXIAL = {
    "imagenet": (
        AxialNet(
            num_labels=5,
            blocks=(2, 1, 1, 1),
            widths=(4, 6, 8, 10),
            conv_widths=(6, 4),
            pool="mean",
        ),
        (2, 6, 160, 129),
    ),
    "small": (
        AxialNet(
            num_labels=3,
            blocks=(1, 2),
            widths=(4, 6),
            stem="small",
            conv_widths=(5,),
            conv_padding="SAME",
            channels=2,
            pool="max",
        ),
        (3, 6, 17, 16),
    ),
    "no_convs": (
        AxialNet(num_labels=3, blocks=(1,), widths=(4,), stem="small", conv_widths=(), channels=1),
        (1, 3, 12, 12),
    ),
}


@pytest.mark.parametrize("name", AXIAL)
def test_axialnet_is_the_same_network_in_torch(torch, name):
    model, shape = AXIAL[name]
    variables = random_variables(model, shape)
    volume = np.random.default_rng(1).normal(size=shape)
    run = jax.jit(
        lambda v, x: (model.apply(v, x, method="features"), model.apply(v, x)), donate_argnums=()
    )
    features, logits = run(variables, jnp.asarray(volume, jnp.float32))

    net, forward = torch_axialnet(torch, model, math.prod(features.shape[2:]))
    net.double().eval()
    copy_weights(torch, variables, net)
    with torch.no_grad():
        wanted_features, wanted_logits = forward(torch.tensor(volume))
    assert features.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(features, wanted_features.movedim(2, -1), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=2e-5)
    assert np.abs(logits).max() > 0.05


def test_training_mode_and_running_statistics_are_torchs(torch):
    """Batch statistics, the gradient, and the running averages of every BatchNorm."""
    model, shape = AXIAL["small"]
    variables = random_variables(model, shape)
    volume = np.random.default_rng(1).normal(size=shape)

    def loss(params, volume):
        features, updates = model.apply(
            {**variables, "params": params}, volume, True, method="features", mutable="batch_stats"
        )
        logits = model.apply({"params": params}, features, True, method="head")
        return (logits**2).sum(), (features, logits, updates["batch_stats"])

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (features, logits, stats)), gradient = run(
        variables["params"], jnp.asarray(volume, jnp.float32)
    )

    net, forward = torch_axialnet(torch, model, math.prod(features.shape[2:]))
    net.double().train()
    copy_weights(torch, variables, net)
    wanted_features, wanted_logits = forward(torch.tensor(volume))
    (wanted_logits**2).sum().backward()
    with torch.no_grad():
        np.testing.assert_allclose(features, wanted_features.movedim(2, -1), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=2e-5)
    conv1 = gradient["resnet"]["conv1"]["kernel"]
    wanted = net["resnet"]["conv1"].weight.grad.permute(2, 3, 1, 0)
    np.testing.assert_allclose(conv1, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))

    resnet, after = net["resnet"], stats["resnet"]
    for layer, running in [
        (resnet["bn1"], after["bn1"]),
        (resnet["layer1_0"].bn2, after["layer1_0"]["bn2"]),
        (resnet["layer2_0"].down[1], after["layer2_0"]["downsample_bn"]),
    ]:
        np.testing.assert_allclose(running["mean"], layer.running_mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(running["var"], layer.running_var, rtol=1e-4)


@pytest.mark.parametrize("size", [(4, 5), (7, 10)])
@pytest.mark.parametrize(
    ("kernel", "stride"), [(3, 1), (3, 2), (1, 2), pytest.param(7, 2, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("padding", [0, 1, "half"])
def test_gradients_by_one_product_are_xlas(size, kernel, stride, padding):
    """By the input and by the kernel, in float64."""
    pad = kernel // 2 if padding == "half" else padding
    if min(size) + 2 * pad < kernel:
        pytest.skip("the kernel does not fit")
    rng = np.random.default_rng(0)
    strides, pads = (stride, stride), ((pad, pad), (pad, pad))

    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=numbers)

    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, *size, 3)))
        w = jnp.asarray(rng.normal(size=(kernel, kernel, 3, 4)))
        y, gradients = jax.vjp(convolve, x, w)
        grad = jnp.asarray(rng.normal(size=y.shape))
        wanted_x, wanted_w = gradients(grad)
        product = partial(convolution_by_product, strides=strides, padding=pads)
        found, gradients = jax.vjp(product, x, w)
        found_x, found_w = gradients(grad)
        np.testing.assert_allclose(found, y, rtol=1e-12, atol=1e-12)
        assert found_w.dtype == found_x.dtype == jnp.float64
    np.testing.assert_allclose(found_x, wanted_x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found_w, wanted_w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("images", [1, 3, 40], ids=["both", "input", "plain"])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        ((4, 5), 1, None),
        ((4, 5), 2, None),
        ((4, 5), 1, "VALID"),
        ((2, 3), 1, None),  # smaller than the kernel's window
        ((2, 2), 2, None),
        ((1, 3), 1, "SAME"),
    ],
)
def test_the_convolution_layers_gradients_are_xlas(images, size, stride, padding):
    """Whichever of their ways the sizes choose, in float64."""
    rng = np.random.default_rng(0)
    pads = [(1, 1)] * 2 if padding is None else padding

    def plain(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride,) * 2, pads, dimension_numbers=numbers)

    def layer(w, x):
        module = Conv(32, 3, stride, padding=padding, dtype=jnp.float64)
        return module.apply({"params": {"kernel": w}}, x)

    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(images, *size, 12)))
        w = jnp.asarray(rng.normal(size=(3, 3, 12, 32)))
        wanted_y, wanted = jax.jit(partial(jax.vjp, plain))(w, x)
        y, found = jax.jit(partial(jax.vjp, layer))(w, x)
        grad = jnp.asarray(rng.normal(size=y.shape))
        pairs = list(zip((y, *found(grad)), (wanted_y, *wanted(grad)), strict=True))
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.02)])
def test_the_gradient_of_batch_normalisation_is_the_traced_one(dtype, tolerance, offset):
    """Against JAX's own gradient of the formula, in float64; a large mean must not cancel."""
    rng = np.random.default_rng(0)
    shape, epsilon = (6, 7, 5, 4), 1e-5
    x = jnp.asarray(rng.normal(offset, 3, shape), dtype)
    weight = jnp.asarray(rng.normal(size=shape), jnp.float32)
    scale, bias = rng.normal(1, 0.3, 4), rng.normal(size=4)

    def formula(x, scale, bias):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + epsilon) * scale + bias

    def gradients(normalise, *arguments):
        def loss(*arguments):
            y = normalise(*arguments)
            return (jnp.sin(y) * weight).sum(), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arguments)

    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, scale, bias)]
        (*wanted, wanted_y) = jax.tree.leaves(gradients(formula, *exact))
    narrow = (x, *(jnp.asarray(a, jnp.float32) for a in (scale, bias)))
    found = gradients(lambda *a: normalize_batch(*a)[0].astype(jnp.float32), *narrow)
    for got, want in zip(jax.tree.leaves(found), (*wanted, wanted_y), strict=True):
        want = np.asarray(want)
        error = np.abs(np.asarray(got, np.float64) - want).max()
        assert error <= tolerance * np.abs(want).max()


def torch_conv3dnet(torch, model: Conv3DNet, fc_inputs: int):
    nn = torch.nn
    widths = (1, *model.widths)
    narrow = (model.widths[-1], *model.narrow)
    hidden = (fc_inputs, *model.hidden)

    def pairs(sizes):
        return itertools.pairwise(sizes)

    net = nn.ModuleDict(
        {
            "convs": nn.ModuleList([nn.Conv3d(a, b, 3, 3) for a, b in pairs(widths)]),
            "narrows": nn.ModuleList([nn.Conv3d(a, b, 1) for a, b in pairs(narrow)]),
            "hiddens": nn.ModuleList([nn.Linear(a, b) for a, b in pairs(hidden)]),
            "fc": nn.Linear(hidden[-1], model.num_labels),
        }
    )

    def forward(volume):
        x = volume[:, None]
        for layer in (*net["convs"], *net["narrows"]):
            x = layer(x).relu()
        features, x = x, x.movedim(1, -1).flatten(1)
        for layer in net["hiddens"]:
            x = layer(x).relu()
        return features, net["fc"](x)

    return net, forward


def test_conv3dnet_is_the_same_network_in_torch(torch):
    model = Conv3DNet(num_labels=5, widths=(4, 6), narrow=(5, 3), hidden=(8, 7))
    shape = (2, 20, 18, 23)
    variables = random_variables(model, shape)
    volume = np.random.default_rng(1).normal(size=shape)
    run = jax.jit(lambda v, x: (model.apply(v, x, method="features"), model.apply(v, x)))
    features, logits = run(variables, jnp.asarray(volume, jnp.float32))
    net, forward = torch_conv3dnet(torch, model, math.prod(features.shape[1:]))
    net.double().eval()
    copy_weights(torch, variables, net)
    with torch.no_grad():
        wanted_features, wanted_logits = forward(torch.tensor(volume))
    np.testing.assert_allclose(features, wanted_features.movedim(1, -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-5)


# -- sizes ----------------------------------------------------------------------------------------


def shapes_of(model, volume):
    volume = jax.ShapeDtypeStruct((1, *volume), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), volume)
    features = jax.eval_shape(partial(model.apply, method="features"), variables, volume)
    logits = jax.eval_shape(model.apply, variables, volume)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    return features.shape, logits.shape, count


def test_axialnet_at_full_size(torch):
    model = AxialNet()
    features, logits, count = shapes_of(model, FULL)
    assert (features, logits) == ((1, 135, 6, 6, 16), (1, 80))
    with torch.device("meta"):
        net, forward = torch_axialnet(torch, model, 6 * 6 * 16)
        assert forward(torch.empty(1, *FULL))[0].shape == (1, 135, 16, 6, 6)
    assert count == sum(p.numel() for p in net.parameters())
    resnet18 = 11_176_512  # torchvision's, without its classifier
    assert sum(p.numel() for p in net["resnet"].parameters()) == resnet18


def test_axialnet_without_custom_convolutions_at_full_size():
    features, logits, _ = shapes_of(AxialNet(conv_widths=()), FULL)
    assert (features, logits) == ((1, 135, 14, 14, 512), (1, 80))


def test_conv3dnet_at_full_size(torch):
    model = Conv3DNet()
    features, logits, count = shapes_of(model, FULL)
    assert (features, logits) == ((1, 5, 5, 5, 64), (1, 80))
    with torch.device("meta"):
        net, forward = torch_conv3dnet(torch, model, 8000)
        assert forward(torch.empty(1, *FULL))[0].shape == (1, 64, 5, 5, 5)
    assert count == sum(p.numel() for p in net.parameters())


def test_attention_scale_undoes_the_mean_over_slices():
    assert AxialNet(pool="mean").attention_scale((135, 6, 6)) == 135
    assert AxialNet(pool="max").attention_scale((135, 6, 6)) == 1
    assert Conv3DNet().attention_scale((5, 5, 5)) == 1


def test_slices_become_channels_in_order():
    volume = jnp.arange(2 * 6 * 2 * 2).reshape(2, 6, 2, 2).astype(jnp.float32)
    stacked = np.asarray(stack_slices(volume, 3))
    assert stacked.shape == (2, 2, 2, 2, 3)
    for image in range(2):
        for channel in range(3):
            np.testing.assert_array_equal(
                stacked[:, image, :, :, channel], volume[:, 3 * image + channel]
            )
    with pytest.raises(ValueError, match="6 slices do not divide into images of 4"):
        stack_slices(volume, 4)


def test_stacked_images_are_taken_as_they_are():
    model, shape = AXIAL["no_convs"]
    variables = random_variables(model, shape)
    volume = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    run = jax.jit(model.apply)
    fc = variables["params"]["fc"]
    features = np.abs(model.apply(variables, volume, method="features")).reshape(3, -1)
    # Three convolutions with BatchNorm (of 9, 36 and 36 products), and the mean over the slices of
    # one fully connected layer.
    assert_same_but_for_rounding(
        run(variables, volume[..., None]),
        run(variables, volume),
        terms=(9 + 4) + 2 * (36 + 4) + features.shape[1] + 3,
        scale=(features @ np.abs(fc["kernel"])).mean(0) + np.abs(fc["bias"]),
    )


def test_dropout_of_conv3dnet_is_in_training_only():
    model = Conv3DNet(num_labels=3, widths=(4,), narrow=(), hidden=(64,), dropout=0.5)
    variables = random_variables(model, (1, 3, 3, 3))
    features = jnp.ones((2, 1, 1, 1, 4))

    def head(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply(variables, features, train, method="head", rngs=rngs))

    np.testing.assert_array_equal(head(False, 0), head(False, 1))
    assert (head(True, 0) != head(True, 1)).any()


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (AxialNet(3, (1,), (8,), "small", (8,), dtype="bfloat16"), (1, 6, 24, 24)),
        (Conv3DNet(3, (8, 8), (8,), (8,), dtype="bfloat16"), (1, 12, 12, 12)),
    ],
    ids=["axialnet", "conv3dnet"],
)
def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters(model, shape):
    variables = random_variables(model, shape)
    created = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype("float32")}
    volume = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def run(model):
        def features(params):
            return model.apply(
                {**variables, "params": params}, volume, True, method="features", mutable=True
            )[0]

        def loss(params):
            return model.apply({"params": params}, features(params), method="head").sum()

        return jax.jit(lambda p: (features(p), jax.grad(loss)(p)))(variables["params"])

    half, half_gradient = run(model)
    full, gradient = run(model.clone(dtype="float32"))
    assert half.dtype == jnp.float32
    assert (np.asarray(half) != np.asarray(full)).any()
    np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())
    leaves = [jax.tree.leaves(tree) for tree in (half_gradient, gradient)]
    assert {leaf.dtype for leaf in leaves[0]} == {jnp.dtype("float32")}
    flat_half, flat = (np.concatenate([np.ravel(x) for x in side]) for side in leaves)
    assert np.linalg.norm(flat_half - flat) < 0.1 * np.linalg.norm(flat)


# -- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 2])
@pytest.mark.parametrize("pool", [max_pool, max_pool_by_slices, max_pool_by_window])
@pytest.mark.parametrize("size", [(9, 12), (8, 7), (3, 3)])
def test_max_pool_and_its_gradient_are_torchs(torch, size, pool, window):
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(2, *size, 3))).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = 0  # as behind a ReLU
    pool = partial(pool, window=window, padding=window // 3)
    out, pull_back = jax.vjp(pool, jnp.asarray(x))
    cotangent = rng.normal(size=out.shape).astype(np.float32)
    x_torch = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    wanted = torch.nn.functional.max_pool2d(x_torch, window, 2, window // 3)
    wanted.backward(torch.tensor(cotangent).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(out, wanted.detach().permute(0, 2, 3, 1).numpy())
    gradient = x_torch.grad.permute(0, 2, 3, 1).numpy()
    # Equal zeros may share a gradient here; the ReLU in front drops it.
    np.testing.assert_allclose(pull_back(cotangent)[0] * (x > 0), gradient * (x > 0), atol=1e-6)


def by_planes(x, kernel, stride, padding=0):
    return convolution_by_planes(x, kernel, (stride,) * 3, [(padding, padding)] * 3)


def direct(x, kernel, stride, padding=0):
    pads, numbers = [(padding, padding)] * 3, ("NDHWC", "DHWIO", "NDHWC")
    strides = (stride,) * 3
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=numbers)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_a_3d_convolution_by_planes_is_the_direct_one(kernel, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 8, 9, 3)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(*(kernel,) * 3, 3, 4)), jnp.float32)

    def loss(convolve, x, w):
        out = convolve(x, w, stride, padding)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return (out * weights).sum(), out

    results = [
        jax.jit(jax.value_and_grad(partial(loss, f), argnums=(0, 1), has_aux=True))(x, w)
        for f in (by_planes, direct, convolution)
    ]
    expected = jax.tree.leaves(results[1])
    for result in (results[0], results[2]):
        for got, wanted in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_3d_convolution_by_planes_is_torchs(torch):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 8, 7, 9, 3)), rng.normal(size=(3, 3, 3, 3, 4))
    wanted = torch.nn.functional.conv3d(
        torch.tensor(x).movedim(-1, 1), torch.tensor(w).permute(4, 3, 0, 1, 2), stride=2
    )
    got = by_planes(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), 2)
    np.testing.assert_allclose(got, wanted.movedim(1, -1), rtol=1e-4, atol=1e-4)
