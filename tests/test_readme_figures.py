"""The figures that the READMEs quote are those of benchmarks/results."""

import json
from collections.abc import Iterator
from typing import Any

from tests.processes import ROOT

MAIN, EXPERIMENTS = "README.md", "hirescam_jax/experiments/README.md"
RUNS = ("baseline", "mask_loss")


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def text_of(name: str) -> str:
    return " ".join((ROOT / name).read_text().split())


def of_the_demo() -> Iterator[str]:
    for seed, found in results("demo_seeds")["seeds"].items():
        before, after = (found[run]["organ_iou"]["hirescam"] for run in RUNS)
        auroc = " → ".join(f"{found[run]['auroc']:.3f}" for run in RUNS)
        gain = f"{100 * found['organ_iou_gain']:+.0f} %"
        yield f"| {seed} | {before:.3f} → {after:.3f} | {gain} | {auroc} |"
        yield {1.5: "a minute and a half"}[round(found["seconds"] / 30) / 2]


def of_explaining() -> Iterator[str]:
    measured = results("explain_cpu")
    ratios, forward = measured["ratios"], measured["bounds"]["forward"]["measured_over_larger"]
    one_by_one = ratios["all labels one by one / explain"]
    yield f"| explain all 80 labels / one forward pass | {ratios['explain / forward']:.2f} |"
    yield f"| one forward and backward pass a label / explain all | {one_by_one:.0f} |"
    yield f"The forward pass takes {forward:.1f} times what its arithmetic alone would"
    store = results("explain_store_cpu")
    rates = store["volumes_per_second"]
    yield f"runs at {store['ratios']['explain / forward']:.2f} of the forward pass's rate"
    yield f"reading ({rates['read']:,.0f} volumes/s) and writing ({rates['write']:,.0f} volumes/s"
    for method, cost in results("methods_cpu")["over_forward"].items():
        name, comma, one_label = method.partition(",")
        if name != "forward":
            yield f"| `{name}`{comma}{one_label} | {cost:{'.2f' if cost < 10 else '.0f'}} |"


def of_the_start() -> Iterator[str]:
    over_jax = results("startup_cpu")["over_import_jax"]
    helps = [ratio for name, ratio in over_jax.items() if name.endswith("--help")]
    imported = over_jax["import hirescam_jax"]
    yield f"they take {min(helps):.2f} to {max(helps):.2f} times and {imported:.2f} times."


def of_the_step() -> Iterator[str]:
    large, small = (results(f"train_step_{name}cpu")["ratios"] for name in ("", "demo_"))
    forwards = (
        ratios["forward / torch forward"] for ratios in (results("explain_cpu")["ratios"], large)
    )
    in_torch = "/ the same in PyTorch 2.13"
    for ratios, forward in (
        (large, " to ".join(f"{ratio:.2f}" for ratio in sorted(forwards))),
        (small, f"{small['forward / torch forward']:.1f}"),
    ):
        time, memory = ratios["mask loss, time"], ratios["mask loss, memory"]
        yield f"| train step with the mask loss / without, time | {time:.2f} "
        yield f"| the same, memory | {memory:.2f} |"
        yield f"| forward pass {in_torch} | {forward} |"
        yield f"| train step {in_torch} | {ratios['plain step / torch step']:.2f} "


def of_feeding() -> Iterator[str]:
    two, one = results("feeding_2cores"), results("feeding_1core")
    for row, ratio, form in (
        ("store / Blosc's own decoding rate", "store / bound", ".2f"),
        ("pipeline / MONAI reading the file with its transforms", "pipeline / MONAI files", ".0f"),
        ("pipeline / MONAI's PersistentDataset", "pipeline / MONAI PersistentDataset", ".2f"),
    ):
        yield f"| {row} | {two['ratios'][ratio]:{form}} | {one['ratios'][ratio]:{form}} |"
    sizes = ", ".join(f"{size / 1e6:.0f} MB" for size in two["disk_bytes_per_volume"].values())
    yield f"| disk a volume: store, PersistentDataset | {sizes} |"
    rate, time = two["volumes_per_second"]["one volume"], two["times"]["one volume"]["median_s"]
    yield f"One core reads, checks, decodes and samples {rate:.0f} volumes/s"
    yield f"({1e3 * time:.0f} ms each)"
    copied = two["ratios"]["batch of 2: copied / in place"]
    yield f"copying them together took {copied:.1f} times as long at batch 2"


def test_the_demo_in_both_places():
    for name in (MAIN, EXPERIMENTS):
        assert [line for line in of_the_demo() if line not in text_of(name)] == []


def test_the_benchmarks():
    lines = [*of_explaining(), *of_the_start(), *of_the_step(), *of_feeding()]
    assert [line for line in lines if line not in text_of("benchmarks/README.md")] == []
    for name in ("demo_seeds", "explain_cpu", "train_step_cpu", "train_step_demo_cpu"):
        assert results(name)["machine"]["cpu"] == "AMD EPYC"  # as the READMEs say
