import pytest
from rich.console import Console

from tests.chaos.__main__ import chaos


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_six_times_it_ends_as_if_it_never_was(tmp_path, monkeypatch):
    """A kill of each kind, twice; `make bench-chaos` has twenty."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert chaos(tmp_path, 6, 1, Console()) == []
