"""The train step against PyTorch, and the loop: resuming, stopping, checkpoints, bad runs."""

import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from tensorboardX.proto import event_pb2

from hirescam_jax.config import SGD, Adam, Config, Preprocess
from hirescam_jax.data.specs import StoreData
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet, Conv3DNet
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.runs import setup
from hirescam_jax.runs.run import Header, load_run
from hirescam_jax.training import loop as train_module
from hirescam_jax.training.augment import augment
from hirescam_jax.training.loop import train
from hirescam_jax.training.step import eval_step, init_state, make_optimizer, train_step

SHAPE, GRID = (6, 8, 8), (2, 4, 4)
K, R = 3, 2
MODEL = AxialNet(
    num_labels=K,
    blocks=(1,),
    widths=(4,),
    stem="small",
    conv_widths=(3,),
    conv_padding="SAME",
)


class Cases:
    """Noise in which some findings can be seen, in memory."""

    labels, regions = ("a", "b", "c"), ("left", "right")
    shape, spacing_mm = SHAPE, (2.0, 1.0, 1.0)

    def __init__(self, size: int, seed: int = 0, shift: float = 0.0):
        rng = np.random.default_rng(seed)
        self.findings = (rng.random((size, K, R)) < 0.3).astype(np.uint8)
        self.masks = (rng.random((size, R, *GRID)) < 0.5).astype(np.uint8)
        self.volumes = rng.normal(scale=200, size=(size, *SHAPE)) - 400 + shift
        self.volumes += 300 * self.findings.any(axis=2).sum(axis=1)[:, None, None, None]

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index):
        return {
            "volume": self.volumes[index].astype(np.int16),
            "findings": self.findings[index],
            "regions": self.masks[index],
            "index": np.int32(index),
        }


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Most trainings here are the same program: it is compiled once."""
    from jax.experimental.compilation_cache import compilation_cache as cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()


def config_of(**changes) -> Config:
    base = Config(
        model=MODEL,
        preprocess=Preprocess(),
        optimizer=SGD(learning_rate=0.01, momentum=0.9, weight_decay=1e-3),
        batch_size=2,
        epochs=3,
    )
    return dataclasses.replace(base, **changes)


def batch_of(count: int = 2) -> dict:
    items = [Cases(count)[i] for i in range(count)]
    return {name: jnp.asarray(np.stack([item[name] for item in items])) for name in items[0]}


PLAIN_DESCENT = SGD(learning_rate=1.0, momentum=0.0, weight_decay=0.0)


def compiled_step(config: Config, optimizer):
    return jax.jit(partial(train_step, config=config, optimizer=optimizer), donate_argnums=0)


def losses_of(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "split", "loss", "class_loss", "mask_loss")
    return [tuple(line[name] for name in names) for line in lines]


# -- one step -------------------------------------------------------------------------------------


def torch_losses(torch, params, batch_stats, images, labels, allowed, pool):
    """The whole loss in float64, from the definitions; the maps from the weights themselves."""

    def tensor(x):
        return torch.tensor(np.asarray(x, np.float64), requires_grad=True)

    p = jax.tree.map(tensor, params)
    functional = torch.nn.functional

    def convolve(x, layer, stride=1):
        kernel = layer["kernel"].permute(3, 2, 0, 1)
        return functional.conv2d(x, kernel, layer.get("bias"), stride, kernel.shape[-1] // 2)

    def norm(x, layer):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * layer["scale"][:, None, None] + layer["bias"][:, None, None]

    batch, slices = images.shape[:2]
    net, block = p["resnet"], p["resnet"]["layer1_0"]
    x = torch.tensor(images).flatten(0, 1)
    x = norm(convolve(x, net["conv1"], 2), net["bn1"]).relu()
    y = norm(convolve(x, block["conv1"]), block["bn1"]).relu()
    x = (x + norm(convolve(y, block["conv2"]), block["bn2"])).relu()
    x = convolve(x, p["convs_0"]).relu()
    features = x.permute(0, 2, 3, 1).reshape(batch, slices, *x.shape[2:], -1)

    scores = features.flatten(2) @ p["fc"]["kernel"] + p["fc"]["bias"]
    weights = p["fc"]["kernel"].reshape(*features.shape[2:], K)
    attention = torch.einsum("bshwc,hwck->bkshw", features, weights)
    if pool == "max":
        logits, winner = scores.max(1)
        chosen = functional.one_hot(winner, slices).double()[..., None, None]  # [B, K, S, 1, 1]
        attention = attention * chosen
    else:
        logits = scores.mean(1)
    class_loss = functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels))
    per_volume = []
    for b in range(batch):
        cells = attention[b][torch.tensor(~allowed[b])]
        per_volume.append(functional.softplus(cells).mean())
    return p, class_loss, torch.stack(per_volume).mean()


@pytest.mark.parametrize(("mask_weight", "pool"), [(0.0, "mean"), (1 / 3, "mean"), (1 / 3, "max")])
def test_step_is_the_definition_in_torch(mask_weight, pool):
    torch = pytest.importorskip("torch")
    config = config_of(
        mask_weight=mask_weight,
        model=MODEL.clone(pool=pool),
        preprocess=Preprocess(flip=0.0, rotate=0.0),
        optimizer=PLAIN_DESCENT,
    )
    optimizer = make_optimizer(config, 10)
    state = jax.jit(partial(init_state, config, optimizer, SHAPE))()
    params, stats = jax.device_get((state.params, state.batch_stats))
    batch = batch_of()
    new_state, metrics = compiled_step(config, optimizer)(state, batch)

    volume = np.clip(np.asarray(batch["volume"], np.float64), -1000, 800)
    images = ((volume + 1000) / 1800 - 0.449).reshape(2, 2, 3, 8, 8)
    findings, regions = (np.asarray(batch[n]).astype(bool) for n in ("findings", "regions"))
    allowed = np.zeros((2, K, *GRID), bool)
    for b, k, r in np.argwhere(findings):
        allowed[b, k] |= regions[b, r]
    p, class_loss, attention_loss = torch_losses(
        torch, params, stats, images, findings.any(2).astype(np.float64), allowed, pool
    )
    loss = class_loss + mask_weight * attention_loss
    loss.backward()

    np.testing.assert_allclose(metrics["class_loss"], class_loss.item(), rtol=1e-5)
    expected_mask_loss = attention_loss.item() if mask_weight else 0
    np.testing.assert_allclose(metrics["mask_loss"], expected_mask_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    gradients = jax.tree.map(lambda x: x.grad.numpy(), p)
    norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)

    # Plain gradient descent with rate 1: the change of the weights is the gradient.
    def compare(path, before, after, gradient):
        np.testing.assert_allclose(
            before - after, gradient, rtol=2e-3, atol=2e-5 * norm, err_msg=str(path)
        )

    jax.tree_util.tree_map_with_path(compare, params, jax.device_get(new_state.params), gradients)
    assert int(new_state.step) == 1
    changed = jax.tree.map(
        lambda a, b: bool((a != np.asarray(b)).all()), stats, new_state.batch_stats
    )
    assert all(jax.tree.leaves(changed))


def test_step_is_one_program_that_reuses_its_state():
    config = config_of()
    optimizer = make_optimizer(config, 10)
    state = jax.jit(partial(init_state, config, optimizer, SHAPE))()
    traces = []

    def counted(state, batch):
        traces.append(1)
        return train_step(state, batch, config=config, optimizer=optimizer)

    step = jax.jit(counted, donate_argnums=0)
    for _ in range(3):
        before = state
        state, _ = step(state, batch_of())
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert len(traces) == 1
    assert int(state.step) == 3


def test_step_augments_volume_and_masks_by_seed_step_and_index():
    """A step on augmented data is a step without augmentation on data augmented beforehand."""
    config = config_of(preprocess=Preprocess(flip=1.0, rotate=1.0), optimizer=PLAIN_DESCENT)
    plain = dataclasses.replace(config, preprocess=Preprocess(flip=0.0, rotate=0.0))
    optimizer = make_optimizer(config, 10)
    state = jax.jit(partial(init_state, config, optimizer, SHAPE))()
    state = dataclasses.replace(state, step=jnp.asarray(7, jnp.int32))
    batch = batch_of()
    key = jax.random.fold_in(jax.random.key(config.seed), 7)
    keys = jnp.stack([jax.random.fold_in(key, int(i)) for i in batch["index"]])
    volume, regions = augment(config.preprocess, keys, batch["volume"], batch["regions"])
    assert (volume != batch["volume"]).any()
    moved = {**batch, "volume": volume, "regions": regions}
    copy = jax.tree.map(jnp.copy, state)
    _, metrics = compiled_step(config, optimizer)(state, batch)
    _, expected = compiled_step(plain, optimizer)(copy, moved)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_eval_step_sums_over_real_examples():
    config = config_of()
    optimizer = make_optimizer(config, 10)
    state = jax.jit(partial(init_state, config, optimizer, SHAPE))()
    step = jax.jit(partial(eval_step, config=config))

    def run(rows, weight):
        batch = {name: value[jnp.asarray(rows)] for name, value in batch_of(3).items()}
        sums = step(state.variables, {**batch, "weight": jnp.asarray(weight, jnp.float32)})
        return {name: float(value) for name, value in sums.items()}

    each = [run([i, 0], [1, 0]) for i in range(3)]
    both, padded = run([1, 2], [1, 1]), run([1, 0], [1, 0])
    for name in ("loss", "class_loss", "mask_loss"):
        assert both[name] == pytest.approx(each[1][name] + each[2][name], rel=1e-5)
        assert padded[name] == pytest.approx(each[1][name], rel=1e-6)
    assert both["loss"] == pytest.approx(both["class_loss"] + both["mask_loss"] / 3, rel=1e-5)


def test_sgd_is_torchs():
    torch = pytest.importorskip("torch")
    config = Config()
    assert config.optimizer == SGD()
    optimizer = make_optimizer(config, 100)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        weights = jnp.asarray(rng.normal(size=(4, 3)))
        leaf = torch.tensor(np.asarray(weights), requires_grad=True)
        reference = torch.optim.SGD([leaf], lr=1e-3, momentum=0.99, weight_decay=1e-7)
        state = optimizer.init(weights)
        for _ in range(3):
            gradient = rng.normal(size=(4, 3))
            updates, state = optimizer.update(jnp.asarray(gradient), state, weights)
            weights = optax.apply_updates(weights, updates)
            leaf.grad = torch.tensor(gradient)
            reference.step()
            np.testing.assert_allclose(weights, leaf.detach(), rtol=1e-12)


def test_adam_warms_up_and_decays_to_zero():
    config = config_of(optimizer=Adam(learning_rate=0.5, weight_decay=0.0))
    optimizer = make_optimizer(config, 40)
    weights = jnp.zeros(1)
    state = optimizer.init(weights)
    sizes = []
    for _ in range(41):
        updates, state = optimizer.update(jnp.ones(1), state, weights)
        sizes.append(-float(updates[0]))  # of a constant gradient: the learning rate itself
    np.testing.assert_allclose(sizes[:5], [0, 0.125, 0.25, 0.375, 0.5], atol=1e-5)
    cosine = [0.25 * (1 + math.cos(math.pi * i / 36)) for i in range(37)]
    np.testing.assert_allclose(sizes[4:], cosine, atol=1e-4)


def test_feature_grid():
    assert feature_grid(MODEL, SHAPE) == GRID
    assert feature_grid(AxialNet(), (405, 420, 420)) == (135, 6, 6)
    with pytest.raises(UserError, match=r"config\.model does not fit volumes of \(7, 8, 8\)"):
        feature_grid(MODEL, (7, 8, 8))
    with pytest.raises(UserError, match=r"config\.model .* volumes of \(48, 64, 64\)"):
        feature_grid(Conv3DNet(), (48, 64, 64))


# -- the loop -------------------------------------------------------------------------------------


def run_training(config: Config, run: Path, size: int = 5, shift: float = 0.0, **options):
    return train(config, run, sources=(Cases(size), Cases(3, seed=1, shift=shift)), **options)


def events_of(path: Path) -> list:
    """The records of a TensorBoard file: length, its checksum, data, its checksum."""
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run_training(config_of(), run)


@pytest.mark.slow
def test_interrupted_training_continues_exactly(trained, tmp_path):
    """Two steps an epoch of five volumes: the order of the data runs across the epochs' ends."""
    run = tmp_path / "run"
    run_training(config_of(epochs=1), run)
    with (run / "metrics.jsonl").open("a") as file:  # what a killed epoch leaves behind
        file.write('{"step": 2, "split": "train", "loss": 0.1}\n{"step": 3, "spl')
    resumed = run_training(config_of(), run, resume=True)
    assert losses_of(run) == losses_of(trained.path)
    assert len(losses_of(run)) == 3 * (2 + 1)
    latest = [load_run(path, "latest") for path in (run, trained.path)]
    assert latest[0].step == latest[1].step == 6
    jax.tree.map(np.testing.assert_array_equal, *(r.variables for r in latest))
    assert resumed.step == trained.step


