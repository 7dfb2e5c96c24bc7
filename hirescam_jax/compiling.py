"""How programs are compiled on CPU: with the faster of XLA's two convolution libraries."""

from functools import cache

import jax

# YNNPACK for products and sums, not for convolutions: it packs their kernels again at each call
# and has no fast way for their gradients by the kernel; without it XLA takes Eigen's.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


def compiler_options() -> dict[str, str] | None:
    """What to give to an outermost `jax.jit` as `compiler_options`; None but on CPU.

    The numbers are the same up to rounding. The option is an experimental one of XLA: where a
    jaxlib has it no longer, this is None as well.
    """
    return CPU_OPTIONS if jax.default_backend() == "cpu" and _known() else None


@cache
def _known() -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
