"""Weight files to runs and Flax variables, and back; a training that starts from them."""

import json

import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.config import Config
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet, MobileNetV2, ResNetClassifier
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.models.images import ARCHITECTURES
from hirescam_jax.runs.config_files import check_types
from hirescam_jax.runs.run import Header, load_run
from hirescam_jax.weights.names import slots_of
from hirescam_jax.weights.pytorch import (
    from_torch,
    read_variables,
    read_weights,
    start_weights,
    to_torch,
    write_weights,
)

torch = pytest.importorskip("torch")

from tests.weights.torch_models import (  # noqa: E402  (needs torch)
    assert_same_trees,
    import_torchvision,
    randomise,
    torch_model,
)


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision()


# -- runs -----------------------------------------------------------------------------------------

CONFIG = """
from hirescam_jax.config import Config, PhantomData, SGD
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import AxialNet
from hirescam_jax.config import Preprocess

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
    opened = load_run(run)
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
    before = load_run(run)
    to_run = ("convert", files / "weights.safetensors", run, "--config", config)
    assert "exists: add --overwrite" in fails(capsys, *to_run)
    command(*to_run, "--overwrite")
    assert_same_trees(load_run(run).variables, before.variables)
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


# -- networks for images --------------------------------------------------------------------------


@pytest.mark.long
def test_the_real_mobilenet_becomes_variables_and_torchvisions_again(
    torchvision, real_data, tmp_path, capsys
):
    source = real_data / "mobilenet_v2-b0353104.pth"
    path, back = tmp_path / "mobilenet.safetensors", tmp_path / "mobilenet.pth"
    name = ("--architecture", "mobilenet_v2")
    command("convert", source, path, *name)
    assert_same_trees(
        read_variables(str(path)), from_torch(MobileNetV2(), read_weights(source), (96, 96))
    )

    command("convert", path, back, *name)
    saved = torch.load(back, weights_only=True)
    torchvision.models.mobilenet_v2().load_state_dict(saved)
    for key, tensor in torch.load(source, weights_only=True).items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(saved[key], tensor), key

    assert f"{back}: exists: add --overwrite" in fails(capsys, "convert", path, back, *name)
    out = tmp_path / "out.safetensors"
    wrong = fails(capsys, "convert", source, out, "--architecture", "resnet18")
    assert "another architecture, torchvision's MobileNetV2: missing " in wrong
    wrong = fails(capsys, "convert", path, out, "--architecture", "resnet18")
    assert f"{path}: not variables of resnet18: batch_stats/mobilenet/" in wrong
    wrong = fails(capsys, "convert", source, out, "--architecture", "mobilenet")
    assert "no architecture 'mobilenet' (did you mean 'mobilenet_v2'?)" in wrong
    wrong = fails(capsys, "convert", source, tmp_path / "out.pth", *name)
    assert "Flax variables are written as .safetensors" in wrong
    assert {file.name for file in tmp_path.iterdir()} == {path.name, back.name}


def test_the_labels_are_those_of_the_file(torchvision, tmp_path):
    net = torchvision.models.resnet18(num_classes=20)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    files = tmp_path / "net.pth", tmp_path / "net.safetensors"
    command("convert", *files, "--architecture", "resnet18")
    assert read_variables(files[1])["params"]["fc"]["kernel"].shape == (512, 20)
    command("convert", *files[::-1], "--architecture", "resnet18", "--overwrite")
    net.load_state_dict(torch.load(files[0], weights_only=True))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n == "densenet121" else ()) for n in ARCHITECTURES],
)
def test_the_architectures_are_torchvisions(torchvision, name):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    shapes = {n: t.torch_shape for n, t in slots_of(ARCHITECTURES[name], (224, 224)).items()}
    wanted = {n: tuple(t.shape) for n, t in state.items() if "num_batches" not in n}
    assert shapes == wanted


def test_a_network_for_images_is_converted_by_its_name(files, tmp_path, capsys):
    config = Config()
    object.__setattr__(config, "model", MobileNetV2())  # which a config file would be refused
    with pytest.raises(UserError, match=r"^c\.py: config\.model must .* CTNet, got MobileNetV2$"):
        check_types(config, "c.py")
    weights = files / "weights.pth"
    both = ("--config", files / "config.py", "--architecture", "resnet18")
    line = fails(capsys, "convert", weights, tmp_path / "run", *both)
    assert "give --config or --architecture, not both" in line


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
    assert_same_trees(load_run(run).variables["params"], wanted["params"])

    weights.unlink()
    command(*train, "--resume", "--epochs", "2")
    assert load_run(run, "latest").step == 2
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
    with pytest.raises(UserError, match=r"AxialNet's backbone: conv1.weight .*, not \(64, 1, 7, 7"):
        start_weights(str(tmp_path / "resnet18.pth"), AxialNet(channels=1), (2, 420, 420))


def test_an_image_network_with_other_labels_starts_from_the_backbone(torchvision, tmp_path):
    """What is not in the start keeps its initial values."""
    path, shape = tmp_path / "resnet18.pth", (64, 64)
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), path)
    model = ResNetClassifier(20)
    with pytest.raises(UserError, match=r"fc.weight has shape \(1000, 512\), not \(20, 512\)"):
        start_weights(path, model, shape)
    start, line = start_weights(path, model.clone(classifier="flatten"), shape, backbone=True)
    assert "starts the backbone of ResNetClassifier; its fc.weight (1000, 512) and " in line
    whole = from_torch(ResNetClassifier(), net.state_dict(), shape)
    wanted = {group: {"resnet": tree["resnet"]} for group, tree in whole.items()}
    assert_same_trees(start, wanted)


def test_the_header_of_a_run_without_the_field_is_read(run):
    path = run / "run.json"
    text = path.read_text()
    data = json.loads(text)
    del data["config"]["weights"], data["config"]["model"]["block"]
    path.write_text(json.dumps(data))
    try:
        header = Header.read(run)
    finally:
        path.write_text(text)
    assert (header.config.weights, header.config.model.block) == ("", "basic")
