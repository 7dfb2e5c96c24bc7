"""The whole way on a real CT: lesions, store, training, evaluation, explanation, localisation."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from hirescam_jax.cli import main as cli

CONFIG = """
from hirescam_jax.config import Adam, Config, StoreData
from hirescam_jax.models import AxialNet
from hirescam_jax.config import Preprocess

config = Config(
    model=AxialNet(
        blocks=(1,), widths=(16,), stem="small", conv_widths=(16,), conv_padding="SAME"
    ),
    data=StoreData(path="{store}"),
    preprocess=Preprocess(flip=0.0, rotate=0.0),
    optimizer=Adam(learning_rate=1e-2),
    labels=("pleural_effusion",),
    mask_weight=10.0,
    batch_size=8,
    epochs=15,
)
"""
COPIES, LABEL = 120, "pleural_effusion"


@pytest.mark.long
def test_maps_land_on_effusions_in_the_scanners_space(real_data: Path, tmp_path: Path):
    """A minute. The evidence must lie on the lesion itself, which no training has seen, and not
    only in its lung: well above any point of that lung, and above another patient's map."""
    lesions, store, run = tmp_path / "lesions", tmp_path / "store", tmp_path / "run"
    ct = real_data / "ct" / "acil_ct64_ct.nii.gz"
    make = ["lesions", str(ct), "--out", str(lesions), "--labels", LABEL, "--workers", "0"]
    cli.main([*make, "--copies", str(COPIES), "--chance", "0.5"])
    prepare = ["prepare", "nifti", str(lesions), "--out", str(store), "--workers", "0"]
    prepare += ["--spacing", "8", "8", "8", "--shape", "36", "48", "48"]
    prepare += ["--regions", str(lesions / "masks"), "--region-suffix", "_regions"]
    cli.main([*prepare, "--region-map", str(lesions / "regions.json")])
    with (lesions / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    header = json.loads((store / "store.json").read_text())
    splits = [row["split"] for row in rows]
    assert header["counts"] == {name: splits.count(name) for name in ("train", "val", "test")}
    assert sum(header["counts"].values()) == COPIES
    assert header["rejects"] == header["region_fallbacks"] == 0

    (tmp_path / "config.py").write_text(CONFIG.format(store=store))
    cli.main(["train", str(tmp_path / "config.py"), "--run", str(run)])
    cli.main(["evaluate", str(run)])
    sick = [row["id"] for row in rows if row["split"] == "test" and row[LABEL] == "1"]
    explain = ["explain", str(run), "--out", str(tmp_path / "explained"), "--labels", LABEL]
    files = [str(lesions / f"{name}.nii.gz") for name in sick]
    cli.main([*explain, "--no-pictures", "--batch-size", "4", "--input", *files])

    metrics = json.loads((run / "evaluation.json").read_text())
    assert metrics["auroc"]["labels"][LABEL]["value"] > 0.9
    for name in sick:
        scan = nibabel.load(lesions / f"{name}.nii.gz")
        found = nibabel.load(tmp_path / "explained" / name / f"{LABEL}_hirescam.nii.gz")
        assert found.shape == scan.shape
        np.testing.assert_array_equal(found.affine, scan.affine)

    out = tmp_path / "localization.csv"
    localize = ["localize", str(tmp_path / "explained"), "--masks", str(lesions / "masks")]
    cli.main([*localize, "--label-map", str(lesions / "lesions.json"), "--out", str(out)])
    with out.open() as file:
        cases = list(csv.DictReader(file))
    assert [case["id"] for case in cases] == sick
    mean = {
        name: np.mean([float(case[name]) for case in cases])
        for name in ("hit", "energy", "other_hit", "other_energy", "organ", "chance")
    }
    assert mean["hit"] > 3 * mean["organ"] > 3 * mean["chance"]
    assert mean["hit"] > mean["other_hit"]
    assert mean["energy"] > 1.5 * mean["organ"]
    assert mean["energy"] > mean["other_energy"]
