"""What it costs to explain all labels of a volume, against one forward pass.

    python benchmarks/explain_cost.py                    # a small AxialNet input, for any machine
    python benchmarks/explain_cost.py --full             # 405 x 420 x 420, for accelerators
    python benchmarks/explain_cost.py --volume 48 128 128 --labels 80 --json results/explain.json

Programs, each compiled once and timed in turn:
    forward      volumes -> logits
    explain      `hirescam_jax.explain`: logits, the HiResCAM maps of all labels, the residuals
    a label      forward pass, gradient of one logit to the features, map; for all labels it would
                 run once a label, which is how CAM libraries for PyTorch work
The target is explain <= 1.1 x forward. PyTorch's figures are added where it is installed.
"""

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import cost, interleave, machine_line, measure_ceilings, memory, mib, ratio
from common import write_results as write

from hirescam_jax.compiling import compiler_options, reuse_memory
from hirescam_jax.config import Config
from hirescam_jax.explanations.explain import explain
from hirescam_jax.models import AxialNet
from hirescam_jax.models.contract import feature_grid

TARGET = 1.1


def axialnet(labels: int, height: int, dtype: Any) -> AxialNet:
    """The paper's network; images too small for its four VALID convolutions get padded ones."""
    padding = "VALID" if height > 8 * 32 else "SAME"
    return AxialNet(num_labels=labels, conv_padding=padding, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volume", type=int, nargs=3, default=(24, 128, 128), metavar="N")
    parser.add_argument("--full", action="store_true", help="the paper's 405 x 420 x 420")
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-torch", action="store_true", help="skip PyTorch")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    reuse_memory()  # as the commands do
    shape = (405, 420, 420) if args.full else tuple(args.volume)
    model = axialnet(args.labels, shape[1], args.dtype)
    volume = np.random.default_rng(0).normal(size=(args.batch, *shape)).astype(np.float32)
    device_volume = jnp.asarray(volume)
    variables = jax.jit(model.init)(jax.random.key(0), device_volume[:1])

    def one_label(variables: Any, volume: jax.Array, label: jax.Array) -> jax.Array:
        features = model.apply(variables, volume, method="features")
        assert isinstance(features, jax.Array)
        head = partial(model.apply, variables, method="head")
        gradient = jax.grad(lambda features: jnp.asarray(head(features))[:, label].sum())(features)
        return jnp.sum(gradient * features, axis=-1)

    jit = partial(jax.jit, compiler_options=compiler_options())  # as the package compiles
    forward = jit(model.apply).lower(variables, device_volume).compile()
    everything = jit(partial(explain, model)).lower(variables, device_volume).compile()
    label = jnp.zeros((), jnp.int32)
    single = jit(one_label).lower(variables, device_volume, label).compile()
    programs = {
        "forward": lambda: forward(variables, device_volume),
        "explain": lambda: everything(variables, device_volume),
        "a label": lambda: single(variables, device_volume, label),
    }
    if importlib.util.find_spec("torch") and not args.no_torch:
        from torch_axialnet import TorchRun

        config = Config(model=model)
        torch_run = TorchRun(config, feature_grid(model, shape), jax.default_backend() == "gpu")
        torch_volume = torch_run.tensor(volume)
        programs["torch forward"] = lambda: torch_run.forward(torch_volume)
        programs["torch a label"] = lambda: torch_run.explain_label(torch_volume, 0)

    print(machine_line())
    print(f"AxialNet, {args.labels} labels, batch {args.batch}, {shape}, {args.dtype}")
    times = interleave(programs, args.repeats)
    for name, timing in times.items():
        print(f"  {name:<14}{timing}")

    ceilings = measure_ceilings(args.dtype)
    print(
        f"ceilings measured: {ceilings.flops / 1e9:.0f} GFLOP/s (matmul), "
        f"{ceilings.bandwidth / 1e9:.1f} GB/s (triad)"
    )
    bounds = {}
    for name, compiled in (("forward", forward), ("explain", everything)):
        arithmetic, traffic = ceilings.bounds(cost(compiled))
        used = memory(compiled)
        distance = times[name].median / max(arithmetic, traffic)
        bounds[name] = {
            "arithmetic_s": arithmetic,
            "memory_s": traffic,
            "measured_over_larger": distance,
            **used,
        }
        print(
            f"  {name:<14}at least {1000 * arithmetic:.1f} ms by arithmetic, "
            f"{1000 * traffic:.1f} ms by memory traffic; measured {distance:.1f} x the larger; "
            f"temporaries {mib(used['temporary_bytes'])}"
        )

    ratios = {
        "explain / forward": ratio(times["explain"], times["forward"]),
        "all labels one by one / explain": args.labels * ratio(times["a label"], times["explain"]),
    }
    if "torch a label" in times:
        ratios["torch, all labels one by one / explain"] = args.labels * ratio(
            times["torch a label"], times["explain"]
        )
        ratios["forward / torch forward"] = ratio(times["forward"], times["torch forward"])
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    met = "met" if ratios["explain / forward"] <= TARGET else "MISSED"
    print(f"target explain / forward <= {TARGET}: {met}")
    write(
        args.json,
        {
            "volume": shape,
            "labels": args.labels,
            "batch": args.batch,
            "dtype": args.dtype,
            "times": {name: timing.summary() for name, timing in times.items()},
            "ceilings": {"flops": ceilings.flops, "bytes_per_s": ceilings.bandwidth},
            "bounds": bounds,
            "ratios": ratios,
        },
        sys.argv,
    )


if __name__ == "__main__":
    main()
