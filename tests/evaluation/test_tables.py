"""Tables of finished runs, read back by other means than those that wrote them."""

import copy
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hirescam_jax.cli.main import main
from hirescam_jax.config import Config
from hirescam_jax.data.specs import StoreData
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.result import RunEvaluation
from hirescam_jax.evaluation.tables import runs as of_runs
from hirescam_jax.evaluation.tables.differences import difference_tables
from hirescam_jax.evaluation.tables.masks import mask_tables
from hirescam_jax.evaluation.tables.runs import all_tables, read_evaluations, write_tables
from hirescam_jax.evaluation.text import LESION_MEASURES
from hirescam_jax.evaluation.values import Values
from hirescam_jax.metrics import auroc, bootstrap, delong_test
from hirescam_jax.models import AxialNet, Conv3DNet
from hirescam_jax.reports.tables import Cell, Table
from hirescam_jax.runs.run import Header


def interval(value: float | None, half: float = 0.05) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - half, "high": value + half}


def evaluation(auroc: float, iou: float, kind: str = "exact") -> dict[str, Any]:
    def measure(value: float, **rest: Any) -> dict[str, Any]:
        labels = {"nodule": interval(value), "a_b 100%": interval(None)}
        return {"mean": interval(value), "defined": 1, "labels": labels, **rest}

    regions = {"left_lung": {**interval(iou - 0.1), "pairs": 7}}
    maps = {"hirescam": {"holds": kind == "exact"}, "gradcam": {"holds": False}}
    return {
        "volumes": 40,
        "content": "abc",
        "head": {"kind": kind, "maps": maps},
        "auroc": measure(auroc),
        "average_precision": measure(auroc / 2),
        "calibration": {"expected_calibration_error": measure(0.1)},
        "organ_iou": {
            "hirescam": measure(iou, regions=regions),
            "gradcam": measure(iou / 2),
            "organ_prior": measure(0.7),
        },
        "completeness": {"mean": 1e-6, "worst": 1e-5},
    }


TWO = {"baseline": evaluation(0.81234, 0.3), "mask_loss": evaluation(0.8, 0.45)}


def tables(evaluations: dict[str, Any]) -> dict[str, Table]:
    """Of evaluations as in their files."""
    return of_runs.tables({name: of_json(one) for name, one in evaluations.items()})


def of_json(value: dict[str, Any]) -> RunEvaluation:
    return RunEvaluation.from_json(json.dumps(value))


def test_models_as_csv_hold_all_figures():
    rows = list(csv.DictReader(io.StringIO(tables(TWO)["models"].csv())))
    assert [row["model"] for row in rows] == ["baseline", "mask_loss"]
    assert float(rows[0]["AUROC"]) == 0.81234
    assert float(rows[0]["AUROC low"]) == pytest.approx(0.76234)
    assert float(rows[1]["OrganIoU HiResCAM high"]) == pytest.approx(0.5)
    assert float(rows[1]["OrganIoU Grad-CAM"]) == pytest.approx(0.225)


def test_what_is_not_defined_stays_empty():
    built = tables(TWO)["labels"]
    rows = {(r["label"], r["model"]): r for r in csv.DictReader(io.StringIO(built.csv()))}
    assert rows["a_b 100%", "baseline"]["AUROC"] == ""
    assert rows["nodule", "mask_loss"]["AUROC"] == "0.8"
    assert "| a_b 100% | baseline | – |" in built.markdown()
    assert r"a\_b 100\% & baseline & –" in built.latex()
    models = tables(TWO)["models"]
    assert "OrganIoU random map" not in models.names  # a column without any value
    assert [row[0] for row in models.rows] == [(n, "1 of 2", "exact") for n in TWO]


def test_organs_where_an_evaluation_has_them():
    (first, second) = csv.DictReader(io.StringIO(tables(TWO)["organs"].csv()))
    assert (first["organ"], first["model"]) == ("left_lung", "baseline")
    assert float(second["OrganIoU HiResCAM"]) == pytest.approx(0.35)
    assert "AUROC" not in first
    assert first["pairs"] == "7"
    without = copy.deepcopy(TWO)
    for one in without.values():
        del one["organ_iou"]["hirescam"]["regions"]
    assert set(tables(without)) == {"models", "labels"}


