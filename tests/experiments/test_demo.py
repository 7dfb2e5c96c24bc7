"""The demonstration at its smallest: both trainings, their figures and the page."""

import dataclasses
import json
from pathlib import Path

import pytest

from hirescam_jax.data.phantom.findings import LABELS
from hirescam_jax.data.phantom.phantom import PhantomConfig
from hirescam_jax.data.specs import PhantomData
from hirescam_jax.experiments.demo import demo, demo_config
from hirescam_jax.models import AxialNet
from hirescam_jax.reports.text import MAP_NAMES
from tests.web_page import Page


@pytest.mark.long
def test_demo_writes_its_figures_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = AxialNet(blocks=(1,), widths=(4,), stem="small", conv_widths=(4,), conv_padding="SAME")
    data = PhantomData(PhantomConfig(shape=(24, 24, 24)), train_size=8, val_size=8, test_size=24)
    config = dataclasses.replace(demo_config(), model=model, data=data, epochs=1)
    metrics = demo(tmp_path / "demo", config)
    stored = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    details = stored.pop("details")
    assert stored == metrics
    assert {"baseline", "mask_loss"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    assert str(tmp_path / "demo" / "report.html") in capsys.readouterr().out

    page = Page((tmp_path / "demo" / "report.html").read_text(encoding="utf-8"))
    assert (len(page.images), page.tags["svg"], page.tags["table"]) == (6, 2, 2)
    assert len({alt for alt, _ in page.images}) == 6  # each shows another finding
    words = page.text
    assert "trained twice on 8 procedural chest CTs of 24 × 24 × 24 voxels" in words
    for title in (*MAP_NAMES.values(), *(label.replace("_", " ") for label in LABELS)):
        assert title in words
    for name in ("baseline", "mask_loss"):
        for label in LABELS:
            value = details[name]["auroc"]["labels"][label]["value"]
            assert ("n/a" if value is None else f"{value:.3f}") in words
        for of_map in details[name]["lesions"].values():
            for measure in ("pointing", "energy", "iou"):
                assert f"{of_map[measure]['mean']['value']:.3f}" in words
