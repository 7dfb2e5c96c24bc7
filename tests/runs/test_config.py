"""Configs: there and back as JSON, and what is said about mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hirescam_jax.config import SGD, Adam, Config, Preprocess
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.specs import PhantomData, StoreData
from hirescam_jax.errors import UserError, nearest
from hirescam_jax.models import AxialNet, Conv3DNet
from hirescam_jax.runs.config_files import check_types, from_json, load_config, to_json

IMPORTS = """
from hirescam_jax.config import Config, SGD, Adam, PhantomData, StoreData
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import AxialNet, Conv3DNet
from hirescam_jax.config import Preprocess
"""

CONFIGS = {
    "defaults": Config(),
    "nested": Config(
        model=AxialNet(num_labels=3, blocks=(1, 1), widths=(4, 8), stem="small", conv_widths=()),
        data=PhantomData(PhantomConfig(shape=(12, 16, 20), confounding=0.25), train_size=7),
        preprocess=Preprocess(hu_min=-160.0, flip=0.0),
        optimizer=Adam(learning_rate=1e-2),
        labels=("nodule", "emphysema"),
        mask_weight=0.0,
    ),
    "other_members": Config(
        model=Conv3DNet(widths=(8,), narrow=(), hidden=(4,), dtype="bfloat16"),
        data=StoreData(path="some/folder"),
        optimizer=SGD(momentum=0.5),
        batch_size=4,
        seed=3,
    ),
}


def edited(config: Config, *path, value) -> str:
    data = json.loads(to_json(config))
    target = data
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    return json.dumps(data)


def write(folder: Path, text: str) -> Path:
    path = folder / "my_config.py"
    path.write_text(IMPORTS + text)
    return path


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_papers():
    config = Config()
    assert config.optimizer == SGD(learning_rate=1e-3, momentum=0.99, weight_decay=1e-7)
    assert (config.batch_size, config.epochs, config.patience) == (1, 100, 15)
    assert config.mask_weight == pytest.approx(1 / 3)
    assert config.preprocess == Preprocess(-1000.0, 800.0, 0.449, 0.5, 0.5)
    assert config.model == AxialNet(80, (2, 2, 2, 2), (64, 128, 256, 512), "imagenet")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_there_and_back(config):
    text = to_json(config)
    again = from_json(text, "run.json")
    assert again == config
    assert to_json(again) == text
    assert json.loads(text)["model"]["type"] == type(config.model).__name__


def test_config_file(tmp_path):
    path = write(
        tmp_path,
        """
base = Config(batch_size=4)
config = Config(
    model=AxialNet(blocks=(1,), widths=(8,), stem="small"),
    data=PhantomData(PhantomConfig(shape=(24, 32, 32)), train_size=5 * 4),
    optimizer=Adam(),
    batch_size=base.batch_size,
)
""",
    )
    config = load_config(path)
    assert config.model.blocks == (1,)
    assert config.data == PhantomData(PhantomConfig(shape=(24, 32, 32)), train_size=20)
    assert (config.optimizer, config.batch_size, config.seed) == (Adam(), 4, 0)


# -- mistakes -------------------------------------------------------------------------------------
#
# In tests the constructors check their types themselves, so whatever builds a config with a
# mistake in it is run in one interpreter of its own, without those checks.

MISSPELT = {
    "Config(bacth_size=4)": ("bacth_size", "batch_size"),
    "Config(model=AxialNet(num_label=4))": ("num_label", "num_labels"),
    "Config(model=Conv3DNet(dropuot=0.1))": ("dropuot", "dropout"),
    "Config(data=PhantomData(trian_size=4))": ("trian_size", "train_size"),
    "Config(data=PhantomData(phantom=PhantomConfig(shpae=(1, 2, 3))))": ("shpae", "shape"),
    "Config(data=StoreData(pth='x'))": ("pth", "path"),
    "Config(optimizer=SGD(momemtum=0.9))": ("momemtum", "momentum"),
    "Config(preprocess=Preprocess(hu_mni=-1000))": ("hu_mni", "hu_min"),
}
ILL_TYPED = {
    "Config(batch_size='4')": "config.batch_size must be int, got '4'",
    "Config(batch_size=4.5)": "config.batch_size must be int, got 4.5",
    "Config(batch_size=True)": "config.batch_size must be int, got True",
    "Config(mask_weight=None)": "config.mask_weight must be float, got None",
    "Config(labels='nodule')": "config.labels must be ",
    "Config(labels=['nodule'])": "config.labels must be ",
    "Config(model=3)": "config.model must be AxialNet or Conv3DNet or BodyConv or CTNet, got 3",
    "Config(data=Preprocess())": "config.data must be PhantomData or StoreData, got Preprocess(",
    "Config(optimizer=SGD)": "config.optimizer must be SGD or Adam, got ",
    "Config(optimizer=SGD(learning_rate='1e-3'))": "config.optimizer.learning_rate must be float",
    "Config(model=AxialNet(widths=(64, '128')))": "config.model.widths must be ",
    "Config(model=AxialNet(stem='big'))": "config.model.stem must be one of 'imagenet', 'small'",
    "Config(preprocess=Preprocess(flip='yes'))": "config.preprocess.flip must be float, got 'yes'",
    "Config(data=PhantomData(PhantomConfig(shape=(48, 64))))": "config.data.phantom.shape must be ",
}
FINE = {
    "integers for floats": "Config(mask_weight=0, optimizer=SGD(learning_rate=1))",
    "integers for floats in tuples": "Config(data=PhantomData(PhantomConfig(field_mm=(9, 9, 9))))",
    "everything": "Config(AxialNet(), PhantomData(PhantomConfig()), Preprocess(), Adam())",
}
BAD_JSON = {
    "unknown field config.epoch (did you mean 'epochs'?)": (["epoch"], 3),
    "unknown field config.model.width (did you mean 'widths'?)": (["model", "width"], [4]),
    "unknown field config.data.phantom.sede (did you mean 'seed'?)": (
        ["data", "phantom", "sede"],
        1,
    ),
    "config.model.type must be one of AxialNet, Conv3DNet": (["model", "type"], "ResNet"),
    "config.data.type must be one of PhantomData, StoreData": (["data", "type"], "Folder"),
    "config.epochs must be int, got 'three'": (["epochs"], "three"),
    "config.model.widths must be ": (["model", "widths"], [4, "x"]),
    "config.optimizer must be SGD or Adam, got 3": (["optimizer"], 3),
    "config.model must be AxialNet or Conv3DNet or BodyConv or CTNet, got None": (["model"], None),
    "config.model must be AxialNet or Conv3DNet or BodyConv or CTNet, got (1,)": (["model"], [1]),
    "config.data": (["data"], {"type": "StoreData"}),
}
SCRIPT = """
import json, sys
from pathlib import Path
from hirescam_jax.runs.config_files import from_json, load_config
from hirescam_jax.errors import UserError