def test_the_best_of_each_column_stands_out():
    markdown = tables(TWO)["models"].markdown()
    assert "| baseline | 1 of 2 | exact | **0.812 [0.762, 0.862]** |" in markdown
    assert "**0.450 [0.400, 0.500]**" in markdown
    assert "**0.800" not in markdown
    assert "40 volumes" in markdown
    assert r"\textbf{0.450 [0.400, 0.500]}" in tables(TWO)["models"].latex()
    alone = tables({"baseline": TWO["baseline"]})["models"].markdown()
    assert "**" not in alone


def test_latex_is_balanced():
    for table in tables(TWO).values():
        text = table.latex()
        body = [line for line in text.splitlines() if line.endswith(r"\\")]
        columns = len(table.head) + len(table.names)
        assert "longtable" not in text
        assert {line.count("&") for line in body} == {columns - 1}
        assert text.count(r"\begin") == text.count(r"\end") == 2
        assert text.count("{") == text.count("}")


def test_latex_of_any_text_and_of_long_tables():
    cell = Cell(**interval(0.5))
    text = "p#1 $x^2$ {q} ~z <5mm & [c] \\"
    one = Table(text, ("a",), ("b",), (((text,), (cell,)),)).latex()
    escaped = (
        r"p\#1 \$x\textasciicircum{}2\$ \{q\} \textasciitilde{}z \textless{}5mm \& [c]"
        r" \textbackslash{}"
    )
    assert rf"\caption{{{escaped}}}" in one
    assert rf"{escaped} & 0.500 [0.450, 0.550] \\" in one
    assert "{[}c] & 0.5" in Table("t", ("a",), ("b",), ((("[c]",), (cell,)),)).latex()
    rows = tuple(((str(i),), (cell,)) for i in range(41))
    many = Table("t", ("a",), ("b",), rows).latex()
    assert many.count(r"\begin{longtable}") == many.count(r"\end{longtable}") == 1
    assert many.count(r"\endhead") == 1


def test_maps_without_a_guarantee_are_marked():
    built = tables({"axial": TWO["baseline"], "body": evaluation(0.7, 0.9, "none")})["models"]
    markdown, rows = built.markdown(), list(csv.DictReader(io.StringIO(built.csv())))
    body = next(line for line in markdown.splitlines() if "| body |" in line)
    axial = next(line for line in markdown.splitlines() if "| axial |" in line)
    # The larger one stands out no more than the other: it may lie where the model did not look.
    assert "| 0.900 [0.850, 0.950]† |" in body
    assert "| 0.300 [0.250, 0.350] |" in axial
    assert "| **0.812 [0.762, 0.862]** |" in axial
    assert "† By this head the map need not account for the score" in markdown
    assert r"0.900 [0.850, 0.950]$^\dagger$" in built.latex()
    assert [row["OrganIoU HiResCAM guaranteed"] for row in rows] == ["yes", "no"]
    assert [row["head"] for row in rows] == ["exact", "none"]
    assert "OrganIoU organ prior guaranteed" not in rows[0]


def test_means_over_fewer_labels_are_not_compared():
    fewer = evaluation(0.7, 0.9)
    fewer["organ_iou"]["hirescam"]["defined"] = 0
    built = tables({"all": TWO["baseline"], "more": TWO["mask_loss"], "fewer": fewer})["models"]
    markdown = built.markdown()
    assert "| 0.900 [0.850, 0.950] (0 labels) |" in markdown
    assert "**0.450 [0.400, 0.500]** |" in markdown
    rows = list(csv.DictReader(io.StringIO(built.csv())))
    assert [row["OrganIoU HiResCAM labels"] for row in rows] == ["1", "1", "0"]


