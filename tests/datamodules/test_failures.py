"""What failed is counted, limited, told of, and logged the same on every number of ranks."""

import csv
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from datamodules.shards import Shards
from datamodules.stream.failures import PHOTO_REASONS, REASONS, SAMPLE_REASONS, Failed, Failures, TooManyFailuresError
from datamodules.tuples import Stage, TupleDataModule
from mmfusion.encoders import ScratchTextEncoder
from mmfusion.loggers import AppendingCSVLogger
from tests.datamodules.damage import overwrite
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer


def test_the_reasons_are_fixed() -> None:
    assert len(set(REASONS)) == len(SAMPLE_REASONS) + len(PHOTO_REASONS) == 12
    assert list(Failures("pass", 5).counts()) == list(REASONS)


def test_counts_and_the_worst_shards() -> None:
    failures = Failures("epoch 3", 100, limit=0.04, instead="replaced by other products")
    failures.add([Failed("truncated", "00001.tar", "a"), Failed("damaged", "00002.tar", "b")])
    other = Failures("epoch 3", 100, limit=0.04)
    other.add([Failed("truncated", "00001.tar", "c")])
    failures.merge([other])
    assert {reason: count for reason, count in failures.counts().items() if count} == {"truncated": 2, "damaged": 1}
    with pytest.warns(
        UserWarning,
        match=r"epoch 3: 3 of 100 products failed \(2 truncated, 1 damaged\), most in shards 00001.tar \(2\), "
        r"00002.tar \(1\), such as product 'a'; the 1 were taken without photo, "
        r"the 2 that could not be read at all were replaced",
    ):
        failures.warn()
    failures.add([Failed("empty", "00003.tar", "d")])  # 4 of 100: not over the limit
    with pytest.raises(ValueError, match=r"5 of 100 products failed .* over the limit data.max_broken=0.04"):
        failures.merge([other])


def test_nothing_failed_is_nothing_said(recwarn: pytest.WarningsRecorder) -> None:
    Failures("epoch 0", 0, limit=0.0).warn()
    assert not recwarn


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return small_shards(tmp_path)


def spoil(path: Path) -> tuple[int, int]:
    """One trainable product without a readable sample, one without a readable photo."""
    index = Shards.open(path).index
    unread, blind = np.flatnonzero(index.trainable & index.photo)[[1, 30]].tolist()
    overwrite(path, unread, b"")
    shards = Shards.open(path)
    tar = path / shards.manifest.shards[index.shard[blind]].name
    content = bytearray(tar.read_bytes())
    start = content.index(b"\x89PNG", index.offset[blind])
    content[start : start + 8] = b"<html>  "
    tar.write_bytes(content)
    return unread, blind


