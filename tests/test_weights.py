"""Weights from and for PyTorch: the same numbers, and the same step of training."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax import checkpoint, cli
from hirescam_jax.config import SGD, Config
from hirescam_jax.errors import UserError
from hirescam_jax.models import VGG, AxialNet, DenseNet, MobileNetV2, ResNetClassifier
from hirescam_jax.preprocess import Preprocess
from hirescam_jax.step import (
    TrainState,
    feature_grid,
    make_optimizer,
    train_step,
)
from hirescam_jax.weights import from_torch, read_weights, start_weights, to_torch, write_weights

torch = pytest.importorskip("torch")

from torch_models import (  # noqa: E402  (needs torch)
    PAPER,
    import_torchvision,
    randomise,
    torch_model,
)


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision()


# Compiles faster; what little is computed here hardly runs slower.
FAST = {"xla_backend_optimization_level": 0}


@cache
def paper_net(name):
    """(our model, its PyTorch network, shape of the volumes)."""
    model, shape = PAPER[name]
    return model, randomise(torch_model(model, feature_grid(model, shape), shape)), shape


def features_and_logits(model, variables, x):
    def run(variables, x):
        features = model.apply(variables, x, method="features")
        return features, model.apply(variables, features, method="head")

    return jax.jit(run, compiler_options=FAST)(variables, jnp.asarray(x, jnp.float32))


def assert_same_tensors(found, wanted):
    """Bit for bit, but for the counters, which are 0."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


def assert_same_trees(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# -- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_paper_networks_are_pytorchs(name):
    model, net, shape = paper_net(name)
    variables = from_torch(model, net.state_dict(), shape)
    created = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, created)

    assert_same_tensors(to_torch(model, variables, shape), net.state_dict())
    assert_same_trees(from_torch(model, to_torch(model, variables, shape), shape), variables)

    volume = np.random.default_rng(1).normal(size=(2, *shape))
    features, logits = features_and_logits(model, variables, volume)
    with torch.no_grad():
        wanted_features, wanted_logits = net.double().eval()(torch.tensor(volume))
    net.float()
    np.testing.assert_allclose(features, wanted_features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-4)
    assert np.abs(logits).max() > 0.1


MOBILE_STAGES = ((1, 4, 1, 1), (6, 6, 2, 2))
DENSE_CHANNELS = (6 + 2 * 4) // 2 + 3 * 4
DENSE = DenseNet(5, (2, 3), 4, 6, 2)
IMAGE_NETS = {  # with (H, W) of the images
    "resnet-basic": (ResNetClassifier(5, (1,) * 4), (64, 96)),
    "resnet-bottleneck": (ResNetClassifier(5, (1,) * 4, block="bottleneck"), (64, 96)),
    "vgg": (VGG(5, ((4,), (6, 6)), hidden=(8, 7)), (36, 44)),  # 9 x 11 features, pooled to 7 x 7
    "densenet": (DENSE, (48, 64)),
    "densenet-flatten": (DENSE.clone(classifier="flatten"), (24, 32)),  # 3 x 4
    "mobilenet": (MobileNetV2(5, MOBILE_STAGES), (32, 48)),
}


def torchvision_net(torchvision, name):
    nets, nn = torchvision.models, torch.nn
    if name.startswith("resnet"):
        kinds = {
            "resnet-basic": nets.resnet.BasicBlock,
            "resnet-bottleneck": nets.resnet.Bottleneck,
        }
        return nets.resnet.ResNet(kinds[name], [1, 1, 1, 1], num_classes=5)
    if name == "vgg":
        with torch.device("meta"):  # its own classifier takes half a gigabyte
            net = nets.vgg.VGG(nn.Identity(), 5, init_weights=False)
        net.features = nets.vgg.make_layers([4, "M", 6, 6, "M"])
        layers = [nn.Linear(6 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 7), nn.ReLU()]
        net.classifier = nn.Sequential(*layers, nn.Dropout(), nn.Linear(7, 5))
        return net
    if name == "mobilenet":
        stages = [list(stage) for stage in MOBILE_STAGES]
        return nets.MobileNetV2(5, inverted_residual_setting=stages, round_nearest=2)
    net = nets.DenseNet(4, (2, 3), 6, 2, num_classes=5)
    if name == "densenet-flatten":
        net.classifier = nn.Linear(DENSE_CHANNELS * 3 * 4, 5)
        net.forward = lambda x: net.classifier(net.features(x).relu().flatten(1))
    return net


