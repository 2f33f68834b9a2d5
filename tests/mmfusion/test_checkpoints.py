"""last.ckpt: a run that goes on from it, once or several times, leaves out no step and no validation; always whole."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from lightning import Callback

from mmfusion.checkpoints import BEFORE, BEST, LAST, BestCheckpoint, LastCheckpoint, WholeFiles, best_of, stage_file
from mmfusion.sums import SUMS
from tests.small_run import small_data, small_module, small_shards, small_trainer, three_stages

STEPS = 15  # of which an epoch has 3


class Keep(LastCheckpoint):
    """Keeps a copy of each checkpoint, named by its step."""

    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        shutil.copy(filepath, Path(filepath).with_name(f"{trainer.global_step}.ckpt"))


class Notes(Callback):
    def __init__(self) -> None:
        self.said: list[tuple] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.said.append(
            (trainer.global_step, trainer.current_epoch, outputs["loss"].item(), batch.product.id.tolist())
        )

    def on_validation_end(self, trainer, pl_module):
        self.said.append((trainer.global_step, "validated", float(trainer.callback_metrics["val/primary"])))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def run(shards: Path, folder: Path, since: Path | None = None, **validation) -> list[tuple]:
    notes, module = Notes(), small_module(dropout=0.1, stages=three_stages(4, 8))
    trainer = small_trainer(
        folder, notes, Keep(folder, 1), steps=STEPS, enable_checkpointing=True, limit_val_batches=1.0, **validation
    )
    trainer.fit(module, small_data(shards), ckpt_path=since, weights_only=True)
    return notes.said


@pytest.mark.parametrize(
    ("validation", "chains"),
    [
        ({"check_val_every_n_epoch": 3}, [(9,), (3, 12)]),
        pytest.param({"check_val_every_n_epoch": 3}, [(6, 9), (6, 7, 12), (9, 12)], marks=pytest.mark.slow),
        ({"check_val_every_n_epoch": 3, "max_epochs": 5}, [(3, 6, 9)]),
        ({"val_check_interval": 2}, [(2,)]),
        pytest.param({"val_check_interval": 2}, [(2, 5), (3, 6), (5, 6, 11)], marks=pytest.mark.slow),
        pytest.param(
            {"val_check_interval": 4, "check_val_every_n_epoch": None},
            [(4,), (4, 6), (3, 8, 12), (6, 12)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_steps_and_validations_after_any_resumes(shards, tmp_path, validation, chains):
    straight = run(shards, tmp_path / "straight", **validation)
    assert [line[0] for line in straight if line[1] != "validated"] == list(range(1, STEPS + 1))
    assert sum(line[1] == "validated" for line in straight) >= 1
    for chain in chains:
        before = tmp_path / "straight"
        for step in chain:
            folder = tmp_path / f"{chain}-{step}"
            said = run(shards, folder, before / f"{step}.ckpt", **validation)
            assert said == [line for line in straight if line[0] > step], (chain, step)
            before = folder


@pytest.mark.parametrize("seldom", [{"check_val_every_n_epoch": 4}, {"val_check_interval": 3}], ids=str)
@pytest.mark.parametrize("steps", [14, 15])  # in the middle of an epoch, and at its end
def test_the_last_step_is_always_validated(shards, tmp_path, seldom, steps):
    notes, best = Notes(), BestCheckpoint(tmp_path)
    trainer = small_trainer(
        tmp_path, notes, best, LastCheckpoint(tmp_path), steps=steps, enable_checkpointing=True, limit_val_batches=1.0,
        **seldom,
    )  # fmt: skip
    trainer.fit(small_module(stages=three_stages(4, 13)), small_data(shards), weights_only=True)
    validated = {line[0]: line[2] for line in notes.said if line[1] == "validated"}
    assert max(validated) == steps
    assert len(validated) > 1
    in_last_stage = {step: primary for step, primary in validated.items() if step > 13}
    assert torch.load(tmp_path / BEST, weights_only=True)["global_step"] == max(in_last_stage, key=in_last_stage.get)
    assert best.best_model_score == max(in_last_stage.values())


class Ask(Callback):
    """Asks for a checkpoint before each batch whose number (from 0, over epochs) is in `batches`."""

    def __init__(self, last: LastCheckpoint, batches: set[int]) -> None:
        self.last, self.batches, self.made = last, batches, 0
        self.saved: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.saved.append((self.made, self.last.saved_step))  # of each batch that begins: what has been saved
        if self.made in self.batches:
            self.last.due_now()
        self.made += 1


def asked(shards: Path, folder: Path, batches: set[int], since: Path | None = None, **options) -> tuple[Ask, list]:
    last, notes, module = Keep(folder), Notes(), small_module(dropout=0.1, stages=three_stages(2, 4))
    ask = Ask(last, batches)
    trainer = small_trainer(folder, ask, notes, last, steps=6, enable_checkpointing=True, **options)
    trainer.fit(module, small_data(shards), ckpt_path=since, weights_only=True)
    return ask, notes.said


def test_a_checkpoint_that_is_asked_for_is_made_within_the_step(shards, tmp_path):
    """Or after the validation that follows the step, and never amid the batches of one step."""
    everything = {"limit_val_batches": 1.0, "val_check_interval": 2}
    ask, straight = asked(shards, tmp_path / "a", {0, 1, 4}, **everything)
    assert ask.saved == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3), (5, 5)], "3 is the end of an epoch"
    for step in (1, 2, 5):
        _, said = asked(shards, tmp_path / f"a{step}", set(), tmp_path / "a" / f"{step}.ckpt", **everything)
        assert said == [line for line in straight if line[0] > step], step


def test_amid_the_batches_of_a_step_it_waits_for_their_last(shards, tmp_path):
    ask, straight = asked(shards, tmp_path / "a", {0, 4}, accumulate_grad_batches=2)
    assert ask.saved[:7] == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (6, 4)]
    for step in (1, 3):
        _, said = asked(
            shards, tmp_path / f"a{step}", set(), tmp_path / "a" / f"{step}.ckpt", accumulate_grad_batches=2
        )
        assert said == straight[-len(said) :], step
        assert said[-1][0] == 6


def test_a_checkpoint_is_replaced_never_written_over(tmp_path, monkeypatch):
    """With temporary files on another disk: there a move is a copy, and a crash in it left half a checkpoint."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other disk here")
    with tempfile.TemporaryDirectory(dir=other) as elsewhere:
        monkeypatch.setattr(tempfile, "tempdir", elsewhere)
        module, place = torch.nn.Linear(2, 2), tmp_path / LAST
        trainer = small_trainer(tmp_path, plugins=[WholeFiles()])
        trainer.strategy.connect(small_module())
        for step in range(2):
            trainer.strategy.save_checkpoint({"step": step, "state_dict": module.state_dict()}, place)
            if step == 0:
                os.link(place, tmp_path / "former.ckpt")
        assert torch.load(tmp_path / "former.ckpt", weights_only=True)["step"] == 0
        assert torch.load(place, weights_only=True)["step"] == 1
        assert not list(Path(elsewhere).iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {LAST, BEFORE, SUMS, "former.ckpt"}


def test_of_a_damaged_checkpoint_it_is_said_what_helps(tmp_path):
    files, folder = WholeFiles(), tmp_path / "checkpoints"
    for name in (LAST, LAST, BEST, stage_file("adapt")):
        files.save_checkpoint({"of": name}, folder / name)

    def said(name: str) -> str:
        os.truncate(folder / name, 200)
        with pytest.raises(ValueError, match=f"{name} is damaged") as refusal:
            files.load_checkpoint(folder / name)
        return str(refusal.value)

    assert said(stage_file("adapt")).endswith("is made anew by training the run again alone")
    assert said(BEST).endswith(
        "move best.ckpt away, and make eval and RESUME=auto take last.ckpt, the weights of the last step"
    )
    assert best_of(tmp_path) == folder / BEST
    (folder / BEST).rename(tmp_path / BEST)
    assert best_of(tmp_path) == folder / LAST
    assert said(LAST).endswith(f"Whole are {folder / BEFORE}; RESUME=auto goes on from the newest that is")
    assert said(BEFORE).endswith("is whole: train the run again")
