"""What an evaluation is, against the files that were written before it had types.

run_before.json.gz: evaluation.json of a small AxialNet on phantoms, with both checks.
summary_before.json.gz: of the splits below, by NumPy alone.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hirescam_jax.errors import UserError
from hirescam_jax.evaluation.result import (
    Evaluation,
    Guarantee,
    Head,
    RunEvaluation,
    Sanity,
    plain,
    read,
)
from hirescam_jax.evaluation.summary import summarise
from hirescam_jax.evaluation.tables.runs import tables
from hirescam_jax.metrics.intervals import Interval
from tests.evaluation.test_evaluate import predictions, with_everything

LABELS = ("a", "b", "c")


def before(name: str) -> str:
    return gzip.decompress((Path(__file__).parent / f"{name}_before.json.gz").read_bytes()).decode()


def summarised() -> Evaluation:
    """With a label that validation never saw, and one without negatives."""
    return summarise(
        LABELS,
        with_everything(0, b=False),
        with_everything(1, c=True),
        resamples=50,
        regions=("left", "right"),
        patients=[f"p{i // 2:02d}" for i in range(40)],
    )


def same(found: Any, expected: Any) -> None:
    """The same keys in the same order, the same lists and nulls; numbers but for rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            same(*pair)
    else:
        # The same sums, in another order on another processor.
        assert found == (pytest.approx(expected, rel=1e-9) if expected else expected)


def test_files_written_before_are_read_and_written_alike():
    text = before("run")
    found = RunEvaluation.from_json(text)
    assert found.to_json() == text
    assert found.validation is not None
    assert found.faithfulness is not None
    assert found.sanity is not None
    assert set(tables({"run": found})) == {
        f"{kind}{split}"
        for kind in ("models", "labels", "organs", "lesions")
        for split in ("", "_validation")
    }


def test_the_figures_are_those_of_before():
    same(plain(summarised()), json.loads(before("summary")))


def test_what_is_written_is_read_as_the_same():
    scores = replace(summarised(), content="abc")
    assert scores.auroc.labels["c"].value is None
    # Without maps or lesions, and of labels that nobody has.
    empty = predictions(1, a=False, b=False, c=False)._replace(organ_iou={})
    bare = summarise(LABELS, empty, empty, resamples=5)
    head = Head("exact", "text", {"hirescam": Guarantee(True, "yes")})
    constant = {"hirescam": {"ssim": (0.5, None)}}
    sanity = Sanity(
        volumes=1,
        maps=2,
        layers=("fc", "conv"),
        methods=constant,
        defined={"hirescam": {"ssim": (2, 0)}},
    )
    for run in (
        RunEvaluation(step=3, head=head, scores=scores, validation=bare, sanity=sanity),
        RunEvaluation(split="validation", scores=bare),
    ):
        assert RunEvaluation.from_json(run.to_json()) == run
    tree = json.loads(RunEvaluation(scores=bare).to_json())
    assert tree["lesions"] is tree["completeness"] is tree["head"] is None
    assert not {"content", "validation", "faithfulness", "sanity"} & tree.keys()


def test_what_is_no_number_is_null():
    tree = plain({"a": Interval(float("nan"), None, 1.0), "b": (np.float32("nan"), np.int64(3))})
    assert tree == {"a": {"value": None, "low": None, "high": 1.0}, "b": [None, 3]}
    assert read(tree["a"], Interval) == Interval(None, None, 1.0)


def test_the_first_format_is_read():
    """Volumes and three measures were all that it had."""
    measure = {"mean": plain(Interval(0.5, 0.4, 0.6)), "labels": {"a": plain(Interval(0.5, 0, 1))}}
    maps = {"hirescam": {**measure, "thresholds": {"a": 0.3}}}
    tree = {"volumes": 4, "auroc": measure, "average_precision": measure, "organ_iou": maps}
    found = RunEvaluation.from_json(json.dumps(tree))
    assert (found.split, found.scores.auroc.count) == ("test", 1)
    assert found.scores.organ_iou["hirescam"].thresholds == {"a": 0.3}
    assert "| old | 1 of 1 | 0.500 [0.400, 0.600] |" in tables({"old": found})["models"].markdown()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("auroc", "mean", "low"), ..., "auroc.mean.low is missing"),
        (("organ_iou",), [], "organ_iou is no object"),
        (("validation", "auroc", "labels", "nodule", "high"), "x", "high is no number"),
        (("volumes",), True, "volumes is no number"),
        (("grid",), 3, "grid is no list"),
        (("grid", 1), 1.5, r"grid\[1\] is no number"),
        (("head", "maps", "gradcam", "holds"), 1, "gradcam.holds is no true or false"),
        (("completeness", "worst"), 1e999, "Infinity in it"),
    ],
)
def test_files_that_are_no_evaluation_say_where(tmp_path, place, value, message):
    tree = part = json.loads(before("run"))
    for key in place[:-1]:
        part = part[key]
    if value is ...:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as caught:
        RunEvaluation.load(path)
    assert str(caught.value).startswith(f"{path}: not an evaluation (")
