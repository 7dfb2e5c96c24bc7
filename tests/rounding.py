"""How far apart two programs may be that compute the same: by rounding alone.

Compiled for another processor, another batch size, some labels or all, eagerly or at once, a sum is
added up in another order, by vectors of another width, with or without fused multiply-adds. Only
the same program has to give the same bits; so do programs that move, count or compare numbers.
"""

from typing import Any

import numpy as np


def assert_same_but_for_rounding(
    found: Any, expected: Any, *, terms: int, scale: Any = None, dtype: Any = None
) -> None:
    """Both are the value of one formula; NaN only where both are.

    In whatever order a sum of n products is added up, fused or not, it is off by at most n u / (1 -
    n u) of the sum of the terms' absolute values, u = eps / 2 being the largest relative error of
    one operation (N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
    Two programs are hence at most n eps of it apart, which is the bound here. A formula of several
    steps has the sum of their n.

    Args:
        terms: n: roundings on the longest way from the inputs to a value. A sum of n products has
            n, or n + 1 where it is divided.
        scale: the sum of the absolute values of the terms, or a bound on it, as a number or of the
            form of `expected`. By default the largest absolute value of `expected`, which is one
            where little cancels.
        dtype: in which it is computed; by default that of `found`.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    eps = np.finfo(found.dtype if dtype is None else dtype).eps
    if scale is None:
        scale = np.nanmax(np.abs(expected), initial=0)
    bound = np.broadcast_to(terms * eps * np.asarray(scale, np.float64), expected.shape)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    beyond = apart > bound
    if beyond.any():
        worst = np.unravel_index(np.argmax(np.where(beyond, apart / bound, 0)), expected.shape)
        raise AssertionError(
            f"{beyond.sum()} of {beyond.size} values are more apart than {terms} roundings of "
            f"{np.max(scale):.3g}; the worst at {tuple(map(int, worst))}: {found[worst]!r} and "
            f"{expected[worst]!r}, {apart[worst] / bound[worst]:.1f} times as far"
        )
