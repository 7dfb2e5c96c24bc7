"""How programs are compiled and run on CPU: the faster of XLA's two convolution libraries, and
memory that is used again."""

import ctypes
import platform
from functools import cache

import jax

# YNNPACK for products and sums, not for convolutions: it packs their kernels again at each call
# and has no fast way for their gradients by the kernel; without it XLA takes Eigen's.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}
# Parameters of glibc's mallopt, as in malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


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


def reuse_memory() -> None:
    """Lets programs on CPU take the memory that the last one has freed; for the whole process.

    XLA allocates a program's temporaries anew at each call, and glibc gives blocks of that size
    back to the system at once, which then maps and clears them page by page: a fifth to a third of
    a train step. Kept are up to 2 GiB. To be called before JAX is first used, since programs have
    to run in the thread that calls them: the other threads' heaps hold no large blocks. Without
    effect but on CPU with glibc.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
