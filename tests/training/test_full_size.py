"""The paper's AxialNet at its full size, once, on whatever device there is.

Some minutes on two cores and 16 GiB, so it is not part of the plain suite:
    python -m pytest -m long
"""

import jax
import numpy as np
import optax
import pytest

from hirescam_jax.config import Config
from hirescam_jax.models import AxialNet
from hirescam_jax.runs.setup import open_layout
from hirescam_jax.training.step import compile_train_step, init_state, make_optimizer

SHAPE = (405, 420, 420)
LABELS, REGIONS = 80, 5


@pytest.mark.long
def test_one_step_at_405_x_420_x_420():
    """It runs, and does what the paper's SGD does: the first step is the gradient itself."""
    config = Config(model=AxialNet(LABELS))
    layout = open_layout(config, SHAPE)
    assert layout.grid == (135, 6, 6)
    optimizer = make_optimizer(config, 1)
    step = compile_train_step(config, optimizer, layout, LABELS, REGIONS)
    state = jax.jit(lambda: init_state(config, optimizer, SHAPE))()
    before = jax.device_get(state.params)
    rng = np.random.default_rng(0)
    batch = {
        "volume": rng.integers(-1000, 800, (1, *SHAPE), dtype=np.int16),
        "findings": (rng.random((1, LABELS, REGIONS)) < 0.1).astype(np.uint8),
        "regions": (rng.random((1, REGIONS, 135, 6, 6)) < 0.3).astype(np.uint8),
        "index": np.zeros(1, np.int32),
    }
    state, metrics = step(state, layout.to_devices(batch))
    metrics = {name: float(value) for name, value in metrics.items()}
    assert metrics["loss"] == pytest.approx(
        metrics["class_loss"] + metrics["mask_loss"] / 3, rel=1e-5
    )
    momentum = jax.device_get(optax.tree.get(state.opt_state, "trace"))
    assert float(optax.tree.norm(momentum)) == pytest.approx(metrics["grad_norm"], rel=1e-4)
    moved = jax.tree.map(lambda p, m: p - np.float32(1e-3) * m, before, momentum)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, moved
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(momentum))
