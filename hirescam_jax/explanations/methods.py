"""The methods that make maps from a head and its features: the one registry, which all that names
them reads. JAX is imported when maps are made, so that a command line can name them at once.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias


@dataclasses.dataclass(frozen=True)
class Method:
    """method(head, features, labels=None, **options) -> maps [B, L, *grid], as `cam.hirescam`.

    title: as texts and pictures call it.
    load: imports the function that makes the maps.
    over_grid: it sums over the whole grid, and takes `axis_name` and `positions` where that is
        split over devices.
    of_pooling: it is defined for heads of global pooling and one linear layer only, which it tries
        out, so that the grid must not be split.
    evaluated: `hirescam evaluate` measures it; the others are for a look beside HiResCAM.
    """

    title: str
    load: Callable[[], Callable[..., Any]]
    over_grid: bool = False
    of_pooling: bool = False
    evaluated: bool = False

    def __call__(self, head: Any, features: Any, labels: Any = None, **options: Any) -> Any:
        return self.load()(head, features, labels, **options)


def _cam() -> Any:
    from hirescam_jax.explanations import cam

    return cam


def _family() -> Any:
    from hirescam_jax.explanations import family

    return family


METHODS = {
    "hirescam": Method("HiResCAM", lambda: _cam().hirescam, evaluated=True),
    "gradcam": Method("Grad-CAM", lambda: _cam().gradcam, over_grid=True, evaluated=True),
    "gradcam_plusplus": Method("Grad-CAM++", lambda: _family().gradcam_plusplus, over_grid=True),
    "xgradcam": Method("XGrad-CAM", lambda: _family().xgradcam, over_grid=True),
    "layercam": Method("LayerCAM", lambda: _family().layercam),
    "eigencam": Method("Eigen-CAM", lambda: _family().eigencam, over_grid=True),
    "ablationcam": Method("Ablation-CAM", lambda: _family().ablationcam),
    "cam": Method("CAM", lambda: _family().class_activation_map, of_pooling=True),
}
EVALUATED = tuple(name for name, method in METHODS.items() if method.evaluated)

if TYPE_CHECKING:
    MethodName: TypeAlias = str
else:  # commands list the choices, and refuse others
    MethodName = Literal[tuple(METHODS)]
