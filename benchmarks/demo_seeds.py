"""The demo's claim over several seeds: OrganIoU with and without the mask loss, AUROC beside it.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --json benchmarks/results/demo_seeds.json

Each seed is another phantom population, other initial weights and another order of the data.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import tyro
from common import machine

from hirescam_jax.experiments.demo import demo, demo_config


@dataclasses.dataclass
class Options:
    """seeds: one whole demo each. json: where the figures go."""

    seeds: tuple[int, ...] = (0, 1, 2)
    json: Path | None = None


def main(options: Options) -> None:
    results = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            results[seed] = demo(Path(folder) / "demo", demo_config(seed))
    gains = [r["organ_iou_gain"] for r in results.values()]
    auroc = [r["mask_loss"]["auroc"] - r["baseline"]["auroc"] for r in results.values()]
    print(f"\n{'seed':>5} {'OrganIoU without':>17} {'with':>6} {'gain':>6} {'AUROC change':>13} s")
    for seed, result in results.items():
        without, with_mask = (result[v]["organ_iou"]["hirescam"] for v in ("baseline", "mask_loss"))
        change = result["mask_loss"]["auroc"] - result["baseline"]["auroc"]
        print(
            f"{seed:>5} {without:>17.3f} {with_mask:>6.3f} {result['organ_iou_gain']:>+6.0%} "
            f"{change:>+13.3f} {result['seconds']:.0f}"
        )
    print(
        f"mean gain {np.mean(gains):+.0%} (least {min(gains):+.0%}), worst AUROC {min(auroc):+.3f}"
    )
    if options.json:
        data = {"machine": machine(), "seeds": {str(k): v for k, v in results.items()}}
        options.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
