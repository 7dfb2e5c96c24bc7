"""What a network is: two methods are enough, and the rest has defaults."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax import explain, guided_attention, hirescam, mask_loss
from hirescam_jax.config import SGD, Config, Preprocess
from hirescam_jax.errors import UserError
from hirescam_jax.losses import allowed_of
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
from hirescam_jax.models.contract import (
    Network,
    attention_scale,
    depth_unit,
    feature_grid,
    features_of,
    has_slices,
    head_of,
    initial_variables,
    logits_of,
    training_features,
)
from hirescam_jax.runs.setup import open_layout
from hirescam_jax.training.step import (
    eval_step,
    init_state,
    make_optimizer,
    train_step,
)
from tests.devices.mesh_program import LABELS, Bare, batch_of

SHAPE = (6, 16, 16)
KINDS = (VGG, AxialNet, BodyConv, Conv3DNet, CTNet, DenseNet, MobileNetV2, ResNetClassifier)


def config_of(model, **settings) -> Config:
    plain = Preprocess(flip=0.0, rotate=0.0)
    config = Config(preprocess=plain, optimizer=SGD(), batch_size=8, **settings)
    object.__setattr__(config, "model", model)  # its type is that of the package's networks
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_the_networks_are_networks(kind):
    assert isinstance(kind(), Network)
    assert has_slices(kind()) == (kind is not CTNet)
    units = {AxialNet: 3, BodyConv: 81, Conv3DNet: 81}
    assert depth_unit(kind()) == units.get(kind)


def test_two_methods_are_enough():
    model = Bare()
    assert isinstance(model, Network)
    assert not isinstance(object(), Network)
    assert feature_grid(model, SHAPE) == (2, 4, 4)
    assert depth_unit(model) is None
    assert has_slices(model)
    volumes = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SHAPE)), jnp.float32)
    variables = initial_variables(model, jax.random.key(0), volumes)
    features = features_of(model, variables, volumes)
    assert attention_scale(model, features) == 1.0
    found = explain(model, variables, volumes)
    np.testing.assert_allclose(found.logits, logits_of(model, variables, volumes), rtol=1e-6)
    np.testing.assert_allclose(found.residual, 0, atol=1e-5)
    assert found.verdict is not None
    assert found.verdict.kind == "equal"
    attention = guided_attention(head_of(model, variables), features, model=model)
    np.testing.assert_allclose(attention, found.maps, rtol=1e-5, atol=1e-6)


def test_it_is_trained_with_the_mask_loss():
    """The step's losses and gradient are those that are written down here."""
    config = config_of(Bare(), mask_weight=0.5)
    assert open_layout(config, SHAPE).grid == (2, 4, 4)
    batch = jax.device_put(batch_of(config, SHAPE))
    optimizer = make_optimizer(config, 10)
    state = init_state(config, optimizer, SHAPE)

    def loss(params):
        variables = {"params": params}
        features = features_of(
            config.model, variables, config.preprocess.normalize(batch["volume"])
        )
        head = partial(config.model.apply, variables, method="head")
        allowed = allowed_of(batch["findings"], batch["regions"])
        labels = (batch["findings"] > 0).any(axis=-1)
        logits = head(features)
        cross_entropy = -jnp.where(labels, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))
        penalty = mask_loss(hirescam(head, features), allowed)
        return cross_entropy.mean() + 0.5 * penalty, penalty

    (wanted, penalty), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    new, metrics = jax.jit(partial(train_step, config=config, optimizer=optimizer))(state, batch)
    assert penalty > 0
    np.testing.assert_allclose(metrics["mask_loss"], penalty, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    for before, after, g in zip(
        *map(jax.tree.leaves, (state.params, new.params, gradient)), strict=True
    ):
        np.testing.assert_allclose(after, before - 1e-3 * g, rtol=1e-4, atol=1e-6)
    sums = eval_step(state.variables, {**batch, "weight": jnp.ones(8)}, config=config)
    np.testing.assert_allclose(sums["mask_loss"] / 8, penalty, rtol=1e-5)


def test_it_has_no_depth_to_split():
    with pytest.raises(
        UserError, match=r"depth_devices = 2: Bare has no `depth_unit`, .* one device: use 1"
    ):
        open_layout(config_of(Bare(), depth_devices=2), SHAPE)


def test_train_is_given_to_methods_that_take_it():
    class Told(Bare):
        def features(self, volumes, train):
            return super().features(volumes) + train

        def head(self, features, *, train):
            return super().head(features) + 10 * train

    model, volumes = Told(), jnp.zeros((1, *SHAPE))
    variables = initial_variables(model, jax.random.key(0), volumes)
    features, _ = training_features(model, variables, volumes, jax.random.key(0))
    running = features_of(model, variables, volumes)
    np.testing.assert_allclose(features, running + 1)
    difference = head_of(model, variables, jax.random.key(0))(running) - head_of(model, variables)(
        running
    )
    np.testing.assert_allclose(difference, np.full((1, LABELS), 10), rtol=1e-6)
