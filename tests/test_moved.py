"""Names of modules that users have in their configs and scripts."""

import importlib

import pytest

from hirescam_jax.moved import MOVED


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("hirescam_jax.preprocess", "Preprocess"),
        ("hirescam_jax.demo", "demo_config"),
        ("hirescam_jax.paper", "small_set"),
        ("hirescam_jax.paper", "whole_set"),
        ("hirescam_jax.map_store", "open_maps"),
        ("hirescam_jax.data.phantom", "PhantomConfig"),
        ("hirescam_jax.weights", "read_variables"),
        ("hirescam_jax.config", "PhantomData"),
        ("hirescam_jax.config", "StoreData"),
    ],
)
def test_former_names_of_modules(module, name):
    former = getattr(importlib.import_module(module), name)
    present = importlib.import_module(MOVED.get(module, module))
    assert former is getattr(present, name)
    assert callable(former)


def test_what_a_module_never_had():
    former = importlib.import_module("hirescam_jax.preprocess")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        former.nothing_of_this_name  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hirescam_jax.never_was")
