"""What a long task says where no terminal is."""

import pytest

from hirescam_jax import progress as module
from hirescam_jax.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_tells_how_much_is_left(clock: list[float], capsys: pytest.CaptureFixture):
    for _ in progress([0] * 100, "preparing", "volume"):
        clock[0] += 4
    lines = capsys.readouterr().err.splitlines()
    # 4 s each, a line once more than 10 s have passed: after 3, 6, 9...
    assert lines[0] == "preparing: 3 of 100 volumes, 06:28 left"
    assert lines[-1] == "preparing: 99 of 100 volumes, 00:04 left"
    assert len(lines) == 33


def test_without_a_length_there_is_no_guess(clock: list[float], capsys: pytest.CaptureFixture):
    for _ in progress(iter(range(4)), "reading", "file"):
        clock[0] += 11
    assert capsys.readouterr().err.splitlines() == [f"reading: {n} files" for n in (1, 2, 3)]
