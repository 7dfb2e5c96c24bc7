"""Training on several real processes with several devices each is that of one process."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.processes import run

CONFIG = """
from hirescam_jax.config import Config, PhantomData, SGD
from hirescam_jax.data.phantom import PhantomConfig
from hirescam_jax.models import AxialNet

config = Config(
    model=AxialNet(blocks=(1,), widths=(4,), stem="small", conv_widths=()),
    data=PhantomData(PhantomConfig(shape=(15, 16, 16)), train_size=12, val_size=5, test_size=3),
    optimizer=SGD(learning_rate=0.01),
    batch_size=4,
    epochs=2,
)
"""


def losses(folder: Path) -> list[tuple[int, str, float, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(one["step"], one["split"], one["class_loss"], one["mask_loss"]) for one in lines]


@pytest.mark.long
def test_four_processes_then_two_give_the_losses_of_one(tmp_path):
    """An epoch on a mesh of 2 x 4 in which two processes share the slices of each volume, the next
    on 4 x 2 in two processes; the 5 validation volumes divide over neither. Then the evaluation."""
    (tmp_path / "config.py").write_text(CONFIG)
    cache = tmp_path / "cache"

    def train(name: str, *more: object) -> list[object]:
        return ["train", tmp_path / "config.py", "--run", tmp_path / name, *more]

    run(1, train("one"), cache=cache)
    ends = run(4, train("many", "--depth-devices", 4, "--epochs", 1), devices=2, cache=cache)
    assert "best epoch ends" in ends[0].out
    ends += run(2, train("many", "--depth-devices", 2, "--resume"), devices=4, cache=cache)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert [line[:2] for line in many] == [line[:2] for line in one]
    assert len(one) == 2 * (3 + 1)
    # Float32 sums in other orders.
    np.testing.assert_allclose([x[2:] for x in many], [x[2:] for x in one], rtol=2e-5)
    run(1, ["evaluate", tmp_path / "one"], cache=cache)
    run(2, ["evaluate", tmp_path / "many"], devices=2, cache=cache)
    results = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("one", "many")]
    assert [result["volumes"] for result in results] == [3, 3]