def test_both_splits():
    both = {name: {**one, "validation": one} for name, one in TWO.items()}
    built = tables(both)
    assert set(built) == {
        f"{k}{s}" for k in ("models", "labels", "organs") for s in ("", "_validation")
    }
    assert built["models"].title.startswith("Means over labels, test split, 40 volumes")
    markdown = built["models_validation"].markdown()
    assert "validation split, 40 volumes" in markdown
    assert "in-sample" in markdown
    assert "in-sample" not in built["models"].markdown()
    assert "0.150 [0.100, 0.200]†" in markdown  # the head's verdict is of the run
    alone = tables({n: {**one, "split": "validation"} for n, one in TWO.items()})
    assert "in-sample" in alone["models"].markdown()


def test_runs_of_other_volumes_are_marked():
    best = {**evaluation(0.95, 0.95), "content": "xyz"}
    built = tables({**TWO, "other": best})["models"]
    assert [row[0][0] for row in built.rows] == ["baseline", "mask_loss", "other ‡"]
    markdown = built.markdown()
    assert "‡ Measured on other volumes" in markdown
    assert r"other $^\ddagger$" in built.latex()
    other = next(line for line in markdown.splitlines() if "| other ‡ |" in line)
    assert "**" not in other
    assert "**0.812 [0.762, 0.862]**" in markdown
    assert "**0.450 [0.400, 0.500]**" in markdown


def on_grid(found: dict[str, Any], grid: list[int], pairs: int, undefined: int) -> dict[str, Any]:
    found["grid"] = grid
    found["organ_iou"]["hirescam"] |= {"pairs": pairs, "undefined_pairs": undefined}
    return found


def test_models_tell_over_which_pairs_and_on_which_grid_organ_iou_is():
    fine = {n: on_grid(copy.deepcopy(e), [16, 6, 6], 287, 1) for n, e in TWO.items()}
    built = tables(fine)
    rows = list(csv.DictReader(io.StringIO(built["models"].csv())))
    assert [(row["grid"], row["pairs"]) for row in rows] == [("16×6×6", "287 of 288")] * 2
    assert r"16$\times$6$\times$6" in built["models"].latex()
    assert "**0.450 [0.400, 0.500]**" in built["models"].markdown()
    for table in built.values():
        assert "threshold: 1 of 288 (baseline, mask_loss)." in table.markdown()

    ctnet = evaluation(0.7, 0.2)
    ctnet["organ_iou"] = {}
    assert "**0.450" in tables({**fine, "ctnet": ctnet})["models"].markdown()  # it has no maps

    for grid, pairs in (([3, 2, 2], 125), ([5, 5, 5], 287), ([16, 6, 6], 200)):
        coarse = on_grid(evaluation(0.7, 0.9), grid, pairs, 288 - pairs)
        built = tables({**fine, "body": coarse})["models"]
        markdown = built.markdown()
        assert "**0.812 [0.762, 0.862]**" in markdown
        assert "**0.450" not in markdown
        assert "**0.900" not in markdown
        assert "Not all maps are on the same grid and over the same pairs" in markdown
        if pairs < 287:
            assert f"1 of 288 (baseline, mask_loss); {288 - pairs} of 288 (body)." in markdown
        # Of other volumes it is no part of the comparison.
        apart = tables({**fine, "body": {**coarse, "content": "xyz"}})["models"].markdown()
        assert "**0.450 [0.400, 0.500]**" in apart


def test_labels_tell_how_many_are_positive():
    known = copy.deepcopy(TWO)
    known["baseline"]["positives"] = {"nodule": 31, "a_b 100%": 1}  # volumes, of an older version
    known["mask_loss"] |= {
        "positives": {"nodule": 31, "a_b 100%": 1},
        "positive_patients": {"nodule": 12, "a_b 100%": 1},
    }
    rows = csv.DictReader(io.StringIO(tables(known)["labels"].csv()))
    found = {(row["label"], row["model"]): row["positives"] for row in rows}
    assert found["nodule", "baseline"] == "31"
    assert found["nodule", "mask_loss"] == "12"
    assert found["a_b 100%", "mask_loss"] == "1"
    assert "positives: patients" in tables(known)["labels"].markdown()


