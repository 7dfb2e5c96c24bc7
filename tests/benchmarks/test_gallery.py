"""The example in which Grad-CAM points to the organ that speaks against the label, by hand."""

import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax import head_verdict
from hirescam_jax.explanations.methods import METHODS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gallery.py"
FIRST, SECOND = (slice(1, 3), slice(1, 3)), (slice(3, 5), slice(3, 5))


@pytest.fixture(scope="module")
def gallery() -> dict:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("slices", "first", "second", "total"),
    [(0, 1 / 2, 3 / 4, 5), (2, 1 / 4, 3 / 8, 2.5)],
    ids=["2D", "3D"],
)
def test_the_numbers_of_the_docstring(gallery, slices, first, second, total):
    shown = gallery["example"](slices)
    assert (shown.score, shown.bias) == (5, 1)
    places = (FIRST, SECOND) if not slices else ((0, *FIRST), (1, *SECOND))

    hires, grad = np.zeros((2, *shown.features.shape))
    hires[places[0]], hires[places[1]] = 4, -3
    grad[places[0]], grad[places[1]] = first, second
    np.testing.assert_array_equal(shown.hirescam, hires)
    np.testing.assert_array_equal(shown.gradcam, grad)
    assert shown.hirescam.sum() + shown.bias == shown.score
    assert shown.gradcam.sum() == total != shown.score - shown.bias

    def peak(map):
        return np.unravel_index(map.argmax(), map.shape)

    in_first, in_second = np.zeros((2, *shown.features.shape), bool)
    in_first[places[0]], in_second[places[1]] = True, True
    assert in_first[peak(shown.hirescam)]
    assert in_second[peak(shown.gradcam)]


def test_the_verdict_on_the_example(gallery):
    weights = jnp.asarray(gallery["example"]().gradient).reshape(-1, 1)
    verdict = head_verdict(lambda x: x.reshape(x.shape[0], -1) @ weights + 1, (1, 6, 6, 1))
    assert verdict.kind == "exact"
    assert verdict.gradcam_difference > 0.1
    assert verdict.holds_for("hirescam")
    assert not any(verdict.holds_for(method) for method in METHODS if method != "hirescam")


def test_the_picture(gallery, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gallery.png"
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--out", str(out)])
    gallery["main"]()
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert out.stat().st_size > 30_000
    assert capsys.readouterr().out.strip() == str(out)