def test_run_folder_holds_all(trained):
    assert sorted(p.name for p in trained.path.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "tensorboard",
    ]
    assert (trained.labels, trained.shape, trained.spacing_mm) == (
        Cases.labels,
        SHAPE,
        (2.0, 1.0, 1.0),
    )
    assert trained.config == config_of()
    lines = losses_of(trained.path)
    assert [line[:2] for line in lines] == [
        (0, "train"),
        (1, "train"),
        (1, "val"),
        (2, "train"),
        (3, "train"),
        (3, "val"),
        (4, "train"),
        (5, "train"),
        (5, "val"),
    ]
    for _, _, loss, class_loss, mask_loss in lines:
        assert loss == pytest.approx(class_loss + mask_loss / 3, rel=1e-5)
    (board,) = (trained.path / "tensorboard").iterdir()
    assert [(step, split, loss) for step, split, loss, *_ in lines] == [
        (event.step, value.tag.split("/")[0], pytest.approx(value.simple_value))
        for event in events_of(board)
        for value in event.summary.value
        if value.tag.endswith("/loss")
    ]


def test_run_predicts_what_its_validation_saw(trained):
    """The losses in the log come back from the checkpoint."""
    for which in ("best", "latest"):
        run = load_run(trained.path, which)
        batch = [Cases(3, seed=1)[i] for i in range(3)]
        batch = {name: np.stack([item[name] for item in batch]) for name in batch[0]}
        batch["weight"] = np.ones(3, np.float32)
        sums = jax.jit(partial(eval_step, config=run.config))(run.variables, batch)
        logged = {step + 1: loss for step, split, loss, *_ in losses_of(run.path) if split == "val"}
        assert float(sums["loss"]) / 3 == pytest.approx(logged[run.step], rel=1e-5)