def test_lesions_have_a_table_of_their_own():
    keys = [*LESION_MEASURES]

    def of_map(defined: int, pairs: int, undefined: int) -> dict[str, Any]:
        counts = {"defined": defined, "pairs": pairs, "undefined_pairs": undefined}
        return {
            key: {"mean": interval(0.25), "labels": {}, **counts} for key in [*keys, "otsu_dice"]
        }

    # A label has no lesion in the validation split, and so neither threshold nor organ prior.
    lesions = {"hirescam": of_map(2, 19, 1), "organ_prior": of_map(1, 9, 11)}
    lesions["hirescam"]["iou"] |= {"defined": 1, "pairs": 9, "undefined_pairs": 11}
    built = tables({"one": {**TWO["baseline"], "lesions": lesions}})["lesions"]
    assert built.rows[0][0] == ("one", "HiResCAM", "2 of 2", "19 of 20")
    assert built.rows[1][0] == ("one", "organ prior", "2 of 2", "9 of 20")
    assert "energy" in built.names
    own, prior = (line for line in built.markdown().splitlines() if line.startswith("| one"))
    assert own.count("(1 label)") == 1
    assert "| 19 of 20 | 0.250 [0.200, 0.300] (1 label) | 0.250 [0.200, 0.300] |" in own
    assert prior.count("(1 label)") == len(keys)
    row = next(csv.DictReader(io.StringIO(built.csv())))
    assert (row["IoU labels"], row["energy labels"]) == ("1", "2")
    assert "those left out have a lesion without a cell" in built.markdown()
    whole = {"one": {**TWO["baseline"], "lesions": {"hirescam": of_map(2, 20, 0)}}}
    assert "left out" not in tables(whole)["lesions"].markdown()


def header(**data: Any) -> Header:
    config = Config(data=StoreData("store", **data), mask_weight=1 / 3)
    return Header(config, ("a",), ("b",), (6, 8, 8), (1.0, 1.0, 1.0))


def test_masks_have_the_papers_layout():
    ways = [(m, d) for m in ("nearest", "area", "trilinear") for d in (False, True)]
    headers = {f"{m}_{d}": header(mask_method=m, dilate=d) for m, d in ways}
    evaluations = {n: of_json(evaluation(0.8, 0.1 * (i + 2))) for i, n in enumerate(headers)}
    other = Header(Config(data=StoreData("store")), *list(vars(header()).values())[1:5])
    headers["baseline"], evaluations["baseline"] = other, of_json(evaluation(0.8, 0.1))
    (table,) = mask_tables(evaluations, headers).values()
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [row["masks by"] for row in rows] == ["nearest", "area", "trilinear"]
    found = [
        float(row[f"OrganIoU HiResCAM, {w}"]) for row in rows for w in ("not dilated", "dilated")
    ]
    assert found == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert mask_tables(evaluations, {"baseline": other}) == {}
    assert "test split, 40 volumes; 95 % intervals" in table.title
    assert "in-sample" not in table.markdown()
    (table,) = mask_tables(evaluations, headers, "validation").values()
    assert "validation split" in table.title
    assert "in-sample" in table.markdown()


def test_masks_of_two_seeds_are_told_apart():
    ways = [(m, d) for m in ("nearest", "area") for d in (False, True)]
    headers, evaluations = {}, {}
    for seed in (0, 7):
        for method, dilate in ways:
            found = header(mask_method=method, dilate=dilate)
            config = dataclasses.replace(found.config, seed=seed, workers=seed)
            name = f"{method}_{dilate}_{seed}"
            headers[name] = dataclasses.replace(found, config=config)
            evaluations[name] = on_grid(evaluation(0.8, 0.4), [4, 4, 4], 30, 2)
    evaluations["area_True_7"] |= {"content": "xyz"}
    built = mask_tables({name: of_json(one) for name, one in evaluations.items()}, headers)
    assert list(built) == ["masks", "masks_2"]
    assert "dilation; seed 0; means" in built["masks"].title
    assert "dilation; seed 7; means" in built["masks_2"].title
    assert "Runs: nearest_False_7, nearest_True_7, area_False_7" in built["masks_2"].markdown()
    assert "threshold: 2 of 32 (nearest_False_0" in built["masks"].markdown()
    assert "‡" not in built["masks"].markdown()
    (area,) = (x for x in built["masks_2"].markdown().splitlines() if x.startswith("| area"))
    assert area.count("‡") == 3  # AUROC and both maps, dilated
    assert "‡ Measured on other volumes" in built["masks_2"].markdown()


