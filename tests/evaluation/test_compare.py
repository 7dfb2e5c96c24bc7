"""Two runs' maps side by side, and training on permuted labels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax.cli import main as cli
from hirescam_jax.config import Config
from hirescam_jax.data import pipeline
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.pipeline import InMemory, PermutedLabels, chosen_volumes, findings_of
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.errors import UserError
from hirescam_jax.evaluation import compare
from hirescam_jax.evaluation.evaluate import content_of
from hirescam_jax.evaluation.predict import predict
from hirescam_jax.evaluation.result import RunEvaluation, Thresholds, plain
from hirescam_jax.evaluation.summary import Predictions, choose_thresholds, summarise
from hirescam_jax.explanations.cam import normalize_map
from hirescam_jax.explanations.explain import explain
from hirescam_jax.metrics import ORGAN_IOU_THRESHOLDS, organ_iou, similarity
from hirescam_jax.models import AxialNet
from hirescam_jax.runs.run import Header, Run
from hirescam_jax.runs.setup import open_data

DATA = PhantomData(PhantomConfig(shape=(12, 32, 32)), train_size=3, val_size=4, test_size=8)


def run_of(tmp_path, seed: int, **fields) -> Run:
    """A network as it is before any training."""
    model = AxialNet(10, (1,), (4,), "small", (3,), "SAME", **fields)
    config = Config(model=model, data=DATA, batch_size=1, seed=seed)
    source = open_data(config, "test")
    config = dataclasses.replace(config, model=model.clone(num_labels=len(source.labels)))
    init = jax.jit(config.model.init)
    variables = init(jax.random.key(seed), jnp.zeros((1, *source.shape)))
    return Run(tmp_path / f"run{seed}", Header.of(config, source), variables, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [run_of(folder, seed) for seed in (0, 1)]


def test_maps_of_two_runs_by_hand(runs):
    found = compare.compare(runs, 8)
    test = open_data(runs[0].config, "test")
    values = []
    for index in chosen_volumes(test, 8):
        item = test[index]
        volume = jnp.asarray(item["volume"])[None]
        present = np.flatnonzero(item["findings"].any(1))
        maps = [explain(r.model, r.variables, r.normalize(volume)).maps for r in runs]
        values += np.asarray(similarity(*maps).spearman)[0, present].tolist()
    assert found.pairs == len(values)
    assert (found.volumes, found.patients) == (8, 8)
    spearman = found.methods["hirescam"].spearman
    assert spearman.value == pytest.approx(np.nanmean(values), abs=1e-4)
    assert spearman.low < spearman.value < spearman.high
    assert abs(found.methods["random"].spearman.value) < 0.1
    for of_method in (
        found.methods["hirescam"],
        *[v.hirescam for v in found.labels.values()],
    ):
        measures = of_method.organ_iou_a, of_method.organ_iou_b, of_method.organ_iou_gain
        a, b, gain = (measure.value for measure in measures)
        if None not in (a, b):
            assert 0 <= a <= 1
            assert gain == pytest.approx(a - b, abs=1e-6)
    assert "NaN" not in json.dumps(plain(found), allow_nan=False)
    lines = compare.table(found).splitlines()
    assert lines[0] == (f"A: {runs[0].path}, step 1, seed 0; thresholds of its validation split")
    assert any(line.startswith("A and a random map") for line in lines)


def maps_of(run: Run, volumes: list[int]) -> dict[str, list]:
    """By label the normalised HiResCAM maps of the volumes that have it, each with its organs."""
    test = open_data(run.config, "test")
    found: dict[str, list] = {label: [] for label in run.labels}
    for index in volumes:
        item = test[index]
        volume = jnp.asarray(item["volume"])[None]
        maps = explain(run.model, run.variables, run.normalize(volume)).maps
        allowed = (item["findings"] > 0) @ item["regions"].reshape(len(test.regions), -1) > 0
        for k in np.flatnonzero(item["findings"].any(1)):
            label = run.labels[k]
            inside = allowed[k].reshape(1, 1, *maps.shape[2:])
            found[label].append((normalize_map(maps[:, [k]]), inside))
    return found


def clear_threshold(maps: list) -> float:
    """That of 0.1 to 0.4 which is the farthest from every cell's value: another program rounds
    those in another way, and a cell must not change sides."""
    values = np.concatenate([np.zeros(1), *(np.ravel(map_) for map_, _ in maps)])
    some = ORGAN_IOU_THRESHOLDS[(ORGAN_IOU_THRESHOLDS >= 0.1) & (ORGAN_IOU_THRESHOLDS <= 0.4)]
    return float(some[np.abs(values[:, None] - some).min(0).argmax()])


def evaluation_of(run: Run, split: Predictions, thresholds: Thresholds, content: str) -> dict:
    """An evaluation.json of the validation split with such thresholds of both methods."""
    scores = dataclasses.replace(summarise(run.labels, split, split, 5), content=content)
    of_maps = {
        name: dataclasses.replace(of_map, thresholds=thresholds)
        for name, of_map in scores.organ_iou.items()
    }
    other = dataclasses.replace(scores, organ_iou=of_maps, content="of another split")
    return plain(RunEvaluation(step=1, scores=other, validation=scores))


def test_thresholds_are_those_of_the_whole_validation_split(runs, tmp_path, monkeypatch):
    """Of an evaluation beside the run, or measured anew; never of a few volumes."""
    first, second = (dataclasses.replace(run, path=tmp_path / run.path.name) for run in runs)
    validation = open_data(first.config, "val")
    split = predict(first, validation)
    assert content_of(validation) == content_of(validation, split)
    best = choose_thresholds(split)["hirescam"]
    found = compare.compare([first, second], 2).runs
    assert [run.thresholds_from for run in found] == ["validation split"] * 2
    expected = [float(ORGAN_IOU_THRESHOLDS[i]) if i >= 0 else None for i in best]
    assert list(found[0].thresholds["hirescam"].values()) == expected

    volumes = chosen_volumes(open_data(first.config, "test"), 2).tolist()
    maps = maps_of(first, volumes)
    thresholds = {label: clear_threshold(of_label) for label, of_label in maps.items()}
    evaluation = evaluation_of(first, split, thresholds, content_of(validation))
    for run in (first, second):
        run.path.mkdir()
        (run.path / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setattr(compare, "predict", None)  # not to be called
    found = compare.compare([first, second], 2)
    assert [run.thresholds_from for run in found.runs] == ["evaluation.json"] * 2
    by_hand = {
        label: [float(organ_iou(*pair, [thresholds[label]])[0, 0, 0]) for pair in of_label]
        for label, of_label in maps.items()
    }
    assert sum(len(values) for values in by_hand.values()) == found.pairs
    for label, of_label in found.labels.items():
        values = np.array(by_hand[label])
        measure = of_label.hirescam.organ_iou_a
        assert of_label.pairs == len(values)
        assert measure.pairs == (~np.isnan(values)).sum()
        assert measure.labels == (measure.pairs > 0)
        assert measure.low is None  # of two patients
        if measure.pairs:
            assert measure.value == pytest.approx(np.nanmean(values), abs=1e-5)
    # Of other weights, of other volumes, or broken: measured anew.
    monkeypatch.undo()
    for other in (
        {**evaluation, "step": 2},
        {**evaluation, "validation": {**evaluation["validation"], "content": "another"}},
        {**evaluation, "organ_iou": {}},
        {"step": 1, "organ_iou": {}},
        [],
    ):
        (first.path / "evaluation.json").write_text(json.dumps(other))
        assert compare._thresholds(first, validation)[1] == "validation split"


def test_means_over_fewer_findings_say_so(runs, tmp_path):
    """A label without a threshold has no OrganIoU, in either run."""
    paths = [tmp_path / "a", tmp_path / "b"]
    first, second = (
        dataclasses.replace(run, path=path) for run, path in zip(runs, paths, strict=True)
    )
    result = compare.compare([first, second], 5)
    label, pairs = next((n, of.pairs) for n, of in result.labels.items() if of.pairs > 1)
    for run, without in ((first, label), (second, None)):
        thresholds = {n: None if n == without else 0.02 for n in run.labels}
        validation = open_data(run.config, "val")
        split = predict(run, validation)
        evaluation = evaluation_of(run, split, thresholds, content_of(validation))
        run.path.mkdir()
        (run.path / "evaluation.json").write_text(json.dumps(evaluation))
    found = compare.compare([first, second], 5)
    left = found.methods["hirescam"]
    for name in ("organ_iou_a", "organ_iou_b", "organ_iou_gain"):
        assert getattr(found.labels[label].hirescam, name).value is None
        assert getattr(left, name).pairs <= found.pairs - pairs
        assert getattr(left, name).labels < len(found.labels)
    a, b, gain = (m.value for m in (left.organ_iou_a, left.organ_iou_b, left.organ_iou_gain))
    assert gain == pytest.approx(a - b, abs=1e-6)
    text = compare.table(found)
    of = f"({left.organ_iou_a.pairs} of {left.organ_iou_a.labels} labels)"
    assert of in text
    assert "(n): over n of the findings" in text


def test_a_run_is_like_itself(runs):
    found = compare.compare([runs[0], runs[0]], 3).methods
    for method in ("hirescam", "gradcam"):
        for kind in ("ssim", "spearman", "spearman_absolute"):
            assert getattr(found[method], kind).value == pytest.approx(1, abs=1e-5)
        assert found[method].organ_iou_gain.value == 0


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    first, second = runs
    with pytest.raises(UserError, match="--volumes 9: the test split has 8 volumes"):
        compare.compare(runs, 9)
    header = dataclasses.replace(second.header, shape=(12, 32, 33))
    with pytest.raises(
        UserError, match=r"run0 has shape .*32\), .*run1 .*33\): compare runs alike"
    ):
        compare.compare([first, dataclasses.replace(second, header=header)], 2)
    data = dataclasses.replace(DATA, test_size=4)
    config = dataclasses.replace(second.config, data=data)
    header = dataclasses.replace(second.header, config=config)
    with pytest.raises(UserError, match="were trained on other data"):
        compare.compare([first, dataclasses.replace(second, header=header)], 2)


def test_command(runs, tmp_path, monkeypatch, capsys):
    by_path = {run.path: run for run in runs}
    for path, run in by_path.items():
        path.mkdir(exist_ok=True)
        (path / "run.json").write_text(run.header.to_json())
    monkeypatch.setattr(compare, "load_run", lambda path, which: by_path[path])
    out = tmp_path / "compared.json"
    paths = [str(run.path) for run in runs]
    cli.main(["compare", *paths, "--volumes", "2", "--out", str(out)])
    assert json.loads(out.read_text())["volumes"] == 2
    assert "OrganIoU A" in capsys.readouterr().out


# -- permuted labels ------------------------------------------------------------------------------


class Numbered:
    """Findings tell the volume; three patients with 2, 3 and 1 volumes."""

    labels, regions, shape, spacing_mm = ("a",), ("left",), (2, 2, 2), (1.0, 1.0, 1.0)
    patients = np.array(["p", "p", "q", "q", "q", "r"])
    digest = "x"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index):
        return {
            "volume": np.full((2, 2, 2), index, np.int16),
            "findings": np.array([[index]], np.uint8),
            "index": np.int32(index),
        }


def test_findings_are_those_of_another_patient(monkeypatch):
    source = Numbered()
    monkeypatch.setattr(pipeline, "patients_of", lambda source: source.patients.tolist())
    orders = set()
    for seed in range(20):
        permuted = PermutedLabels(source, seed)
        items = [permuted[i] for i in range(6)]
        assert [item["volume"][0, 0, 0] for item in items] == list(range(6))
        given = np.array([item["findings"][0, 0] for item in items])
        others = [set(source.patients[given[source.patients == p]]) for p in "pqr"]
        assert sorted(other.pop() for other in others) == ["p", "q", "r"]
        assert not any(others)  # all of a patient's are of one other
        again = [PermutedLabels(source, seed)[i]["findings"][0, 0] for i in range(6)]
        assert again == given.tolist()
        batch = pipeline.make_batch(permuted, [4, 1])
        assert batch["findings"][:, 0, 0].tolist() == [given[4], given[1]]
        assert batch["volume"][:, 0, 0, 0].tolist() == [4, 1]
        orders.add(tuple(given))
    assert len(orders) == 6
    assert permuted.digest == "x"


def test_the_config_permutes_the_training_split_only():
    model = AxialNet(2, (1,), (4,), "small", (3,), "SAME")
    config = Config(model, DATA, labels=("nodule", "cardiomegaly"), permute_labels=True)
    given = dataclasses.replace(config, permute_labels=False)
    assert isinstance(open_data(config, "train"), PermutedLabels)
    for split in ("val", "test"):
        assert not isinstance(open_data(config, split), PermutedLabels)
    permuted, source = (InMemory(open_data(c, "train"), 0) for c in (config, given))
    others = PermutedLabels(source, config.seed).other
    assert sorted(others) == [0, 1, 2]
    for i, other in enumerate(others):
        np.testing.assert_array_equal(permuted[i]["findings"], source[other]["findings"])
        np.testing.assert_array_equal(permuted[i]["regions"], source[i]["regions"])
    np.testing.assert_array_equal(findings_of(open_data(given, "train"), 1), source[1]["findings"])
