"""A step of training is PyTorch's: losses, parameters, BatchNorm's statistics."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.config import SGD, Config, Preprocess
from hirescam_jax.explanations.cam import hirescam
from hirescam_jax.losses import classification_loss, mask_loss
from hirescam_jax.models import AxialNet, CTNet
from hirescam_jax.models.contract import feature_grid
from hirescam_jax.training.step import TrainState, make_optimizer, train_step
from hirescam_jax.weights.pytorch import from_torch

torch = pytest.importorskip("torch")

from tests.weights.torch_models import (  # noqa: E402  (needs torch)
    FAST,
    IMAGE_NETS,
    import_torchvision,
    paper_net,
    randomise,
    torch_model,
    torchvision_features,
    torchvision_net,
)

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


def torch_step(net, model, optimizer, batch, mask_weight):
    """The loss and one update, written from the paper's formulas."""
    settings = STEP.preprocess
    volume = torch.tensor(batch["volume"]).double().clamp(settings.hu_min, settings.hu_max)
    volume = (volume - settings.hu_min) / (settings.hu_max - settings.hu_min) - settings.mean
    findings = torch.tensor(batch["findings"]).bool()
    regions = torch.tensor(batch["regions"]).bool()
    features, logits = net(volume)
    labels = findings.any(-1).double()
    if not mask_weight:
        return torch_update(optimizer, logits, labels, logits.new_zeros(()), 0.0)
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
    return torch_update(optimizer, logits, labels, torch_penalty(attention, forbidden), mask_weight)


def torch_penalty(attention, forbidden):
    parts = zip(attention, forbidden, strict=True)
    return torch.stack([torch.nn.functional.softplus(a[f]).mean() for a, f in parts]).mean()


def torch_update(optimizer, logits, labels, penalty, mask_weight):
    class_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    loss = class_loss + mask_weight * penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "class_loss": class_loss.item(), "mask_loss": penalty.item()}


def long(*cases):
    """The same cases, marked."""
    return [
        pytest.param(*([case] if isinstance(case, str) else case), marks=pytest.mark.long)
        for case in cases
    ]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("axialnet", 2),
        ("conv3d", 1),
        *long(
            ("axialnet", 1),
            ("axialnet-max", 1),
            ("axialnet-max", 2),
            ("axialnet-dense", 2),  # with bottlenecks
            ("axialnet-bottleneck", 2),
            ("bodyconv", 1),
            ("bodyconv", 2),
            ("conv3d", 2),
            ("ctnet", 1),
            ("ctnet", 2),
        ),
    ],
)
def test_a_step_of_training_is_pytorchs(name, size):
    """Losses, parameters and BatchNorm's statistics after one step with the mask loss, and after a
    second one, in which momentum counts."""
    model, net, shape = paper_net(name)
    net = torch_model(model, feature_grid(model, shape), shape).double().train()
    net.load_state_dict(paper_net(name)[1].state_dict())
    # CTNet's features have no slices on which a mask could lie.
    mask_weight = 0.0 if isinstance(model, CTNet) else STEP.mask_weight
    config = dataclasses.replace(STEP, model=model, mask_weight=mask_weight)
    optimizer, torch_optimizer = optimizers(net)
    start = from_torch(model, net.state_dict(), shape)
    state = state_of(start, optimizer)
    program = partial(train_step, config=config, optimizer=optimizer)
    step = jax.jit(program, compiler_options=FAST)
    batch = batch_of(shape, feature_grid(model, shape), size)
    for _ in range(2):
        state, metrics = step(state, batch)
        for loss, value in torch_step(net, model, torch_optimizer, batch, mask_weight).items():
            assert float(metrics[loss]) == pytest.approx(value, rel=1e-4)
        assert_same_step(state, from_torch(model, net.state_dict(), shape), start)


@pytest.mark.parametrize("name", ["resnet-basic", *long("mobilenet", "resnet-bottleneck")])
def test_a_step_of_an_image_network_is_torchvisions(name):
    """The same for images: classes, and a mask of each that its attention may not leave."""
    import_torchvision()
    (model, shape), net = IMAGE_NETS[name], torchvision_net(name)
    if name == "mobilenet":
        model, net.classifier[0].p = model.clone(dropout=0.0), 0.0
        last = net.classifier[1]
    else:  # two of its four stages: quick, and a second step still far from where rounding tells
        model, shape = model.clone(blocks=(1, 1), widths=(64, 128)), (32, 48)
        net.layer3 = net.layer4 = torch.nn.Identity()
        net.fc = last = torch.nn.Linear(net.layer2[0].bn1.num_features * net.layer2[0].expansion, 5)
    net = randomise(net).double().train()
    torch_features = torchvision_features(name, net)
    optimizer, torch_optimizer = optimizers(net)
    start = from_torch(model, net.state_dict(), shape)
    state = state_of(start, optimizer)

    def loss_of(params, batch_stats, images, labels, allowed):
        variables = {"params": params, "batch_stats": batch_stats}
        features, updates = model.apply(
            variables, images, True, method="features", mutable=["batch_stats"]
        )
        head = partial(model.apply, variables, method="head")
        maps = hirescam(head, features) * model.attention_scale(features.shape[1:-1])
        class_loss = classification_loss(head(features), labels)
        loss = class_loss + STEP.mask_weight * mask_loss(maps, allowed)
        return loss, updates["batch_stats"]

    @partial(jax.jit, compiler_options=FAST)
    def step(state, *batch):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), grads = gradient(state.params, state.batch_stats, *batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), loss

    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(3, *shape, 3)), rng.random((3, 5)) < 0.5
    x = torch.tensor(images).permute(0, 3, 1, 2)
    grid = torch_features.eval()(x).shape[2:]
    torch_features.train()
    allowed = rng.random((3, 5, *grid)) < 0.4
    for _ in range(2):
        state, loss = step(state, np.float32(images), labels, allowed)
        features = torch_features(x)
        logits = last(features.mean((2, 3)))
        attention = torch.einsum("kc,bchw->bkhw", last.weight, features)
        penalty = torch_penalty(attention, torch.tensor(~allowed))
        wanted = torch_update(
            torch_optimizer, logits, torch.tensor(labels).double(), penalty, STEP.mask_weight
        )
        assert float(loss) == pytest.approx(wanted["loss"], rel=1e-4)
        assert_same_step(state, from_torch(model, net.state_dict(), shape), start)


def optimizers(net):
    """Ours and PyTorch's, of the same settings."""
    settings = STEP.optimizer
    of_torch = torch.optim.SGD(
        net.parameters(),
        settings.learning_rate,
        settings.momentum,
        weight_decay=settings.weight_decay,
    )
    return make_optimizer(STEP, 10), of_torch


def state_of(variables, optimizer):
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


def assert_same_step(state, wanted, start):
    found = {k: v for k, v in state.variables.items() if v}
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