def test_masks_of_two_networks_are_told_apart_in_a_few_words():
    headers = {}
    for model in (AxialNet(), AxialNet(pool="max"), Conv3DNet()):
        for method in ("nearest", "area"):
            found = header(mask_method=method)
            config = dataclasses.replace(found.config, model=model)
            headers[f"{method}_{len(headers)}"] = dataclasses.replace(found, config=config)
    built = mask_tables(dict.fromkeys(headers, of_json(TWO["baseline"])), headers)
    titles = [table.title.split("dilation; ")[1].split("; means")[0] for table in built.values()]
    assert titles == [
        "model AxialNet; model.pool mean",
        "model AxialNet; model.pool max",
        "model Conv3DNet",
    ]


# -- differences ----------------------------------------------------------------------------------


def values(seed: int, gain: float = 0.0, patients: Any = None, **change: Any) -> Values:
    """Of 60 volumes, two labels "a", "b"; the truth is the same for all seeds."""
    truth = np.random.default_rng(0).random((60, 2)) < 0.4
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(60, 2)) + (1 + gain) * truth
    iou = np.where(truth, 0.4 + gain + 0.1 * rng.random((60, 2)), np.nan)
    names = np.array([f"{i:02d}" for i in range(60)] if patients is None else patients)
    found = Values(("a", "b"), names, "abc", logits, truth, {"hirescam": iou, "gradcam": iou / 2})
    return found._replace(**change)


def test_differences_by_hand():
    first, second = values(1), values(2, gain=0.2)
    built = difference_tables({"base": first, "loss": second}, resamples=200)
    (row,) = csv.DictReader(io.StringIO(built["differences"].csv()))
    runs = [run.organ_iou["hirescam"] for run in (first, second)]
    before, after = (np.nanmean(iou, axis=0).mean() for iou in runs)
    assert row["model"] == "loss"
    assert row["labels"] == "2 of 2"
    assert float(row["OrganIoU HiResCAM"]) == pytest.approx(after - before, rel=1e-4)
    relative = float(row["OrganIoU HiResCAM, relative"])
    assert relative == pytest.approx(after / before - 1, rel=1e-4)
    assert "+" in built["differences"].markdown()

    def difference(cases: np.ndarray) -> np.ndarray:
        drawn = [
            [np.moveaxis(x[cases], 2, 1) for x in (v.logits, v.truth)] for v in (first, second)
        ]
        parts = [auroc(*one) for one in drawn]
        return (parts[1] - parts[0]).mean(1, keepdims=True)

    expected = [float(x[0]) for x in bootstrap(difference, 60, 200)]
    found = [float(row[f"AUROC{end}"]) for end in ("", " low", " high")]
    assert found == pytest.approx(expected, abs=1e-5)
    labels = {r["label"]: r for r in csv.DictReader(io.StringIO(built["differences_labels"].csv()))}
    for k, label in enumerate("ab"):
        test = delong_test(second.logits[:, k], first.logits[:, k], first.truth[:, k])
        assert float(labels[label]["AUROC"]) == pytest.approx(test.difference, rel=1e-4)
        assert float(labels[label]["AUROC p"]) == pytest.approx(test.p, rel=1e-4)


def test_differences_from_another_run_and_of_equal_runs():
    runs = {"base": values(1), "loss": values(2, gain=0.2)}
    built = difference_tables({**runs, "again": values(2, gain=0.2)}, "loss", resamples=50)
    rows = {r["model"]: r for r in csv.DictReader(io.StringIO(built["differences"].csv()))}
    assert set(rows) == {"base", "again"}
    assert float(rows["base"]["OrganIoU HiResCAM"]) < 0
    for name in ("AUROC", "OrganIoU HiResCAM", "OrganIoU Grad-CAM, relative"):
        assert float(rows["again"][name]) == 0
        assert rows["again"][f"{name} low"] == ""  # all resamples agree
    with pytest.raises(UserError, match="--against none: no such run here: choose from base, loss"):
        difference_tables(runs, "none")


