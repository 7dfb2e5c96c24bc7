"""Weights from and for PyTorch: the same numbers, and what files of them look like."""

import hashlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.errors import UserError
from hirescam_jax.models import MobileNetV2
from hirescam_jax.weights.pytorch import (
    from_torch,
    read_variables,
    read_weights,
    to_torch,
    write_variables,
    write_weights,
)

torch = pytest.importorskip("torch")

from tests.weights.torch_models import (  # noqa: E402  (needs torch)
    FAST,
    IMAGE_NETS,
    PAPER,
    assert_same_trees,
    import_torchvision,
    paper_net,
    randomise,
    torchvision_features,
    torchvision_net,
)


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision()


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


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", IMAGE_NETS)
def test_image_networks_are_torchvisions(name):
    (model, shape), net = IMAGE_NETS[name], torchvision_net(name)
    state = randomise(net).state_dict()
    variables = from_torch(model, state, shape)
    assert_same_tensors(to_torch(model, variables, shape), state)
    assert_same_trees(from_torch(model, to_torch(model, variables, shape), shape), variables)

    images = np.random.default_rng(1).normal(size=(2, *shape, 3))
    features, logits = features_and_logits(model, variables, images)
    net, x = net.double().eval(), torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted_features = torchvision_features(name, net)(x).permute(0, 2, 3, 1)
        wanted = net(x)
    np.testing.assert_allclose(features, wanted_features, rtol=1e-4, atol=1e-4)
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


# -- what weight files look like ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "prefix", "suffix"),
    [
        ("params", "module.", ""),
        ("state_dict", "", ".pth"),
        ("", "module.", ".pth"),
        ("", "", ""),
        ("state_dict", "model.", ".ckpt"),
        ("model", "module._orig_mod.", ".pth"),
    ],
)
def test_checkpoints_of_training_scripts_are_read(tmp_path, wrap, prefix, suffix):
    """The authors' are {"params": ..., "optimizer": ...}, of DataParallel, and have no suffix;
    PyTorch Lightning's and those of torch.compile have other prefixes."""
    model, net, shape = paper_net("axialnet")
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9).state_dict()
    saved = {wrap: state, "optimizer": optimizer, "epoch": 3} if wrap else state
    path = tmp_path / f"AxialNet_epoch34{suffix}"
    torch.save(saved, path)
    wanted = from_torch(model, net.state_dict(), shape)
    assert_same_trees(from_torch(model, read_weights(path), shape), wanted)
    assert_same_trees(from_torch(model, saved, shape), wanted)


def test_an_empty_wrapper_hides_nothing():
    model, net, shape = paper_net("axialnet")
    state = net.state_dict()
    found = from_torch(model, {"params": {}, "state_dict": state}, shape)
    assert_same_trees(found, from_torch(model, state, shape))
    with pytest.raises(UserError, match="holds no state dict"):
        from_torch(model, {"params": {}}, shape)


@pytest.mark.usefixtures("torchvision")
def test_densenets_names_of_before_2018_are_read(tmp_path):
    """As in the file that torchvision loads, densenet121-a639ec97.pth."""
    model, shape = IMAGE_NETS["densenet"]
    state = randomise(torchvision_net("densenet")).state_dict()
    legacy = {
        re.sub(r"(denselayer\d+\.[a-z]+)([12])", r"\1.\2", name): tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in legacy
    torch.save(legacy, tmp_path / "legacy.pth")
    found = from_torch(model, read_weights(tmp_path / "legacy.pth"), shape)
    assert_same_trees(found, from_torch(model, state, shape))


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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bfloat16_is_written_as_float32(tmp_path, suffix):
    """What to_torch makes of variables in bfloat16, and arrays given as they are."""
    values = np.float32([0.1, -2.5, 1e30])
    half = jnp.asarray(values, jnp.bfloat16)
    path = tmp_path / f"half{suffix}"
    write_weights(path, {"a": np.asarray(half)})
    np.testing.assert_array_equal(read_weights(path)["a"], half.astype(jnp.float32))
    model, net, shape = paper_net("axialnet")
    variables = from_torch(model, net.state_dict(), shape)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    tensors = to_torch(model, variables, shape)
    assert tensors["fc.bias"].dtype == np.float32
    np.testing.assert_array_equal(tensors["fc.bias"], variables["params"]["fc"]["bias"])


def test_half_and_double_precision_are_read(tmp_path):
    from safetensors.torch import save_file

    model, net, shape = paper_net("axialnet-dense")
    for kind in (torch.float16, torch.bfloat16, torch.float64):
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


REFUSED = {
    "complex": (lambda x: x.to(torch.complex64), "has numbers of type complex64, not of float16"),
    "bool": (lambda x: x > 0, "has numbers of type bool, not of "),
    "integer": (lambda x: x.long(), "has numbers of type int64, not of "),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "has numbers of type (float8|F8_E4M3)"),
    "nan": (lambda x: x * torch.nan, "holds NaN"),
    "infinite": (lambda x: x.double() + 1e300, "holds .* infinite in float32"),
    "sparse": (lambda x: x.to_sparse(), "is sparse: save what its to_dense"),
    "meta": (lambda x: x.to("meta"), "is on the meta device"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_are_no_finite_numbers_are_named(tmp_path, kind):
    from safetensors.torch import save_file

    change, message = REFUSED[kind]
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": change(torch.ones(3))}
    torch.save(state, tmp_path / "w.pth")
    paths = [tmp_path / "w.pth"]
    if kind not in ("sparse", "meta"):  # which that format has not
        save_file(state, tmp_path / "w.safetensors")
        paths.append(tmp_path / "w.safetensors")
    for path in paths:
        with pytest.raises(UserError, match=f"^{path}: 'fc.bias' {message}") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_a_negative_variance_and_a_strange_counter_are_named():
    model, net, shape = paper_net("axialnet")
    state = net.state_dict()
    negative = {**state, "features.1.running_var": -torch.ones(4)}
    with pytest.raises(UserError, match=r"'features.1.running_var' is negative \(-1\)"):
        from_torch(model, negative, shape)
    counter = {**state, "extra.num_batches_tracked": torch.tensor(3)}
    with pytest.raises(UserError, match=r"not known extra.num_batches_tracked \(\)"):
        from_torch(model, counter, shape)


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((12, 16), r"AxialNet: shape must be \(D, H, W\), got \(12, 16\)"),
        ((7, 64, 80), r"AxialNet does not fit shape \(7, 64, 80\): 7 slices do not divide"),
        ((6, 0, 80), r"AxialNet: shape must be \(D, H, W\)"),
    ],
)
def test_a_shape_that_the_model_cannot_take(shape, line):
    model, net, _ = paper_net("axialnet")
    with pytest.raises(ValueError, match=line) as caught:
        from_torch(model, net.state_dict(), shape)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"MobileNetV2: shape must be \(H, W\)"):
        from_torch(MobileNetV2(), {}, (3, 32, 32))


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
    with pytest.raises(UserError, match=r"other Python objects than tensors \(\S+\)"):
        read_weights(tmp_path / "evil.pth")
    assert not Path("evil-was-here").exists()
    with pytest.raises(UserError, match=r"weights are written as one of \.pth, "):
        write_weights(tmp_path / "weights.npz", {})


