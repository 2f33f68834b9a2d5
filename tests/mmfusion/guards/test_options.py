"""--guards.*: what is built, what is refused, and that a guard's error is one message."""

import errno
from pathlib import Path

import pytest

from mmfusion import cli
from mmfusion.guards.disk import RoomFirst, RoomyFiles
from mmfusion.guards.divergence import RanksAgree
from mmfusion.guards.error import GuardError
from mmfusion.guards.hang import HangWatch
from mmfusion.guards.options import Guards
from mmfusion.guards.slowdown import SlowdownWarning
from mmfusion.run import FusionCLI
from tests.small_run import small_shards

KINDS = (RoomFirst, RanksAgree, SlowdownWarning, HangWatch)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def parsed(shards: Path, run: Path, *given: str) -> FusionCLI:
    files = ("base", "encoders/tiny", "fusion_gated")
    arguments = [*(f"--config=experiments/{name}.yaml" for name in files), f"--data.init_args.path={shards}"]
    return FusionCLI.parse([*arguments, "--wandb.mode=disabled", *given], run)


def test_a_run_has_the_guards_that_its_options_name(shards, tmp_path):
    run = parsed(shards, tmp_path / "e" / "v", "--guards.ranks_every=7", "--guards.slower=null")
    guards = [part for part in run.trainer.callbacks if isinstance(part, KINDS)]
    assert [type(part) for part in guards] == [RanksAgree, HangWatch, RoomFirst]
    assert guards[0].every == 7
    assert guards[1].minutes == 30
    assert guards[1].folder == tmp_path / "e" / "v" / "stacks"
    assert type(run.trainer.strategy.checkpoint_io) is RoomyFiles


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ranks_every": 0}, r"guards.ranks_every is 0; expected optimizer steps from 1 on, or null"),
        ({"slower": 1.0}, r"guards.slower is 1.0; expected a factor from 1.1 on"),
        ({"hang_minutes": -1.0}, r"guards.hang_minutes is -1.0; expected minutes from 0.01 on"),
        ({"hang_minutes": float("nan")}, r"guards.hang_minutes is nan"),
    ],
)
def test_values_that_mean_nothing_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Guards(**given)


def test_an_unknown_guard_is_refused_with_the_nearest(shards, tmp_path):
    with pytest.raises(ValueError, match=r"guards.hang_minutes"):
        parsed(shards, tmp_path / "e" / "v", "--guards.hang_hours=3")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GuardError("the loss is not finite at step 3"), "the loss is not finite at step 3"),
        (
            OSError(errno.ENOSPC, "No space left on device", "metrics.csv"),
            "[Errno 28] No space left on device: 'metrics.csv'. Make room there; a run that was training goes on with "
            "RESUME=auto",
        ),
    ],
)
def test_a_guards_error_and_a_full_disk_are_one_message(monkeypatch, capsys, error, said):
    def stops(_: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "fit", stops)
    monkeypatch.setattr("sys.argv", ["mmfusion", "fit"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == f"error: {said}\n"