@pytest.mark.parametrize("name", IMAGE_NETS)
def test_image_networks_are_torchvisions(torchvision, name):
    (model, shape), net = IMAGE_NETS[name], torchvision_net(torchvision, name)
    state = randomise(net).state_dict()
    variables = from_torch(model, state, shape)
    assert_same_tensors(to_torch(model, variables, shape), state)
    assert_same_trees(from_torch(model, to_torch(model, variables, shape), shape), variables)

    images = np.random.default_rng(1).normal(size=(2, *shape, 3))
    _, logits = features_and_logits(model, variables, images)
    with torch.no_grad():
        wanted = net.double().eval()(torch.tensor(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(logits).max() > 0.1


def test_the_real_mobilenet_is_torchvisions(torchvision, real_data):
    file = real_data / "mobilenet_v2-b0353104.pth"
    tensors = read_weights(file)
    model = MobileNetV2()
    variables = from_torch(model, tensors, (96, 96))
    images = np.random.default_rng(0).normal(size=(1, 96, 96, 3))
    features, logits = features_and_logits(model, variables, images)

    net = torchvision.models.mobilenet_v2()
    net.load_state_dict(torch.load(file, weights_only=True))
    net.double().eval()
    x = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted_features, wanted = net.features(x).permute(0, 2, 3, 1), net(x)
    np.testing.assert_allclose(features, wanted_features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
    assert_same_tensors(to_torch(model, variables, (96, 96)), net.float().state_dict())


# -- one step of training -------------------------------------------------------------------------

STEP = Config(
    preprocess=Preprocess(flip=0.0, rotate=0.0),
    optimizer=SGD(learning_rate=0.05, momentum=0.9, weight_decay=0.01),
    mask_weight=2.0,
)


def batch_of(shape, grid, size):
    rng = np.random.default_rng(0)
    return {
        "volume": rng.integers(-1200, 1200, (size, *shape), dtype=np.int16),
        "findings": (rng.random((size, 3, 2)) < 0.4).astype(np.uint8),
        "regions": (rng.random((size, 2, *grid)) < 0.5).astype(np.uint8),
        "index": np.arange(size, dtype=np.int32),
    }


def torch_step(net, model, optimizer, batch):
    """The loss and one update, written from the paper's formulas."""
    settings, functional = STEP.preprocess, torch.nn.functional
    volume = torch.tensor(batch["volume"]).double().clamp(settings.hu_min, settings.hu_max)
    volume = (volume - settings.hu_min) / (settings.hu_max - settings.hu_min) - settings.mean
    findings = torch.tensor(batch["findings"]).bool()
    regions = torch.tensor(batch["regions"]).bool()
    features, logits = net(volume)
    if isinstance(model, AxialNet) and model.pool == "mean":
        weights = net.fc.weight.movedim(1, -1)  # [K, h, w, C]
        attention = torch.einsum("khwc,bshwc->bkshw", weights, features)
    else:
        maps = []
        for score in logits.sum(0):
            (gradient,) = torch.autograd.grad(score, features, create_graph=True)
            maps.append((gradient * features).sum(-1))
        attention = torch.stack(maps, 1)
    forbidden = ~(findings[..., None, None, None] & regions[:, None]).any(2)
    penalty = torch.stack(
        [functional.softplus(a[f]).mean() for a, f in zip(attention, forbidden, strict=True)]
    ).mean()
    labels = findings.any(-1).double()
    class_loss = functional.binary_cross_entropy_with_logits(logits, labels)
    loss = class_loss + STEP.mask_weight * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "class_loss": class_loss.item(), "mask_loss": penalty.item()}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("axialnet", 2),
        ("axialnet-max", 1),
        ("bodyconv", 2),
        ("conv3d", 1),
        pytest.param("axialnet", 1, marks=pytest.mark.long),
        pytest.param("axialnet-max", 2, marks=pytest.mark.long),
        pytest.param("bodyconv", 1, marks=pytest.mark.long),
        pytest.param("conv3d", 2, marks=pytest.mark.long),
    ],
)
def test_a_step_of_training_is_pytorchs(name, size):
    """Losses, parameters and BatchNorm's statistics after one step with the mask loss, and after a
    second one, in which momentum counts."""
    model, net, shape = paper_net(name)
    net = torch_model(model, feature_grid(model, shape), shape).double().train()
    net.load_state_dict(paper_net(name)[1].state_dict())
    settings = STEP.optimizer
    torch_optimizer = torch.optim.SGD(
        net.parameters(),
        settings.learning_rate,
        settings.momentum,
        weight_decay=settings.weight_decay,
    )
    start = before = from_torch(model, net.state_dict(), shape)
    optimizer = make_optimizer(STEP, 10)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=before["params"],
        batch_stats=before.get("batch_stats", {}),
        opt_state=optimizer.init(before["params"]),
    )
    config = Config(**{**vars(STEP), "model": model})
    program = partial(train_step, config=config, optimizer=optimizer)
    step = jax.jit(program, compiler_options=FAST)
    batch = batch_of(shape, feature_grid(model, shape), size)
    for _ in range(2):
        state, metrics = step(state, batch)
        for loss, value in torch_step(net, model, torch_optimizer, batch).items():
            assert float(metrics[loss]) == pytest.approx(value, rel=1e-4)
        found = {k: v for k, v in state.variables.items() if v}
        wanted = from_torch(model, net.state_dict(), shape)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
            ours, first = (leaf_at(tree, path) for tree in (found, start))
            np.testing.assert_allclose(ours, leaf, rtol=0, atol=1e-4, err_msg=str(path))
            # Relative to how far it came: a gradient that is missing or doubled cannot hide.
            moved = np.abs(leaf - first).max()
            np.testing.assert_allclose(ours, leaf, rtol=0, atol=2e-3 * moved + 1e-6)