def fitted(path: Path, folder: Path, **options: Any) -> list[dict[str, str]]:
    """metrics.csv of three epochs."""
    logger = AppendingCSVLogger(folder, name="exp", version="1")
    trainer = small_trainer(folder, logger=logger, steps=9, log_every_n_steps=3, **options)
    trainer.fit(small_module(), small_data(path, max_broken=0.1))
    with (folder / "exp/1/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_failed_is_in_the_metrics(shards: Path, tmp_path: Path) -> None:
    assert not any(name.startswith("data/") for name in fitted(shards, tmp_path / "whole")[0])
    spoil(shards)
    with pytest.warns(UserWarning, match="epoch 0: 2 of 48 products failed"):
        rows = fitted(shards, tmp_path / "spoiled")
    epochs = [row for row in rows if row["data/failed/wrong_member"]]
    assert [int(row["epoch"]) for row in epochs] == [0, 1, 2]

    def count(row: dict[str, str], *reasons: str) -> float:
        return sum(float(row.get(f"data/failed/{reason}") or 0) for reason in reasons)

    # read, or known from before where a frozen encoder's features are kept
    assert all(count(row, "wrong_member", "unread_before") == 1 for row in epochs)
    # also where it took the other's place
    assert all(count(row, "not_a_photo", "no_photo_before") >= 1 for row in epochs)
    named = {name.removeprefix("data/failed/") for name in rows[0] if name.startswith("data/")}
    assert (
        {"wrong_member", "not_a_photo"} <= named <= {"wrong_member", "not_a_photo", "unread_before", "no_photo_before"}
    )


def test_charts_go_back_to_zero(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([0, 2, 0])
    monkeypatch.setattr(TupleDataModule, "failures", lambda data, stage: {"not a photo": next(counts), "damaged": 0})
    rows = fitted(shards, tmp_path)
    assert [row["data/failed/not_a_photo"] for row in rows if row["data/failed/not_a_photo"]] == ["2.0", "0.0"]
    assert "data/failed/damaged" not in rows[0]


def _evaluate(rank: int, world: int, path: Path, folder: Path, max_broken: float) -> tuple[dict[str, float], list[str]]:
    options: dict[str, Any] = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    data, module = small_data(path, max_broken=max_broken), small_module()
    cast(ScratchTextEncoder, module.query.encoder).fit(["a shirt", "a hat"])
    logged, said = dict[str, float](), list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for evaluate in ("validate", "test"):
            trainer = small_trainer(folder, limit_val_batches=1.0, **options)
            try:
                getattr(trainer, evaluate)(module, data, verbose=False)
            except ValueError as error:
                said.append(str(error))
            logged |= {name: value.item() for name, value in trainer.logged_metrics.items() if "/failed/" in name}
    said += [str(one.message) for one in caught if "corpus: " in str(one.message)]
    return logged, said


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_what_failed_in_evaluation_is_logged_and_told_once(shards: Path, tmp_path: Path, ranks: int) -> None:
    spoil(shards)
    (first, told), *others = run_ranks(_evaluate, ranks, shards, tmp_path, 0.1)
    names = [f"{stage}/failed/{reason}" for stage in ("val", "test") for reason in ("wrong_member", "not_a_photo")]
    assert first == dict.fromkeys(names, 1.0)
    assert others == [(first, [])] * (ranks - 1)
    assert [message.partition(" (")[0] for message in told] == ["corpus: 2 of 64 products failed"] * 2


def test_ranks_stop_together_over_the_limit_in_evaluation(shards: Path, tmp_path: Path) -> None:
    for id in (0, 1, 62, 63):  # two of each rank, which alone are not over 2.56
        overwrite(shards, id, b"")
    results = run_ranks(_evaluate, 2, shards, tmp_path, 0.04)
    for _, said in results:
        assert len(said) == 2
        assert all(message.startswith("corpus: 4 of 64 products failed (4 wrong member)") for message in said)
        assert all("over the limit data.max_broken=0.04" in message for message in said)


def test_one_rank_over_the_limit_tells_so() -> None:
    failures, other = Failures("epoch 0", 10, limit=0.1), Failures("epoch 0", 10, limit=0.1)
    failures.add([Failed("truncated", "00001.tar", "a")])
    other.merge([failures])
    with pytest.raises(TooManyFailuresError) as alone:
        failures.add([Failed("truncated", "00001.tar", "b")])
    with pytest.raises(ValueError, match="3 of 10") as together:
        other.merge([failures])
    assert alone.value.one_rank
    assert not hasattr(together.value, "one_rank")


def _fit(rank: int, world: int, path: Path, folder: Path, max_broken: float) -> tuple[list[dict[str, float]], str]:
    trainer = small_trainer(folder, logger=True, devices=world, strategy="ddp", steps=6, log_every_n_steps=3)
    said, data = [], small_data(path, max_broken=max_broken)
    counting = data.failures

    def counted(stage: Stage) -> dict[str, int]:
        said.append(counting(stage))
        return said[-1]

    data.failures = counted  # type: ignore[method-assign, assignment]
    try:
        trainer.fit(small_module(), data)
    except ValueError as error:
        return said, str(error)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items() if name.startswith("data/")}
    return [*said, logged], ""


def test_two_ranks_log_what_failed_on_either(shards: Path, tmp_path: Path) -> None:
    spoil(shards)
    (first, _), (second, _) = run_ranks(_fit, 2, shards, tmp_path, 0.1)
    assert first == second
    *epochs, logged = first
    assert [epoch["wrong member"] + epoch["unread before"] for epoch in epochs] == [1, 1]
    assert logged == {  # of each reason from its first time on
        f"data/failed/{reason.replace(' ', '_')}": count
        for reason, count in epochs[-1].items()
        if any(epoch[reason] for epoch in epochs)
    }


def test_ranks_stop_together_over_the_limit_of_the_whole(shards: Path, tmp_path: Path) -> None:
    """Neither rank alone is over it, or only one is: both stop, at the latest at the end of the epoch."""
    index = Shards.open(shards).index
    for id in np.flatnonzero(index.trainable)[::4].tolist():
        overwrite(shards, id, b"")
    results = run_ranks(_fit, 2, shards, tmp_path, 0.2)
    assert all(said.startswith("epoch 0: 12 of 48 products failed") for _, said in results)