@pytest.mark.slow
def test_latest_and_best_are_kept_and_a_stale_training_stops(tmp_path):
    """Validation volumes of another kind: with a high rate the first epochs are the best."""
    config = config_of(
        optimizer=SGD(learning_rate=0.3, momentum=0.9, weight_decay=0.0), epochs=30, patience=2
    )
    best = run_training(config, tmp_path / "run", size=2, shift=600.0)
    validation = [line[2] for line in losses_of(tmp_path / "run") if line[1] == "val"]
    assert len(validation) < 30
    lowest = int(np.argmin(validation))
    assert len(validation) == lowest + 1 + 2
    assert best.step == lowest + 1
    latest = load_run(tmp_path / "run", "latest")
    assert latest.step == len(validation)
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())
    assert kept == [best.step, latest.step - 1, latest.step]
    before = losses_of(tmp_path / "run")
    again = run_training(config, tmp_path / "run", size=2, shift=600.0, resume=True)
    assert losses_of(tmp_path / "run") == before
    assert again.step == best.step


@pytest.mark.slow
def test_divergence_stops_the_training_and_keeps_the_last_checkpoint(trained, tmp_path):
    run = tmp_path / "run"
    good = run_training(config_of(epochs=1), run)
    header = json.loads((run / "run.json").read_text())
    header["config"]["optimizer"]["learning_rate"] = 1e30
    (run / "run.json").write_text(json.dumps(header))
    wild = config_of(optimizer=SGD(learning_rate=1e30, momentum=0.9, weight_decay=1e-3))
    with pytest.raises(UserError, match=r"loss .*is (nan|inf).*config\.optimizer\.learning_rate"):
        run_training(wild, run, resume=True)
    kept = load_run(run, "latest")
    assert kept.step == good.step
    jax.tree.map(np.testing.assert_array_equal, kept.variables, good.variables)