def leaf_at(tree, path):
    for key in path:
        tree = tree[key.key]
    return np.asarray(tree)


# -- what weight files look like ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "prefix", "suffix"),
    [("params", "module.", ""), ("state_dict", "", ".pth"), ("", "module.", ".pth"), ("", "", "")],
)
def test_checkpoints_of_training_scripts_are_read(tmp_path, wrap, prefix, suffix):
    """The authors' are {"params": ..., "optimizer": ...}, of DataParallel, and have no suffix."""
    model, net, shape = paper_net("axialnet")
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9).state_dict()
    saved = {wrap: state, "optimizer": optimizer, "epoch": 3} if wrap else state
    path = tmp_path / f"AxialNet_epoch34{suffix}"
    torch.save(saved, path)
    wanted = from_torch(model, net.state_dict(), shape)
    assert_same_trees(from_torch(model, read_weights(path), shape), wanted)
    assert_same_trees(from_torch(model, saved, shape), wanted)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_files_are_written_and_read_bit_for_bit(tmp_path, suffix):
    model, net, shape = paper_net("axialnet")
    tensors = to_torch(model, from_torch(model, net.state_dict(), shape), shape)
    path = tmp_path / f"weights{suffix}"
    write_weights(path, tensors, key="params")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = read_weights(path)
    wanted = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    if suffix != ".safetensors":  # as the authors' code opens it
        net.load_state_dict(torch.load(path, weights_only=True)["params"])


def test_half_precision_is_read(tmp_path):
    from safetensors.torch import save_file

    model, net, shape = paper_net("axialnet-dense")
    for kind in (torch.float16, torch.bfloat16):
        state = {n: t.to(kind) if t.is_floating_point() else t for n, t in net.state_dict().items()}
        save_file(state, tmp_path / "half.safetensors")
        torch.save(state, tmp_path / "half.pth")
        for file in ("half.safetensors", "half.pth"):
            variables = from_torch(model, read_weights(tmp_path / file), shape)
            kernel = variables["params"]["resnet"]["conv1"]["kernel"]
            assert kernel.dtype == jnp.float32
            wanted = state["features.0.weight"].float().permute(2, 3, 1, 0)
            np.testing.assert_array_equal(kernel, wanted)


def test_a_missing_a_foreign_and_a_misshapen_tensor_are_named():
    model, net, shape = paper_net("axialnet")
    state = dict(net.state_dict())

    def message(state):
        with pytest.raises(UserError) as caught:
            from_torch(model, state, shape, "w.pth")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message({n: t for n, t in state.items() if n != "fc.bias"}) == (
        "w.pth: not weights of AxialNet: missing fc.bias (3,)"
    )
    assert message({**state, "extra": torch.zeros(2, 3)}) == (
        "w.pth: not weights of AxialNet: not known extra (2, 3)"
    )
    assert message({**state, "fc.weight": torch.zeros(9, 4, 4, 6)}) == (
        "w.pth: not weights of AxialNet: fc.weight has shape (9, 4, 4, 6), not (3, 4, 4, 6)"
    )
    renamed = {n.replace("features.4", "features.9"): t for n, t in state.items()}
    text = message(renamed)
    assert "missing features.4.0.bn1.weight (4,), features.4.0.bn1.bias (4,), " in text
    assert "not known features.9.0.conv1.weight" in text
    assert " and 17 more" in text
    assert message({}) == "w.pth: holds no state dict (tensors by name)"
    assert message({"lr": "low"}) == "w.pth: 'lr' is no tensor: give the state dict alone"