results = {}
for path in map(Path, sys.argv[1:]):
    try:
        load_config(path) if path.suffix == ".py" else from_json(path.read_text(), str(path))
        results[path.name] = ["", ""]
    except Exception as error:
        results[path.name] = [type(error).__name__, str(error)]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Text of a config file or of a config as JSON -> what is said about it, "" if it is fine."""
    folder = tmp_path_factory.mktemp("configs")
    names = {}
    for text in (*MISSPELT, *ILL_TYPED, *FINE.values()):
        names[text] = folder / f"case_{len(names)}.py"
        names[text].write_text(f"{IMPORTS}\nconfig = {text}\n")
    for path, value in BAD_JSON.values():
        text = edited(Config(), *path, value=value)
        names[text] = folder / f"case_{len(names)}.json"
        names[text].write_text(text)
    command = [sys.executable, "-c", SCRIPT, *map(str, names.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)

    def look_up(text: str) -> str:
        kind, message = results[names[text].name]
        assert kind in ("", "UserError"), (kind, message)
        assert "\n" not in message
        assert not kind or str(names[text]) in message
        return message

    return look_up


@pytest.mark.parametrize("text", MISSPELT)
def test_misspelt_field(said, text):
    wrong, meant = MISSPELT[text]
    assert f"'{wrong}'" in said(text)
    assert f"did you mean '{meant}'?" in said(text)


@pytest.mark.parametrize("text", ILL_TYPED)
def test_wrong_type(said, text):
    assert ILL_TYPED[text] in said(text)
    assert ", got " in said(text)


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_nothing_is_said_about_good_configs(said, text):
    assert said(text) == ""


@pytest.mark.parametrize("message", BAD_JSON)
def test_mistakes_in_a_runs_json(said, message):
    path, value = BAD_JSON[message]
    assert message in said(edited(Config(), *path, value=value))


def test_wrong_type_says_what_is_possible(tmp_path):
    config = Config(model=AxialNet())
    object.__setattr__(config.model, "stem", "big")
    with pytest.raises(UserError, match="must be one of 'imagenet', 'small', got 'big'"):
        check_types(config, "here")
    config = Config()
    object.__setattr__(config, "optimizer", "sgd")
    with pytest.raises(UserError, match=r"config\.optimizer must be SGD or Adam, got 'sgd'"):
        check_types(config, "here")


@pytest.mark.parametrize(
    "text", ["", "Config()", "config = 3", "config = Config", "cfg = Config()"]
)
def test_no_config_in_the_file(tmp_path, text):
    assert "must define `config = " in message_of(write(tmp_path, text))


def test_missing_file(tmp_path):
    assert "no such config file" in message_of(tmp_path / "none.py")
    assert "no such config file" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = Config(", "SyntaxError"),
        ("config = Confg()", "NameError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("config = Config(*range(40))", "positional"),
    ],
)
def test_python_errors_in_the_file(tmp_path, text, message):
    assert message in message_of(write(tmp_path, text))


def test_nearest_name():
    assert nearest("lables", ["labels", "shape"]) == " (did you mean 'labels'?)"
    assert nearest("xyz", ["labels", "shape"]) == " (one of: labels, shape)"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"config"', "{}"])
def test_json_that_is_no_config(text):
    with pytest.raises(UserError, match=r"^run\.json: "):
        from_json(text, "run.json")
