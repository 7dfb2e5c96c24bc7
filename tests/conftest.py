"""Shape annotations are executed: every call in a test is checked against its signature."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(
    "hirescam_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

DATA = Path(os.environ.get("HIRESCAM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CTs for tests; a test that needs it is skipped where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set HIRESCAM_TEST_DATA to its folder")
    return DATA
