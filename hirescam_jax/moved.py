"""Modules that configs and scripts of users import under the names that they had in version 0.1."""

import importlib
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "hirescam_jax.demo": "hirescam_jax.experiments.demo",
    "hirescam_jax.map_store": "hirescam_jax.inference.zarr",
    "hirescam_jax.paper": "hirescam_jax.experiments.papers",
    "hirescam_jax.preprocess": "hirescam_jax.config",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its former name, and takes from the present one what is asked for."""

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        present = MOVED[module.__name__]
        vars(module)["__getattr__"] = lambda name: getattr(importlib.import_module(present), name)
