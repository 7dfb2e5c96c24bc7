"""The methods of `explain` by name, where importing JAX would be too much: for command lines."""

from typing import Literal, TypeAlias

Method: TypeAlias = Literal[
    "hirescam",
    "gradcam",
    "gradcam_plusplus",
    "xgradcam",
    "layercam",
    "eigencam",
    "ablationcam",
    "cam",
]
