"""What several test files read and none changes."""

from pathlib import Path

import pytest

from tests.clip import make_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP checkpoint."""
    return make_clip(tmp_path_factory.mktemp("clip"))