def test_a_validation_that_is_not_finite_keeps_the_checkpoint_before(
    monkeypatch, trained, tmp_path
):
    run = tmp_path / "run"
    run_training(config_of(epochs=1), run)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "validate", lambda *_: {"loss": math.nan})
        with pytest.raises(
            UserError, match=r"validation loss is nan.*config\.optimizer\.learning_rate"
        ):
            run_training(config_of(), run, resume=True)
    assert load_run(run, "latest").step == 2
    (aside,) = run.glob("diverged-4-*")
    assert (aside / "variables").is_dir()
    run_training(config_of(), run, resume=True)
    assert losses_of(run) == losses_of(trained.path)


@pytest.fixture
def small_disk():
    """A file system of 4 MiB; only root may make one."""
    folder = Path(tempfile.mkdtemp())  # pytest cannot clear its folders if a mount is left there
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.mark.slow
# What the threads of Orbax leave behind that could not write.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("left", [0, pytest.param(40960, marks=pytest.mark.long)])
def test_a_disk_that_fills_keeps_the_last_checkpoint(trained, small_disk, left):
    """Whichever file is the first that cannot be written: the log, or one of a checkpoint."""
    what = r"(metrics\.jsonl|a checkpoint)"
    run, filler = small_disk / "run", small_disk / "filler"
    good = run_training(config_of(epochs=1), run)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    with pytest.raises(UserError, match=rf"{what}.*No space left on device\).* --resume"):
        run_training(config_of(), run, resume=True)
    kept = load_run(run, "latest")
    assert kept.step == good.step
    jax.tree.map(np.testing.assert_array_equal, kept.variables, good.variables)
    filler.unlink()
    run_training(config_of(), run, resume=True)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_run(run, "latest").variables,
        load_run(trained.path, "latest").variables,
    )