@pytest.mark.parametrize(
    ("of", "line"),
    [
        ("bodyconv", "but of another architecture, BodyConv or CTNet: missing "),
        (
            "resnet",
            r"but of another architecture, torchvision's ResNet: missing conv2d\.0\.weight",
        ),
    ],
)
def test_weights_of_another_architecture_are_said_to_be_so(torchvision, of, line):
    model, _, shape = paper_net("axialnet")
    net = torchvision.models.resnet18() if of == "resnet" else paper_net(of)[1]
    with pytest.raises(UserError, match=line):
        from_torch(model, net.state_dict(), shape)


def test_to_torch_refuses_variables_of_another_shape():
    model, net, shape = paper_net("axialnet")
    variables = from_torch(model, net.state_dict(), shape)
    with pytest.raises(ValueError, match=r"params/fc/kernel has shape \(96, 3\), .* \(128, 3\)"):
        to_torch(model, variables, (6, 64, 90))
    with pytest.raises(TypeError, match="is no network of hirescam_jax"):
        to_torch(object(), variables, shape)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil-was-here"),)


def test_files_that_are_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"none.pth: no such weight file"):
        read_weights(tmp_path / "none.pth")
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"no weights at all, whatever the name says")
        with pytest.raises(UserError, match=f"broken{suffix}: not readable as "):
            read_weights(path)
    torch.save({"state_dict": {}, "object": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds other Python objects than tensors"):
        read_weights(tmp_path / "evil.pth")
    assert not Path("evil-was-here").exists()
    with pytest.raises(UserError, match=r"weights are written as one of \.pth, "):
        write_weights(tmp_path / "weights.npz", {})


def test_pth_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UserError, match=r"pip install 'hirescam_jax\[torch\]'"):
        read_weights(tmp_path / "weights.pth")


# -- runs -----------------------------------------------------------------------------------------

CONFIG = """
from hirescam_jax.config import Config, PhantomData, SGD
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import AxialNet
from hirescam_jax.preprocess import Preprocess

config = Config(
    model=AxialNet(blocks=(1,), widths=(4,), stem="small", conv_widths=()),
    data=PhantomData(PhantomConfig(shape=(6, 16, 20)), train_size=2, val_size=2, test_size=2),
    preprocess=Preprocess(rotate=0.0),
    optimizer=SGD(learning_rate=0.0, weight_decay=0.0),
    batch_size=2,
    epochs=1,
)
"""
RUN_MODEL = AxialNet(12, (1,), (4,), "small", ())
RUN_SHAPE = (6, 16, 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a config, and its model's weights as weights.pth and weights.safetensors."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "config.py").write_text(CONFIG)
    net = randomise(torch_model(RUN_MODEL, feature_grid(RUN_MODEL, RUN_SHAPE), RUN_SHAPE))
    torch.save({"params": net.state_dict()}, folder / "weights.pth")
    variables = from_torch(RUN_MODEL, net.state_dict(), RUN_SHAPE)
    write_weights(folder / "weights.safetensors", to_torch(RUN_MODEL, variables, RUN_SHAPE))
    return folder


def command(*arguments):
    cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hirescam: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def run(files):
    command("convert", files / "weights.pth", files / "run", "--config", files / "config.py")
    return files / "run"


def test_a_weight_file_becomes_a_run_and_a_weight_file_again(files, run, tmp_path):
    opened = checkpoint.load_run(run)
    assert (opened.step, opened.shape, len(opened.labels)) == (0, RUN_SHAPE, 12)
    wanted = from_torch(RUN_MODEL, read_weights(files / "weights.pth"), RUN_SHAPE)
    assert_same_trees(opened.variables, wanted)
    for name in ("again.pth", "again.safetensors"):
        command("convert", run, tmp_path / name)
        found, first = read_weights(tmp_path / name), read_weights(files / "weights.pth")
        assert found.keys() == first.keys()
        for key in first:
            np.testing.assert_array_equal(found[key], first[key])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pth", "again.safetensors"]


def test_a_converted_run_is_evaluated(run):
    command("evaluate", run)
    result = json.loads((run / "evaluation.json").read_text())
    assert result["step"] == 0
    assert result["volumes"] == 2


def test_convert_overwrites_nothing_unasked(files, run, capsys, tmp_path):
    config = files / "config.py"
    before = checkpoint.load_run(run)
    to_run = ("convert", files / "weights.safetensors", run, "--config", config)
    assert "exists: add --overwrite" in fails(capsys, *to_run)
    command(*to_run, "--overwrite")
    assert_same_trees(checkpoint.load_run(run).variables, before.variables)
    assert not list(files.glob(".*"))

    (tmp_path / "folder").mkdir()
    other = ("convert", files / "weights.pth", tmp_path / "folder", "--config", config)
    assert "is no run folder" in fails(capsys, *other, "--overwrite")
    (tmp_path / "out.pth").write_text("kept")
    assert "exists: add --overwrite" in fails(capsys, "convert", run, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_text() == "kept"
    assert "written as one of" in fails(capsys, "convert", run, tmp_path / "out.onnx")
    no_parent = ("convert", run, tmp_path / "none" / "out.pth")
    assert "is no folder" in fails(capsys, *no_parent)


def test_convert_says_what_is_wrong(files, capsys, tmp_path):
    config = ("--config", files / "config.py")
    weights = files / "weights.pth"
    assert "give --config" in fails(capsys, "convert", weights, tmp_path / "run")
    wrong = ("--data.phantom.shape", "6", "16", "24")
    line = fails(capsys, "convert", weights, tmp_path / "run", *config, *wrong)
    assert "fc.weight has shape (12, 4, 8, 10), not (12, 4, 8, 12)" in line
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        command("convert", "--help")
    assert caught.value.code == 0
    assert "--config CONFIG.py" in capsys.readouterr().out


# -- training from weights ------------------------------------------------------------------------


@pytest.mark.long
def test_training_starts_from_a_file_and_resumes_without_it(files, tmp_path, capsys):
    """A learning rate of 0 keeps the weights that it started from."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((files / "weights.safetensors").read_bytes())
    run = tmp_path / "run"
    train = ("train", files / "config.py", "--run", run, "--weights", weights)
    command(*train)
    assert f"{weights}: starts the whole AxialNet" in capsys.readouterr().err
    wanted = from_torch(RUN_MODEL, read_weights(weights), RUN_SHAPE)
    assert_same_trees(checkpoint.load_run(run).variables["params"], wanted["params"])

    weights.unlink()
    command(*train, "--resume", "--epochs", "2")
    assert checkpoint.load_run(run, "latest").step == 2
    missing = fails(capsys, "train", files / "config.py", "--run", tmp_path / "b", *train[-2:])
    assert "no such weight file" in missing
    assert not (tmp_path / "b").exists()


def test_torchvisions_resnet_starts_the_backbone(torchvision, tmp_path):
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    start, line = start_weights(str(tmp_path / "resnet18.pth"), AxialNet(), (6, 420, 420))
    assert "fc.weight (1000, 512) and fc.bias (1000,) are left out" in line
    assert {name: list(tree) for name, tree in start.items()} == {
        "params": ["resnet"],
        "batch_stats": ["resnet"],
    }
    model = ResNetClassifier()
    whole = from_torch(model, net.state_dict(), (32, 32))
    assert_same_trees(start["params"]["resnet"], whole["params"]["resnet"])
    assert_same_trees(start["batch_stats"]["resnet"], whole["batch_stats"]["resnet"])
    with pytest.raises(UserError, match=r"AxialNet's ResNet: conv1.weight .* not \(64, 1, 7, 7\)"):
        start_weights(str(tmp_path / "resnet18.pth"), AxialNet(channels=1), (2, 420, 420))


def test_the_header_of_a_run_without_the_field_is_read(run):
    path = run / "run.json"
    text = path.read_text()
    data = json.loads(text)
    del data["config"]["weights"], data["config"]["model"]["block"]
    path.write_text(json.dumps(data))
    try:
        header = checkpoint.Header.read(run)
    finally:
        path.write_text(text)
    assert (header.config.weights, header.config.model.block) == ("", "basic")
