"""The compiler options for CPUs: known to this jaxlib, and without effect on the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hirescam_jax import compiling
from hirescam_jax.compiling import compiler_options


@pytest.fixture(autouse=True)
def forget():
    compiling._known.cache_clear()
    yield
    compiling._known.cache_clear()


def convolve(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def gradients(x, w, grad):
    y, pull_back = jax.vjp(convolve, x, w)
    return y, *pull_back(grad)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are for CPUs")
def test_convolutions_are_eigens_and_agree_with_float64():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in [(2, 9, 8, 24), (3, 3, 24, 32), (2, 9, 8, 32)]]
    narrow = [jnp.asarray(a, jnp.float32) for a in arrays]
    options = compiler_options()
    assert options == compiling.CPU_OPTIONS
    compiled = jax.jit(gradients, compiler_options=options).lower(*narrow).compile()
    assert "ynn" not in str(compiled.as_text())
    with jax.enable_x64(True):
        wanted = gradients(*map(jnp.asarray, arrays))
    for got, want in zip(compiled(*narrow), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


def test_there_are_none_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() is None


def test_a_jaxlib_without_the_option_does_without(monkeypatch):
    monkeypatch.setattr(compiling, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert compiler_options() is None