# -- bad runs -------------------------------------------------------------------------------------


def test_run_folder_that_exists(trained):
    before = losses_of(trained.path)
    with pytest.raises(UserError, match=r"exists; choose another folder, or --resume"):
        run_training(config_of(), trained.path)
    assert losses_of(trained.path) == before


def test_resuming_nothing(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        run_training(config_of(), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch_size": 1}, "batch_size"),
        ({"mask_weight": 0.0}, "mask_weight"),
        ({"seed": 1}, "seed"),
        ({"optimizer": Adam()}, "optimizer"),
        ({"model": MODEL.clone(widths=(5,))}, "model"),
        ({"preprocess": Preprocess(flip=0.0)}, "preprocess"),
    ],
)
def test_resuming_with_another_config(trained, changes, field):
    with pytest.raises(UserError, match=rf"was started with config\.{field} = "):
        run_training(config_of(**changes), trained.path, resume=True)


def test_resuming_with_other_data(trained):
    class Others(Cases):
        labels = ("a", "b", "d")

    with pytest.raises(UserError, match=r"trained with labels .* resume with the same data"):
        train(config_of(), trained.path, resume=True, sources=(Others(5), Others(3)))


class Hashed(Cases):
    """Cases that tell what they hold, as a store does."""

    @property
    def digest(self):
        return hashlib.sha256(self.volumes.tobytes()).hexdigest()


