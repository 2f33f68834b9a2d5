"""Shapes and types are checked at run time in tests; each test process uses one core, xdist the others."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook names it)

install_import_hook(["mmfusion", "datamodules"], "tests.typecheck.check")

CACHES = tempfile.TemporaryDirectory(prefix="mmfusion-caches-")  # nothing of a test in the user's own
os.environ["MMFUSION_CACHE"] = CACHES.name

FASHION = Path(__file__).parents[2] / "shared" / "data" / "fashion"


def pytest_collection_finish(session: pytest.Session) -> None:
    ddp = sys.modules.get("tests.ddp")
    if ddp is not None and not session.config.option.collectonly:
        ddp.fork_server()


@pytest.fixture(scope="session")
def fashion() -> Path:
    """The fashion benchmark's folder; tests that need it skip where it is absent."""
    if not FASHION.is_dir():
        pytest.skip(f"{FASHION} is absent")
    return FASHION


@pytest.fixture(autouse=True)
def own_cache(monkeypatch) -> Iterator[None]:
    """No test finds what another one has cached. The folder is made by who uses it."""
    with tempfile.TemporaryDirectory(dir=CACHES.name, ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("MMFUSION_CACHE", folder)
        yield