def test_damaged_files_are_said_to_be_so(tmp_path):
    write_weights(tmp_path / "whole.pth", {"a": np.ones(1000, np.float32)})
    write_weights(tmp_path / "whole.safetensors", {"a": np.ones(1000, np.float32)})
    for suffix in (".pth", ".safetensors"):
        content = (tmp_path / f"whole{suffix}").read_bytes()
        path = tmp_path / f"cut{suffix}"
        for length in (0, 1, 20, len(content) // 2, len(content) - 10):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match=f"^{path}: .*: damaged or truncated") as caught:
                read_weights(path)
            assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "weights.pth"
    write_weights(path, {"a": np.arange(1000, dtype=np.float32)})
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(500).tobytes() + np.float32(501).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: the checksum of its part '.*data/0' is wrong$"):
        read_weights(path)


def test_torchvisions_file_names_are_checked(tmp_path):
    write_weights(tmp_path / "weights.pth", {"a": np.ones(3, np.float32)})
    content = (tmp_path / "weights.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    wrong = "00000000" if digest != "00000000" else "11111111"
    for name in (f"resnet18-{digest}.pth", f"lungs-{wrong}.pth"):
        (tmp_path / name).write_bytes(content)
        assert list(read_weights(tmp_path / name)) == ["a"]
    path = tmp_path / f"resnet18-{wrong}.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"not the file of this name: its SHA-256 .* {digest}$"):
        read_weights(path)


def test_torchscript_is_not_damaged(tmp_path):
    import zipfile

    # What torch.jit.save writes, which PyTorch calls deprecated.
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(UserError, match=r"it is TorchScript: save the model's state_dict\(\)"):
        read_weights(tmp_path / "script.pth")


# -- Flax variables -------------------------------------------------------------------------------


def test_variables_are_written_and_read(tmp_path):
    from safetensors.numpy import load_file

    model, net, shape = paper_net("axialnet")
    variables = from_torch(model, net.state_dict(), shape)
    path = tmp_path / "variables.safetensors"
    assert write_variables(path, variables) == len(jax.tree.leaves(variables))
    assert_same_trees(read_variables(path), variables)
    kernel = load_file(path)["params/resnet/conv1/kernel"]
    np.testing.assert_array_equal(kernel, net.features[0].weight.detach().permute(2, 3, 1, 0))

    with pytest.raises(UserError, match="holds Flax variables: use read_variables"):
        from_torch(model, read_weights(path), shape, str(path))
    write_weights(path, to_torch(model, variables, shape))
    with pytest.raises(UserError, match=r"holds no Flax variables but '.*': make them by"):
        read_variables(path)
    with pytest.raises(UserError, match=r"Flax variables are written as \.safetensors"):
        write_variables(tmp_path / "variables.pth", variables)


def test_pth_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UserError, match=r"pip install 'hirescam_jax\[torch\]'"):
        read_weights(tmp_path / "weights.pth")