def test_resuming_with_other_volumes_and_from_another_place(tmp_path):
    run, runs = tmp_path / "run", []

    def go(path: str, training: Cases, epochs: int, **options):
        config = config_of(data=StoreData(path), epochs=epochs)
        runs.append(train(config, run, sources=(training, Hashed(3, seed=1)), **options))

    go("first", Hashed(5), 1)
    with pytest.raises(UserError, match=r"started with other volumes .* split 'train' .*'second'"):
        go("second", Hashed(6), 2, resume=True)
    go("second", Hashed(5), 2, resume=True)
    assert runs[-1].config.data == StoreData("second")
    config = config_of(data=StoreData("second", "area"))
    with pytest.raises(UserError, match=r"started with config\.data = .*mask_method='nearest'"):
        train(config, run, sources=(Hashed(5), Hashed(3, seed=1)), resume=True)
    # A run of an older version is not known to have the same data elsewhere.
    header = json.loads((run / "run.json").read_text())
    digests = header.pop("digests")
    assert digests == {"train": Hashed(5).digest, "val": Hashed(3, seed=1).digest}
    (run / "run.json").write_text(json.dumps(header))
    assert load_run(run).header.digests == {}
    with pytest.raises(UserError, match=r"started with config\.data = "):
        go("third", Hashed(5), 3, resume=True)
    go("second", Hashed(5), 3, resume=True)
    assert load_run(run, "latest").step == 6
    assert load_run(run).header.digests == digests


def test_facts_tell_what_the_volumes_hold():
    headers = [Header.of(config_of(), Hashed(5, seed=seed)) for seed in (0, 0, 1)]
    facts = [header.facts(training=5) for header in headers]
    assert facts[0] == facts[1]
    differing = {name for name in facts[0] if facts[0][name] != facts[2][name]}
    assert differing == {"content of the volumes"}


def test_more_volumes_in_a_batch_than_there_are(tmp_path):
    with pytest.raises(UserError, match="exceeds the 2 training volumes"):
        run_training(config_of(batch_size=4), tmp_path / "run", size=2)
    assert not (tmp_path / "run").exists()


def copy_of(run: Path, folder: Path, edit) -> Path:
    """The same run with an edited header; the checkpoints are those of the original."""
    folder.mkdir()
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    header = json.loads((run / "run.json").read_text())
    edit(header)
    (folder / "run.json").write_text(json.dumps(header))
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"widths": [5]}, {"conv_widths": [3, 3]}, {"conv_widths": []}, {"num_labels": 4}],
    ids=str,
)
def test_checkpoint_of_another_model(trained, tmp_path, changes):
    run = copy_of(trained.path, tmp_path / "run", lambda h: h["config"]["model"].update(changes))
    with pytest.raises(UserError, match=r"is of another model than run\.json describes") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_run_of_an_unknown_format(trained, tmp_path):
    run = copy_of(trained.path, tmp_path / "run", lambda header: header.update(format=9))
    with pytest.raises(UserError, match=r"run\.json: format 9, this version reads 1"):
        load_run(run)


@pytest.mark.parametrize("missing", ["format", "config", "labels", "shape", "spacing_mm"])
def test_run_with_a_field_missing(trained, tmp_path, missing):
    run = copy_of(trained.path, tmp_path / "run", lambda header: header.pop(missing))
    with pytest.raises(UserError, match=rf"run\.json: .*{missing}"):
        load_run(run)


def test_run_with_a_damaged_header(trained, tmp_path):
    run = copy_of(trained.path, tmp_path / "run", lambda header: None)
    (run / "run.json").write_text((run / "run.json").read_text()[:-20])
    with pytest.raises(UserError, match=r"run\.json: not readable as JSON"):
        load_run(run)


def test_run_without_checkpoints(trained, tmp_path):
    run = copy_of(trained.path, tmp_path / "run", lambda header: None)
    (run / "checkpoints").unlink()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(run)
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(run)


def test_header_there_and_back(tmp_path):
    header = Header.of(config_of(), Cases(1))
    (tmp_path / "run.json").write_text(header.to_json())
    assert Header.read(tmp_path) == header


# -- several devices ------------------------------------------------------------------------------


def test_batch_that_does_not_divide_over_the_devices(monkeypatch, tmp_path):
    fake = Mesh(np.array([[None]] * 3), ("data", "depth"))
    monkeypatch.setattr(setup, "make_mesh", lambda depth: fake)
    with pytest.raises(UserError, match="batch_size = 2 does not divide over 3 devices"):
        run_training(config_of(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
