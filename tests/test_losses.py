"""The losses: closed forms, PyTorch's, and explicit loops."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.losses import allowed_of, classification_loss, labels_of, mask_loss

GRIDS = [(7,), (5, 4), (4, 3, 2)]


def test_classification_loss_closed_forms():
    zeros, labels = jnp.zeros((2, 3)), jnp.asarray([[0, 1, 0], [1, 1, 0]])
    np.testing.assert_allclose(classification_loss(zeros, labels), math.log(2), rtol=1e-6)
    logits, one = jnp.asarray([[2.0]]), jnp.asarray([[True]])
    np.testing.assert_allclose(classification_loss(logits, one), math.log1p(math.exp(-2)), 1e-6)
    np.testing.assert_allclose(classification_loss(logits, ~one), math.log1p(math.exp(2)), 1e-6)
    # No overflow at scores whose exponential has none.
    np.testing.assert_allclose(classification_loss(logits * 500, ~one), 1000, rtol=1e-6)
    np.testing.assert_allclose(classification_loss(logits * 500, one), 0, atol=1e-12)


def test_classification_loss_of_known_labels():
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(4, 3))), rng.random((4, 3)) < 0.5
    known = rng.random((4, 3)) < 0.6
    found = classification_loss(logits, jnp.asarray(labels), jnp.asarray(known))
    sign = np.where(labels, 1, -1)
    expected = np.log1p(np.exp(-sign * np.asarray(logits)))[known].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    none = jnp.zeros((4, 3), bool)
    gradient = jax.grad(classification_loss)(logits, jnp.asarray(labels), none)
    np.testing.assert_array_equal(gradient, 0)


def test_classification_loss_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(scale=4, size=(5, 7)), rng.integers(2, size=(5, 7))
    leaf = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.BCEWithLogitsLoss()(leaf, torch.tensor(labels, dtype=torch.float64))
    expected.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(classification_loss)(
            jnp.asarray(logits), jnp.asarray(labels)
        )
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-10, atol=1e-14)


def test_mask_loss_closed_forms():
    shape = (1, 1, 2, 2)
    nothing, everything = jnp.zeros(shape, bool), jnp.ones(shape, bool)
    np.testing.assert_allclose(mask_loss(jnp.zeros(shape), nothing), math.log(2), rtol=1e-6)
    assert mask_loss(jnp.full(shape, 9.0), everything) == 0
    attention = jnp.asarray([[[[1.0, -3.0], [2.0, 50.0]]]])
    allowed = jnp.asarray([[[[0, 0], [1, 1]]]])  # what is allowed may be as large as it likes
    expected = (math.log1p(math.e) + math.log1p(math.exp(-3))) / 2
    np.testing.assert_allclose(mask_loss(attention, allowed), expected, rtol=1e-6)
    np.testing.assert_allclose(mask_loss(attention * 1000, nothing), 53_000 / 4, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_mask_loss_is_torchs_cross_entropy_of_the_forbidden_cells(grid):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    attention = rng.normal(scale=3, size=(4, 3, *grid))
    allowed = rng.random(attention.shape) < np.array([0.1, 0.5, 0.9, 0]).reshape(
        -1, 1, *[1] * len(grid)
    )
    leaf = torch.tensor(attention, requires_grad=True)
    losses = []
    for b in range(4):
        cells = leaf[b][torch.tensor(~allowed[b])]
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(cells, cells * 0))
    expected = torch.stack(losses).mean()
    expected.backward()
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(mask_loss))(
            jnp.asarray(attention), jnp.asarray(allowed)
        )
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-10, atol=1e-15)


def test_gradient_of_mask_loss_is_on_forbidden_cells_only():
    rng = np.random.default_rng(2)
    attention = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    allowed = jnp.asarray(rng.random((2, 3, 4, 5)) < 0.5)
    gradient = np.asarray(jax.grad(mask_loss)(attention, allowed))
    assert (gradient[np.asarray(allowed)] == 0).all()
    assert (gradient[~np.asarray(allowed)] > 0).all()


def test_example_without_forbidden_cells_counts_zero():
    attention = jnp.asarray([[[1.0, 2.0]], [[3.0, 4.0]]])
    allowed = jnp.asarray([[[1, 1]], [[0, 0]]])
    alone = mask_loss(attention[1:], allowed[1:])
    assert alone > 3
    np.testing.assert_allclose(mask_loss(attention, allowed), alone / 2, rtol=1e-6)
    gradient = jax.grad(mask_loss)(attention, allowed)
    assert np.isfinite(gradient).all()
    assert not gradient[0].any()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_mask_loss_takes_masks_of_any_dtype(dtype):
    rng = np.random.default_rng(3)
    attention = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    allowed = rng.random((2, 3, 4)) < 0.5
    expected = np.mean([np.log1p(np.exp(attention[b][~allowed[b]])).mean() for b in range(2)])
    np.testing.assert_allclose(
        mask_loss(attention, jnp.asarray(allowed.astype(dtype))), expected, rtol=1e-6
    )


def test_mask_loss_refuses_shapes_that_differ():
    for shape in ((2, 3, 4, 1), (1, 3, 4, 5), (2, 3, 4)):
        with pytest.raises(ValueError, match="must agree"):
            mask_loss(jnp.zeros((2, 3, 4, 5)), jnp.zeros(shape, bool))


def findings_and_regions(grid: tuple[int, ...]):
    rng = np.random.default_rng(4)
    findings = (rng.random((3, 5, 4)) < 0.3).astype(np.uint8)
    findings[0, 2] = 0  # a label that is absent
    regions = (rng.random((3, 4, *grid)) < 0.4).astype(np.uint8)
    return findings, regions


def test_labels_of_by_loop():
    findings, _ = findings_and_regions((2,))
    labels = np.asarray(labels_of(jnp.asarray(findings)))
    assert labels.dtype == bool
    for b, k in np.ndindex(labels.shape):
        assert labels[b, k] == any(findings[b, k, r] for r in range(4))


@pytest.mark.parametrize("grid", GRIDS)
def test_allowed_of_by_loop(grid):
    findings, regions = findings_and_regions(grid)
    allowed = np.asarray(jax.jit(allowed_of)(jnp.asarray(findings), jnp.asarray(regions)))
    assert (allowed.shape, allowed.dtype) == ((3, 5, *grid), bool)
    for b, k, *cell in itertools.product(*map(range, allowed.shape)):
        expected = any(findings[b, k, r] and regions[(b, r, *cell)] for r in range(4))
        assert allowed[(b, k, *cell)] == expected
    assert not allowed[0, 2].any()
    assert allowed.any()


def test_allowed_of_does_not_lose_overlaps_in_many_regions():
    """A union must not overflow or wrap where a label was found in all of 300 regions."""
    findings, regions = np.ones((1, 1, 300), np.uint8), np.ones((1, 300, 2), np.uint8)
    regions[0, :, 1] = 0
    np.testing.assert_array_equal(
        allowed_of(jnp.asarray(findings), jnp.asarray(regions)), [[[True, False]]]
    )
