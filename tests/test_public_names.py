"""What is importable from the package itself, and what that costs."""

import ast
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hirescam_jax

NAMES = """
    ORGAN_IOU_THRESHOLDS VGG AxialNet BodyConv CTNet Conv3DNet DenseNet Explanation HeadVerdict
    MobileNetV2 ResNetClassifier ablationcam allowed_of class_activation_map classification_loss
    eigencam explain from_torch gradcam gradcam_plusplus gradient_x_input guided_attention
    head_verdict hirescam input_gradient integrated_gradients labels_of layercam mask_loss
    normalize_map occlusion organ_iou read_weights scorecam smoothgrad to_torch write_weights
    xgradcam load_run open_maps read_variables
"""
PROMISED = NAMES.split()


def test_every_name_is_there():
    assert sorted(hirescam_jax.__all__) == sorted(PROMISED)
    assert set(PROMISED) <= set(dir(hirescam_jax))
    starred: dict = {}
    exec("from hirescam_jax import *", starred)
    for name in PROMISED:
        assert starred[name] is getattr(hirescam_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'hiresam'"):
        _ = hirescam_jax.hiresam
    assert pickle.loads(pickle.dumps(hirescam_jax.hirescam)) is hirescam_jax.hirescam


def test_type_checkers_see_the_same_names_at_the_same_place():
    tree = ast.parse(Path(hirescam_jax.__file__).read_text())
    (shown_only,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(shown_only.test) == "TYPE_CHECKING"
    shown = {
        alias.name: node.module.removeprefix("hirescam_jax.")
        for node in shown_only.body
        for alias in node.names
    }
    assert shown == hirescam_jax._HOMES
    assert sorted(shown) == sorted(hirescam_jax.__all__)
    for name, module in shown.items():
        home = import_module(f"hirescam_jax.{module}")
        assert getattr(hirescam_jax, name) is getattr(home, name)


def imported_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_names_cost_what_they_need():
    slow = {"orbax", "grain", "scipy.stats", "matplotlib"}
    alone = imported_after("import hirescam_jax")
    assert not alone & (slow | {"jax", "flax", "numpy"})
    use = """
import numpy as np
from hirescam_jax import ORGAN_IOU_THRESHOLDS, hirescam, organ_iou
import hirescam_jax
features = np.ones((1, 2, 2, 3), np.float32)
maps = hirescam(lambda x: x.mean((1, 2)), features)
organ_iou(maps, maps > 0, ORGAN_IOU_THRESHOLDS)
hirescam_jax.losses, hirescam_jax.metrics, hirescam_jax.models.AxialNet
"""
    used = imported_after(use)
    assert not used & slow
    assert {"jax", "hirescam_jax.losses"} <= used
