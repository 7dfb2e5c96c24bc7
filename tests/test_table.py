"""Tables of finished runs, read back by other means than those that wrote them."""

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hirescam_jax.cli import main
from hirescam_jax.errors import UserError
from hirescam_jax.table import read_evaluations, tables, write_tables


def interval(value: float | None, half: float = 0.05) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - half, "high": value + half}


def evaluation(auroc: float, iou: float) -> dict[str, Any]:
    def measure(value: float, **rest: Any) -> dict[str, Any]:
        labels = {"nodule": interval(value), "a_b 100%": interval(None)}
        return {"mean": interval(value), "labels": labels, **rest}

    return {
        "volumes": 40,
        "auroc": measure(auroc),
        "average_precision": measure(auroc / 2),
        "organ_iou": {
            "hirescam": measure(iou, regions={"left_lung": interval(iou - 0.1)}),
            "gradcam": measure(iou / 2),
        },
    }


TWO = {"baseline": evaluation(0.81234, 0.3), "mask_loss": evaluation(0.8, 0.45)}


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


def test_organs_where_an_evaluation_has_them():
    (first, second) = csv.DictReader(io.StringIO(tables(TWO)["organs"].csv()))
    assert (first["organ"], first["model"]) == ("left_lung", "baseline")
    assert float(second["OrganIoU HiResCAM"]) == pytest.approx(0.35)
    assert first["AUROC"] == ""
    without = copy.deepcopy(TWO)
    for one in without.values():
        del one["organ_iou"]["hirescam"]["regions"]
    assert set(tables(without)) == {"models", "labels"}


def test_the_best_of_each_column_stands_out():
    markdown = tables(TWO)["models"].markdown()
    assert "| baseline | **0.812 [0.762, 0.862]** |" in markdown
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
        assert {line.count("&") for line in body} == {columns - 1}
        assert text.count(r"\begin") == text.count(r"\end") == 2
        assert text.count("{") == text.count("}")


def write_run(folder: Path, value: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_command(tmp_path: Path, capsys):
    runs = [str(write_run(tmp_path / name, value)) for name, value in TWO.items()]
    main(["table", *runs, "--out", str(tmp_path / "tables")])
    written = sorted(path.name for path in (tmp_path / "tables").iterdir())
    kinds = ("labels", "models", "organs")
    assert written == sorted(f"{k}.{s}" for k in kinds for s in ("csv", "md", "tex"))
    printed = capsys.readouterr().out
    assert (tmp_path / "tables" / "models.md").read_text() in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not an evaluation"), ("{}", "not an evaluation"), ("[1]", "not an evaluation")],
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


def test_files_are_replaced_whole(tmp_path: Path):
    write_tables(TWO, tmp_path)
    write_tables({"mask_loss": TWO["mask_loss"]}, tmp_path)
    assert "baseline" not in (tmp_path / "models.csv").read_text()