@pytest.mark.parametrize("against", ["base", "ctnet"])
def test_differences_with_a_network_without_maps(against):
    runs = {"base": values(1), "ctnet": values(2, organ_iou={}), "loss": values(3, gain=0.1)}
    for table in difference_tables(runs, against, resamples=20).values():
        rows = {r["model"]: r for r in csv.DictReader(io.StringIO(table.csv()))}
        assert all(row["AUROC"] for row in rows.values())
        if against == "ctnet":
            assert "OrganIoU HiResCAM" not in rows["loss"]
        else:
            assert rows["ctnet"]["OrganIoU HiResCAM"] == ""
            assert float(rows["loss"]["OrganIoU HiResCAM"]) > 0
        assert table.markdown()
        assert table.latex()


def test_differences_are_of_the_same_volumes_labels_and_patients():
    order = values(2)._replace(labels=("b", "a"))
    other = values(3)._replace(content="xyz")
    built = difference_tables({"base": values(1), "order": order, "other": other}, resamples=50)
    assert [row[0][0] for row in built["differences"].rows] == ["order"]
    assert "left out: other" in built["differences"].markdown()
    apart = {"base": values(1), "other": other}
    assert difference_tables(apart) == {}
    with pytest.raises(UserError, match="--against base: no other run was measured on the same"):
        difference_tables(apart, "base")
    twice = [str(i // 2) for i in range(60)]
    runs = {"base": values(1, patients=twice), "loss": values(2, patients=twice)}
    built = difference_tables(runs, resamples=50)
    (row, _) = csv.DictReader(io.StringIO(built["differences_labels"].csv()))
    one, other = (run.logits[:, 0] for run in runs.values())
    test = delong_test(other, one, runs["base"].truth[:, 0], twice)
    assert float(row["AUROC p"]) == pytest.approx(test.p, rel=1e-4)
    assert "30 patients" in built["differences"].title


# -- files and the command ------------------------------------------------------------------------


def write_run(folder: Path, value: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_command(tmp_path: Path, capsys):
    runs = [str(write_run(tmp_path / name, value)) for name, value in TWO.items()]
    for seed, run in enumerate(runs):
        values(seed).save(Path(run) / "evaluation_test.npz")
    main(["table", *runs, "--out", str(tmp_path / "tables"), "--against", "mask_loss"])
    written = sorted(path.name for path in (tmp_path / "tables").iterdir())
    kinds = ("differences", "differences_labels", "labels", "models", "organs")
    assert written == sorted(f"{k}.{s}" for k in kinds for s in ("csv", "md", "tex"))
    printed = capsys.readouterr().out
    assert (tmp_path / "tables" / "models.md").read_text() in printed


def test_differences_on_the_validation_split_are_in_sample(tmp_path: Path):
    runs = []
    for seed, (name, one) in enumerate(TWO.items()):
        found = {**on_grid(copy.deepcopy(one), [4 + seed, 4, 4], 30, 2), "split": "validation"}
        runs.append(write_run(tmp_path / name, found))
        values(seed).save(runs[-1] / "evaluation_validation.npz")
    for name in ("differences", "differences_labels"):
        markdown = all_tables(runs)[name].markdown()
        assert "validation split" in markdown
        assert "in-sample" in markdown
        assert "threshold: 2 of 32 (baseline, mask_loss)" in markdown
        assert "Not all maps are on the same grid" in markdown


def test_damaged_and_missing_values(tmp_path: Path):
    runs = [write_run(tmp_path / name, value) for name, value in TWO.items()]
    assert set(all_tables(runs)) == {"models", "labels", "organs"}
    with pytest.raises(UserError, match=r"evaluation_test\.npz is not there: run `hirescam eval"):
        all_tables(runs, "baseline")
    for run in runs:
        (run / "evaluation_test.npz").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"evaluation_test\.npz: .* run `hirescam evaluate` again"):
        all_tables(runs)
    for run in runs:
        values(1, content="xyz").save(run / "evaluation_test.npz")
    with pytest.raises(UserError, match="is not of the evaluation beside it"):
        all_tables(runs)


def damaged(**parts: Any) -> str:
    return json.dumps({**TWO["baseline"], **parts})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not an evaluation"),
        ("{}", "not an evaluation"),
        ("[1]", "not an evaluation"),
        (damaged(volumes=None), "volumes is no number"),
        (damaged(auroc=5), "not an evaluation"),
        (damaged(auroc={**TWO["baseline"]["auroc"], "mean": 3}), "not an evaluation"),
        (damaged(auroc={**TWO["baseline"]["auroc"], "mean": {"value": "x"}}), "not an evaluation"),
        (damaged(validation={}), "not an evaluation"),
        (damaged(completeness={"mean": float("nan")}), "NaN in it"),
    ],
)
def test_bad_evaluations(tmp_path: Path, content: str, message: str):
    run = write_run(tmp_path / "run", content)
    with pytest.raises(UserError, match=message) as caught:
        read_evaluations([run])
    assert str(run / "evaluation.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runs_that_are_not_there_or_alike(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="run `hirescam evaluate"):
        read_evaluations([tmp_path / "empty"])
    runs = [write_run(tmp_path / part / "run", TWO["baseline"]) for part in "ab"]
    with pytest.raises(UserError, match="two runs are called 'run'"):
        read_evaluations(runs)
    with pytest.raises(UserError, match="at least one"):
        read_evaluations([])


def test_runs_that_cannot_be_compared(tmp_path: Path):
    text = json.dumps(TWO["baseline"]).replace("nodule", "mass")
    runs = [write_run(tmp_path / "a", TWO["baseline"]), write_run(tmp_path / "b", text)]
    with pytest.raises(UserError, match=r"have other labels \(nodule: only 'a' has it") as caught:
        read_evaluations(runs)
    assert "\n" not in str(caught.value)
    runs[1] = write_run(tmp_path / "c", {**TWO["baseline"], "split": "validation"})
    with pytest.raises(UserError, match="'a' was measured on the test split, 'c' on the val"):
        read_evaluations(runs)


def test_files_are_replaced_whole(tmp_path: Path):
    write_tables(tables(TWO), tmp_path)
    for name in ("masks.tex", "masks_2.md", "masks_11.csv", "masks_of_my_own.md"):
        (tmp_path / name).write_text("of other runs")
    write_tables(tables({"mask_loss": TWO["mask_loss"]}), tmp_path)
    assert [path.name for path in tmp_path.glob("masks*")] == ["masks_of_my_own.md"]
    assert "baseline" not in (tmp_path / "models.csv").read_text()


def test_differences_of_maps_are_over_the_same_pairs():
    """Two runs of equal maps, but on the grid of the second some organs have no cell: those of the
    volumes that are hard for both."""
    first, second = values(1), values(2)
    iou = first.organ_iou["hirescam"].copy()
    hard = first.truth & (np.arange(60) < 20)[:, None]
    iou[hard] = 0.1
    fewer = np.where(hard, np.nan, iou)
    runs = {
        "base": first._replace(organ_iou={"hirescam": iou, "gradcam": iou}),
        "coarse": second._replace(organ_iou={"hirescam": fewer, "gradcam": iou}),
    }
    for against in runs:
        built = difference_tables(runs, against, resamples=30)
        (row,) = csv.DictReader(io.StringIO(built["differences"].csv()))
        for name in ("OrganIoU HiResCAM", "OrganIoU HiResCAM, relative", "OrganIoU Grad-CAM"):
            assert float(row[name]) == 0
        for found in csv.DictReader(io.StringIO(built["differences_labels"].csv())):
            assert float(found["OrganIoU HiResCAM"]) == 0
        other = next(name for name in runs if name != against)
        kept, out = (~np.isnan(fewer)).sum(), hard.sum()
        note = f"{other}: OrganIoU HiResCAM is over the {kept} pairs of a volume and a finding for "
        assert f"{note}which both runs have one; {out} more have it for" in (
            built["differences"].markdown()
        )
