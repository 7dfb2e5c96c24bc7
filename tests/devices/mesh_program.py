"""One train step and the maps of a batch on every mesh of 8 CPU devices; run by test_sharding.py.

    python mesh_program.py OUT.npz MODEL float32|float64 MESH ...

Writes, for each mesh "data,depth" ("1" is one device without any mesh; "4,2x3": in three
micro-batches), the losses, the gradient norm, the maps and everything that a step changes; and
beside OUT the compiled step, as MESH.hlo.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hirescam_jax.config import SGD, Config, Preprocess
from hirescam_jax.data.pipeline import make_batch
from hirescam_jax.devices.layout import Layout
from hirescam_jax.devices.mesh import make_mesh
from hirescam_jax.explanations.methods import EVALUATED, METHODS
from hirescam_jax.inference.maps import explain_step
from hirescam_jax.models import AxialNet, BodyConv, Conv3DNet
from hirescam_jax.models.contract import depth_unit, feature_grid
from hirescam_jax.models.heads import depth_max, depth_mean
from hirescam_jax.models.layers import BatchNorm
from hirescam_jax.training.step import eval_step, init_state, make_optimizer, on_mesh, train_step

LABELS, REGIONS, BATCH = 5, 3, 8
PLAIN = Preprocess(flip=0.0, rotate=0.0)


class Renamed(AxialNet):
    """AxialNet, whose last layer has another name."""

    def setup(self):
        super().setup()
        self.classifier = nn.Dense(self.num_labels, precision="highest")

    def head(self, features, train=False):
        pooled = depth_mean(features)
        return self.classifier(pooled.reshape(pooled.shape[0], -1))


class Bare(nn.Module):
    """A network of `features` and `head` alone, which know of no training mode either."""

    dtype: str = "float32"
    num_labels: int = LABELS

    def setup(self):
        self.stem = nn.Conv(6, (3, 4, 4), (3, 4, 4), padding="VALID", dtype=self.dtype)
        self.scores = nn.Dense(self.num_labels, precision="highest")

    def features(self, volumes):
        return nn.relu(self.stem(volumes[..., None]))

    def head(self, features):
        return self.scores(features.mean((1, 2, 3)))


class Gated(nn.Module):
    """A network of other parts: in the features a gate that is made of all slices, BatchNorm of
    volumes, and behind the maximum over the slices two layers."""

    num_labels: int = LABELS
    dtype: str = "float32"

    depth_unit = 3

    def setup(self):
        stem = {"padding": "VALID", "use_bias": False, "dtype": self.dtype}
        self.stem = nn.Conv(6, (3, 4, 4), (3, 4, 4), **stem)
        self.norm = BatchNorm(jnp.dtype(self.dtype))
        self.gate = nn.Dense(6, precision="highest")
        self.scores = nn.Dense(7, precision="highest")
        self.mix = nn.Dense(self.num_labels, precision="highest")

    def features(self, volumes, train=False):
        x = nn.relu(self.norm(self.stem(volumes[..., None]), train))
        gate = nn.sigmoid(self.gate(depth_mean(x).mean((1, 2))))
        return x * gate[:, None, None, None]

    def head(self, features, train=False):
        best = depth_max(self.scores(features.reshape(*features.shape[:2], -1)))
        return self.mix(nn.relu(best))

    def attention_scale(self, grid):
        return 1.0

    def __call__(self, volumes, train=False):
        return self.head(self.features(volumes, train), train)


# Neither 10 images nor 3 cells (and 2 slices) divide over 4 or 8 devices.
MODELS = {
    "axialnet": (AxialNet(LABELS, (1, 1), (4, 8), "small", (6,), "SAME"), (30, 16, 16)),
    "axialnet-max": (
        AxialNet(LABELS, (1,), (4,), "small", (6,), "SAME", pool="max", remat=True),
        (30, 16, 16),
    ),
    "conv3d-plain": (
        Conv3DNet(LABELS, widths=(4, 6), narrow=(5,), hidden=(8, 6), dropout=0.0),
        (29, 27, 27),
    ),
    "conv3d": (Conv3DNet(LABELS, widths=(4, 6), narrow=(5,), hidden=(8, 6)), (29, 27, 27)),
    "axialnet-dense": (
        AxialNet(LABELS, (1,), (4,), "small", (6,), "SAME", pool="dense", block="bottleneck"),
        (30, 16, 16),
    ),
    "renamed": (Renamed(LABELS, (1, 1), (4, 8), "small", (6,), "SAME"), (30, 16, 16)),
    "gated": (Gated(), (30, 16, 16)),
    "bare": (Bare(), (30, 16, 16)),
    "bodyconv": (  # three cells of nine slices, and two slices that make none
        BodyConv(LABELS, (1,), (4,), "small", conv_widths=(6, 5), channels=1, hidden=(8, 6)),
        (29, 16, 16),
    ),
}


def config_of(name: str, micro_batches: int = 1) -> tuple[Config, tuple[int, ...]]:
    model, shape = MODELS[name]
    config = Config(
        model=model,
        preprocess=Preprocess(flip=0.0, rotate=0.0)
        if name == "conv3d-plain"
        else Preprocess(flip=0.7, rotate=0.5),
        optimizer=SGD(learning_rate=0.1),
        batch_size=BATCH,
        micro_batches=micro_batches,
    )
    return config, shape


def batch_of(config: Config, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    grid = feature_grid(config.model, shape)
    return {
        "volume": rng.integers(-1000, 1000, (BATCH, *shape), dtype=np.int16),
        "findings": (rng.random((BATCH, LABELS, REGIONS)) < 0.3).astype(np.uint8),
        "regions": (rng.random((BATCH, REGIONS, *grid)) < 0.5).astype(np.uint8),
        "index": np.arange(BATCH, dtype=np.int32) + 3,
    }


def laid_out(layout: Layout, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    class Items:
        shape = batch["volume"].shape[1:]

        def __getitem__(self, row: int) -> dict[str, np.ndarray]:
            return {name: value[row] for name, value in batch.items()}

    items: Any = Items()
    return layout.to_devices(make_batch(items, layout.share.rows, layout.share))


def results(out: Path, name: str, run: str, dtype: str) -> dict[str, np.ndarray]:
    mesh, _, parts = run.partition("x")
    micro_batches = int(parts or 1)
    config, shape = config_of(name, micro_batches)
    if dtype == "float64":
        config = dataclasses.replace(config, model=config.model.clone(dtype="float64"))
    optimizer = make_optimizer(config, 10)
    with jax.enable_x64(False):
        state = jax.device_get(jax.jit(partial(init_state, config, optimizer, shape))())
    state = jax.tree.map(
        lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype), state
    )
    batch = batch_of(config, shape)
    weighted = {**batch, "weight": np.ones(BATCH, np.float32)}
    grid, unit = feature_grid(config.model, shape), depth_unit(config.model) or 1
    if mesh == "1":
        layout = Layout(make_mesh(1, jax.devices()[:1]), BATCH, shape, grid, unit)
        batch, weighted = jax.device_put((batch, weighted))
        step = jax.jit(partial(train_step, config=config, optimizer=optimizer))
        evaluate = jax.jit(partial(eval_step, config=config))
    else:
        data, depth = map(int, mesh.split(","))
        layout = Layout(make_mesh(depth), BATCH, shape, grid, unit, micro_batches)
        assert dict(layout.mesh.shape) == {"data": data, "depth": depth}
        batch, weighted = laid_out(layout, batch), laid_out(layout, weighted)
        step = on_mesh(train_step, layout, config=config, optimizer=optimizer)
        evaluate = on_mesh(eval_step, layout, config=config)
    tree = {}
    if not parts:
        # All that can be split, for the model with the most demanding head.
        methods = [m for m in METHODS if m != "cam"] if name == "axialnet-max" else EVALUATED
        explain = jax.jit(partial(explain_step, config=config, layout=layout, methods=methods))
        logits, maps = explain(state.variables, batch["volume"])
        tree = {"logits": logits, "maps": maps, "sums": evaluate(state.variables, weighted)}
    compiled = step.lower(state, batch).compile()
    out.with_name(f"{run}.hlo").write_text(compiled.as_text())
    tree["state"], tree["metrics"] = compiled(state, batch)
    return {
        f"{run}/{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def main(out: str, name: str, dtype: str, *runs: str) -> None:
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    arrays: dict[str, np.ndarray] = {}
    for run in runs:
        arrays |= results(Path(out), name, run, dtype)
    np.savez(out, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
