"""Attributions of whole models: against captum, and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.explanations.cam import gradcam, hirescam
from hirescam_jax.explanations.inputs import (
    gradient_x_input,
    input_gradient,
    integrated_gradients,
    occlusion,
    smoothgrad,
)

GRID, BATCH, CHANNELS, LABELS = (4, 5, 3), 2, 2, 3
WINDOW, STRIDE = (2, 3, 2), (1, 2, 2)  # along the third axis the last window reaches over the edge


def weights_of() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = int(np.prod(GRID)) * CHANNELS
    shapes = {"w1": (inputs, 6), "b1": (6,), "w": (6, LABELS), "b": (LABELS,)}
    return {key: rng.normal(size=shape) / np.sqrt(shape[0]) for key, shape in shapes.items()}


def model_of(weights, x):
    """[B, *grid, C] -> [B, K], for JAX's arrays and PyTorch's."""
    x = x.reshape(x.shape[0], -1) @ weights["w1"] + weights["b1"]
    x = jnp.tanh(x) if isinstance(x, jax.Array) else x.tanh()
    return x @ weights["w"] + weights["b"]


WEIGHTS = weights_of()
INPUTS = np.random.default_rng(1).normal(size=(BATCH, *GRID, CHANNELS))
BASELINE = np.random.default_rng(2).normal(size=(1, *GRID, CHANNELS))


def model(x):
    return model_of({key: jnp.asarray(value, x.dtype) for key, value in WEIGHTS.items()}, x)


def fixed_noise(key, samples: int) -> np.ndarray:
    keys = jax.random.split(key, samples)
    return np.stack([jax.random.normal(k, INPUTS.shape, jnp.float64) for k in keys])


METHODS = {
    "gradient": input_gradient,
    "gradient_x_input": gradient_x_input,
    "integrated_gradients": partial(integrated_gradients, baseline=0.3, steps=9),
    "occlusion": partial(occlusion, window=WINDOW, stride=STRIDE, baseline=0.3),
    "smoothgrad": partial(smoothgrad, key=jax.random.key(5, impl="unsafe_rbg"), std=0.2, samples=3),
}


@pytest.fixture(scope="module")
def maps() -> dict[str, np.ndarray]:
    """In float64, in one program."""
    with jax.enable_x64(True):
        program = jax.jit(lambda x: {name: f(model, x) for name, f in METHODS.items()})
        return jax.tree.map(np.asarray, program(jnp.asarray(INPUTS)))


def test_maps_are_those_of_captum(maps):
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    tensors = {key: torch.tensor(value) for key, value in WEIGHTS.items()}

    def forward(x):  # channels first
        return model_of(tensors, x.movedim(1, -1))

    x = torch.tensor(np.moveaxis(INPUTS, -1, 1)).contiguous()
    saliency = captum.Saliency(forward)
    with jax.enable_x64(True):
        noise = fixed_noise(jax.random.key(5, impl="unsafe_rbg"), 3)

    def noisy(target):
        noises = [torch.tensor(np.moveaxis(n, -1, 1)) for n in noise]
        return sum(saliency.attribute(x + 0.2 * n, target=target, abs=False) for n in noises) / 3

    theirs = {
        "gradient": partial(saliency.attribute, x, abs=False),
        "gradient_x_input": partial(captum.InputXGradient(forward).attribute, x),
        "integrated_gradients": partial(
            captum.IntegratedGradients(forward).attribute, x, 0.3, n_steps=9
        ),
        "occlusion": partial(
            captum.Occlusion(forward).attribute,
            x,
            sliding_window_shapes=(CHANNELS, *WINDOW),
            strides=(CHANNELS, *STRIDE),
            baselines=0.3,
        ),
        "smoothgrad": noisy,
    }
    x.requires_grad_()
    for name, attribute in theirs.items():
        for k in range(LABELS):
            expected = attribute(target=k).detach().numpy()
            # Occlusion of all channels at once: each has the whole drop.
            expected = expected[:, 0] if name == "occlusion" else expected.sum(axis=1)
            # Captum computes these in part in float32.
            atol = 1e-7 if name in ("integrated_gradients", "occlusion") else 1e-12
            np.testing.assert_allclose(maps[name][:, k], expected, rtol=0, atol=atol, err_msg=name)


def test_without_noise_smoothgrad_is_the_method_and_captums_noise_tunnel(maps):
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    tensors = {key: torch.tensor(value) for key, value in WEIGHTS.items()}
    tunnel = captum.NoiseTunnel(captum.InputXGradient(lambda x: model_of(tensors, x)))
    x = torch.tensor(INPUTS, requires_grad=True)
    expected = tunnel.attribute(x, nt_type="smoothgrad", nt_samples=2, stdevs=0.0, target=1)
    options = {"key": jax.random.key(0, impl="unsafe_rbg"), "std": 0.0, "samples": 2}
    with jax.enable_x64(True):
        inputs = jnp.asarray(INPUTS)
        found = smoothgrad(model, inputs, [1], method=gradient_x_input, **options)
        np.testing.assert_allclose(found[:, 0], expected.detach().sum(-1), rtol=1e-12, atol=1e-13)
        # Of a method of the features' family too, with its options.
        smooth = smoothgrad(model, inputs, method=gradcam, max_gradient_bytes=1, **options)
        np.testing.assert_allclose(smooth, gradcam(model, inputs), rtol=1e-12, atol=1e-13)


def test_gradient_times_input_is_hirescam_of_the_input(maps):
    with jax.enable_x64(True):
        expected = hirescam(model, jnp.asarray(INPUTS))
    np.testing.assert_allclose(maps["gradient_x_input"], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 24])
def test_integrated_gradients_are_complete(steps):
    """Sum = logit(x) - logit(x0): one step suffices for a polynomial of degree 2, 24 for tanh."""

    def quadratic(x):
        flat = x.reshape(x.shape[0], -1)
        return jnp.stack([(flat**2).sum(axis=1), flat.sum(axis=1) - flat[:, 0] * flat[:, 1]], 1)

    head = quadratic if steps == 1 else model
    with jax.enable_x64(True):
        x, start = jnp.asarray(INPUTS), jnp.asarray(BASELINE)
        maps = integrated_gradients(head, x, baseline=start, steps=steps)
        rise = head(x) - head(jnp.broadcast_to(start, x.shape))
        sums = maps.sum(axis=(2, 3, 4))
    np.testing.assert_allclose(sums, rise, rtol=1e-9, atol=1e-10)


def test_occlusion_of_a_linear_model_is_its_share():
    """Windows that do not overlap: a voxel has the sum of weight times change in its window."""
    weights = np.random.default_rng(3).normal(size=(4, 6, 2))
    x = np.random.default_rng(4).normal(size=(2, 4, 6, 2))
    share = (weights * (x - 0.5)).sum(axis=-1).reshape(2, 2, 2, 2, 3).sum(axis=(2, 4))
    expected = share.repeat(2, axis=1).repeat(3, axis=2)
    with jax.enable_x64(True):
        maps = occlusion(
            lambda x: (x * weights).sum(axis=(1, 2, 3))[:, None],
            jnp.asarray(x),
            window=(2, 3),
            baseline=0.5,
            max_gradient_bytes=1,
        )
    np.testing.assert_allclose(maps[:, 0], expected, rtol=1e-12, atol=1e-13)


def test_labels_dtypes_and_chunks():
    inputs, labels_BL = jnp.asarray(INPUTS, jnp.float32), np.array([[2, 0], [1, 1]])

    def of(labels, limit=2**30):
        def program(x):
            limits = {"max_gradient_bytes": limit}
            return {name: method(model, x, labels, **limits) for name, method in METHODS.items()}

        return jax.jit(program)

    every, each = of(None), of(labels_BL)(inputs)
    chunked = of([2, 0], 2 * inputs.size * 4)(inputs)
    half = inputs.astype(jnp.bfloat16)
    of_half, of_same = every(half), every(half.astype(jnp.float32))
    for name, maps in jax.tree.map(np.asarray, every(inputs)).items():
        close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * np.abs(maps).max())
        assert maps.shape == (BATCH, LABELS, *GRID)
        assert of_half[name].dtype == maps.dtype == np.float32
        close(each[name], np.stack([maps[b, row] for b, row in enumerate(labels_BL)]))
        close(chunked[name], maps[:, [2, 0]])
        close(of_half[name], of_same[name])


@pytest.mark.parametrize(
    "options",
    [{"window": (5, 1, 1)}, {"window": (2, 2)}, {"window": (2, 2, 2), "stride": (3, 1, 1)}],
    ids=["too large", "two axes", "gaps"],
)
def test_windows_that_do_not_fit(options):
    with pytest.raises(ValueError, match="1 <= stride <= window <= size"):
        occlusion(model, jnp.asarray(INPUTS, jnp.float32), **options)


def test_one_number_is_a_window_for_all_axes():
    inputs = jnp.asarray(INPUTS, jnp.float32)
    every = occlusion(model, inputs, window=(2, 2, 2), stride=(1, 1, 1))
    np.testing.assert_array_equal(occlusion(model, inputs, window=2, stride=1), every)


def test_at_least_one_step_and_sample():
    inputs = jnp.asarray(INPUTS, jnp.float32)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        integrated_gradients(model, inputs, steps=0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        smoothgrad(model, inputs, key=jax.random.key(0), std=0.1, samples=0)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input(name):
    inputs = jnp.asarray(INPUTS, jnp.float32)
    with pytest.raises(ValueError, match=f"label {LABELS} is out of range"):
        METHODS[name](model, inputs, [LABELS])
    with pytest.raises(ValueError, match="at least one spatial axis"):
        METHODS[name](model, inputs.reshape(BATCH, -1))
