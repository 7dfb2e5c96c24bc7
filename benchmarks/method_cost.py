"""What each map method costs, against one forward pass of the same small network.

    python benchmarks/method_cost.py                  # a small AxialNet, for any machine
    python benchmarks/method_cost.py --volume 48 128 128 --json results/methods.json

Methods of the head give the maps of all labels, with the features' forward pass; methods of the
whole model, whose cost grows with the labels, those of one label. Score-CAM takes a pass of the
model for each channel, and integrated gradients, SmoothGrad and occlusion as many as their defaults
(occlusion: 27 windows) say. CAM is not defined for this head. Method and ratios are those of
`explain_cost.py`.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import interleave, machine_line, ratio, write_results
from explain_cost import axialnet

from hirescam_jax.compiling import compiler_options, reuse_memory
from hirescam_jax.explanations.family import guided_attention, scorecam
from hirescam_jax.explanations.inputs import (
    gradient_x_input,
    input_gradient,
    integrated_gradients,
    occlusion,
    smoothgrad,
)
from hirescam_jax.explanations.methods import METHODS


def methods_of(model: Any, shape: tuple[int, ...]) -> dict[str, Callable[[Any, jax.Array], Any]]:
    """(variables, volumes [B, D, H, W]) -> logits and maps, for each method."""

    def of_head(method: Callable, variables: Any, volumes: jax.Array) -> Any:
        features = model.apply(variables, volumes, method="features")
        head = partial(model.apply, variables, method="head")
        return head(features), method(head, features)

    def of_scores(variables: Any, volumes: jax.Array) -> Any:
        scores = partial(model.apply, variables)
        return of_head(partial(scorecam, model=scores, inputs=volumes), variables, volumes)

    def of_model(method: Callable, variables: Any, volumes: jax.Array) -> Any:
        return method(lambda x: model.apply(variables, x[..., 0]), volumes[..., None], [0])

    heads: dict[str, Callable] = {n: m for n, m in METHODS.items() if not m.of_pooling}
    heads["guided_attention"] = partial(guided_attention, model=model)
    models = {
        "input_gradient": input_gradient,
        "gradient_x_input": gradient_x_input,
        "integrated_gradients": integrated_gradients,
        "smoothgrad": partial(smoothgrad, key=jax.random.key(0), std=0.1),
        "occlusion": partial(occlusion, window=[-(-size // 3) for size in shape]),
    }
    return (
        {name: partial(of_head, method) for name, method in heads.items()}
        | {"scorecam": of_scores}
        | {f"{name}, one label": partial(of_model, method) for name, method in models.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volume", type=int, nargs=3, default=(12, 64, 64), metavar="N")
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    reuse_memory()  # as the commands do
    shape = tuple(args.volume)
    model = axialnet(args.labels, shape[1], "float32")
    volumes = np.random.default_rng(0).normal(size=(args.batch, *shape)).astype(np.float32)
    volumes = jnp.asarray(volumes)
    variables = jax.jit(model.init)(jax.random.key(0), volumes[:1])

    functions = {"forward": model.apply} | methods_of(model, shape)
    jit = partial(jax.jit, compiler_options=compiler_options())  # as the package compiles
    programs = {
        name: partial(jit(function).lower(variables, volumes).compile(), variables, volumes)
        for name, function in functions.items()
    }
    print(machine_line())
    print(f"AxialNet, {args.labels} labels, batch {args.batch}, {shape}")
    times = interleave(programs, args.repeats)
    ratios = {name: ratio(timing, times["forward"]) for name, timing in times.items()}
    for name, timing in times.items():
        print(f"  {name:<32}{timing}  {ratios[name]:8.2f} x forward")
    write_results(
        args.json,
        {
            "volume": shape,
            "labels": args.labels,
            "batch": args.batch,
            "times": {name: timing.summary() for name, timing in times.items()},
            "over_forward": ratios,
        },
        sys.argv,
    )


if __name__ == "__main__":
    main()
