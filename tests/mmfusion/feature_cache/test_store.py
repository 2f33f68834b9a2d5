"""Outputs come back bit for bit; what an interrupted or damaged build left is completed, never trusted."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmfusion.encoders import Encoded
from mmfusion.feature_cache import FeatureFolder, Stored, bytes_needed, folder_of, open_stored, store
from mmfusion.feature_cache.part import DamagedPartError, checked, header_of

ROWS, PART = 23, 8
KEY = {"encoder": "a", "shape": (3, 4)}
NAN = float("nan")


def outputs(rows: int = ROWS, dtype: torch.dtype = torch.float32, token_dtype: torch.dtype | None = None) -> Encoded:
    """Ragged tokens, also of no token at all and with gaps; NaN and -0.0 among the values; what is padded is noise."""
    generator = torch.Generator().manual_seed(7)
    pooled = torch.randn(rows, 5, generator=generator)
    pooled[0, :3] = torch.tensor([NAN, -0.0, float("inf")])
    mask = torch.rand(rows, 6, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[1], mask[2] = False, True
    tokens = torch.randn(rows, 6, 3, generator=generator)
    return Encoded(pooled.to(dtype), tokens.to(token_dtype or dtype), mask)


def some(encoded: Encoded, rows: range) -> Encoded:
    at = slice(rows.start, rows.stop)
    return Encoded(encoded.pooled[at], encoded.tokens[at], encoded.mask[at])


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def opened(folder: Path, tokens: bool = False, key: dict[str, object] = KEY, rows: int = ROWS) -> FeatureFolder:
    return FeatureFolder(folder, key, rows, tokens, part=PART)


def fill(cache: FeatureFolder, encoded: Encoded, flags: Tensor | None = None) -> list[range]:
    missing = cache.missing()
    for rows in missing:
        cache.write(rows, some(encoded, rows), None if flags is None else flags[rows.start : rows.stop])
    return missing


def require_equal(stored: Stored, encoded: Encoded, ids: list[int], tokens: bool) -> None:
    """Row by row, by a slow loop."""
    found = stored(torch.tensor(ids, dtype=torch.int64))
    longest = max((int(encoded.mask[i].sum()) for i in ids), default=0) if tokens else 0
    assert (found.pooled.dtype, found.tokens.dtype) == (encoded.pooled.dtype, encoded.tokens.dtype)
    assert (found.tokens.shape, found.mask.shape) == ((len(ids), longest, 3), (len(ids), longest))
    for row, i in enumerate(ids):
        assert torch.equal(bits(found.pooled[row]), bits(encoded.pooled[i]))
        real = encoded.tokens[i][encoded.mask[i]] if tokens else encoded.tokens[i, :0]
        assert torch.equal(bits(found.tokens[row, : len(real)]), bits(real))
        assert found.mask[row].tolist() == [column < len(real) for column in range(longest)]
        assert not found.tokens[row, len(real) :].any()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype, tokens: bool) -> None:
    encoded, flags = outputs(dtype=dtype, token_dtype=torch.float32), torch.rand(ROWS, 3) < 0.5
    cache = opened(tmp_path / "f", tokens)
    assert cache.stored() is None
    assert fill(cache, encoded, flags) == [range(0, 8), range(8, 16), range(16, 23)]
    for stored in (cache.finish(), open_stored(tmp_path / "f", KEY)):
        assert stored is not None
        assert stored.flags is not None
        assert torch.equal(stored.flags, flags)
        assert (stored.rows, stored.width, stored.longest) == (ROWS, 5, 6 if tokens else 0)
        assert stored.bytes == sum(path.stat().st_size for path in (tmp_path / "f").iterdir())
        for ids in ([22, 0, 8, 7, 0, 2, 1], [1], list(range(ROWS)), [5, 5], []):
            require_equal(stored, encoded, ids, tokens)
        for wrong in (-1, ROWS):
            with pytest.raises(IndexError, match=f"{wrong}.*rows are 23"):
                stored(torch.tensor([0, wrong]))


def test_batches_may_be_changed_the_cache_not(tmp_path: Path) -> None:
    encoded = outputs()
    cache = opened(tmp_path / "f", tokens=True)
    fill(cache, encoded)
    stored = cache.finish()
    found = stored(torch.arange(ROWS))
    for part in (found.pooled, found.tokens, found.mask):
        part.zero_()
    require_equal(stored, encoded, list(range(ROWS)), tokens=True)


def test_queries_have_no_flags(tmp_path: Path) -> None:
    cache = opened(tmp_path / "f")
    fill(cache, outputs())
    assert cache.finish().flags is None


def test_only_what_is_missing_is_built(tmp_path: Path) -> None:
    encoded = outputs()
    cache = opened(tmp_path / "f")
    middle = range(8, 16)
    assert not cache.has(middle)
    cache.write(middle, some(encoded, middle))
    with pytest.raises(ValueError, match=r"parts are missing, the first of 2 is range\(0, 8\)"):
        cache.finish()
    again = opened(tmp_path / "f")
    assert again.has(middle)
    assert fill(again, encoded) == [range(0, 8), range(16, 23)]
    require_equal(again.finish(), encoded, list(range(ROWS)), tokens=False)
    assert opened(tmp_path / "f").missing() == []


@pytest.mark.parametrize("place", [0, 9, 40, -1, -33, "half", "empty", "header", "longer"])
def test_a_damaged_part_is_built_again(tmp_path: Path, place: int | str) -> None:
    encoded = outputs()
    cache = opened(tmp_path / "f", tokens=True)
    fill(cache, encoded)
    path = tmp_path / "f" / "00001.part"
    content = bytearray(path.read_bytes())
    if place == "half":
        content = content[: len(content) // 2]
    elif place == "empty":
        content = content[:0]
    elif place == "header":
        content = content[:20]
    elif place == "longer":
        content += b"\0"
    else:
        content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedPartError, match=r"00001.part: damaged"):
        checked(path)
    again = opened(tmp_path / "f", tokens=True)
    assert not again.has(range(8, 16))
    assert fill(again, encoded) == [range(8, 16)]
    require_equal(again.finish(), encoded, list(range(ROWS)), tokens=True)


def test_a_part_of_a_complete_folder_is_missed_and_built_again(tmp_path: Path) -> None:
    encoded = outputs()
    cache = opened(tmp_path / "f")
    fill(cache, encoded)
    cache.finish()
    path = tmp_path / "f" / "00002.part"
    for damage in (path.unlink, lambda: path.write_bytes(path.read_bytes()[:-8]), lambda: path.write_bytes(b"")):
        damage()
        assert open_stored(tmp_path / "f", KEY) is None
        again = opened(tmp_path / "f")
        assert again.stored() is None
        assert fill(again, encoded) == [range(16, 23)]
        require_equal(again.finish(), encoded, [22, 3], tokens=False)


def test_a_part_in_the_place_of_another_is_no_part_of_the_folder(tmp_path: Path) -> None:
    cache = opened(tmp_path / "f")
    fill(cache, outputs())
    cache.finish()
    (tmp_path / "f" / "00000.part").write_bytes((tmp_path / "f" / "00001.part").read_bytes())
    assert open_stored(tmp_path / "f", KEY) is None
    assert opened(tmp_path / "f").missing() == [range(0, 8)]


def test_a_damaged_list_is_written_again(tmp_path: Path) -> None:
    cache = opened(tmp_path / "f")
    fill(cache, outputs())
    cache.finish()
    for content in (b"", b"{}", b'{"rows": 23', b'{"rows": 23, "part": 8, "parts": []}'):
        (tmp_path / "f" / "complete.json").write_bytes(content)
        assert open_stored(tmp_path / "f", KEY) is None
        again = opened(tmp_path / "f")
        assert again.missing() == []
        require_equal(again.finish(), outputs(), [22, 0], tokens=False)


def test_another_description_is_never_used(tmp_path: Path) -> None:
    cache = opened(folder_of(tmp_path, KEY))
    fill(cache, outputs())
    cache.finish()
    other = KEY | {"encoder": "b"}
    assert folder_of(tmp_path, other) != folder_of(tmp_path, KEY) == folder_of(tmp_path, KEY | {"shape": [3, 4]})
    for use in (opened, open_stored):
        with pytest.raises(ValueError, match=r"description.json is damaged, or of other features.*delete"):
            use(folder_of(tmp_path, KEY), key=other) if use is opened else use(folder_of(tmp_path, KEY), other)
    assert open_stored(folder_of(tmp_path, other), other) is None
    assert not folder_of(tmp_path, other).exists()
    (folder_of(tmp_path, KEY) / "description.json").write_text("{")
    with pytest.raises(ValueError, match="delete"):
        open_stored(folder_of(tmp_path, KEY), KEY)


def test_rows_and_tokens_belong_into_the_description(tmp_path: Path) -> None:
    cache = opened(tmp_path / "f")
    cache.write(range(0, 8), some(outputs(), range(0, 8)))
    with pytest.raises(ValueError, match=r"'rows': \(23, 24\)"):
        opened(tmp_path / "f", rows=24).missing()
    with pytest.raises(ValueError, match=r"'keep_tokens': \(False, True\)"):
        opened(tmp_path / "f", tokens=True).missing()
    fill(cache, outputs())
    cache.finish()
    with pytest.raises(ValueError, match="23 rows, tokens False; expected 24 and False"):
        opened(tmp_path / "f", rows=24).missing()


def test_parts_are_alike(tmp_path: Path) -> None:
    encoded = outputs()
    cache = opened(tmp_path / "f")
    first, second = range(0, 8), range(8, 16)
    for rows in (range(0, 7), range(8, 17), range(4, 12)):
        with pytest.raises(ValueError, match=r"write the ranges that missing\(\) lists"):
            cache.write(rows, some(encoded, rows))
    with pytest.raises(ValueError, match=r"7 outputs for range\(0, 8\)"):
        cache.write(first, some(encoded, range(0, 7)))
    cache.write(first, some(encoded, first))
    again = opened(tmp_path / "f")
    assert again.missing() == [second, range(16, 23)]
    with pytest.raises(ValueError, match=r"'dtype': \('bfloat16', 'float32'\)"):
        again.write(second, some(outputs(dtype=torch.bfloat16, token_dtype=torch.float32), second))
    with pytest.raises(ValueError, match=r"'flags': \(True, False\)"):
        again.write(second, some(encoded, second), torch.ones(8, 3, dtype=torch.bool))
    assert again.missing() == [second, range(16, 23)]
    with pytest.raises(ValueError, match="0 rows"):
        opened(tmp_path / "g", rows=0)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(tmp_path / "f")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written: No space left.*GiB are free.*model.cache.folder"):
        cache.write(range(0, 8), some(outputs(), range(0, 8)))
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["description.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*model.cache.use=off"):
        opened(tmp_path / "file" / "f")


def _build_forever(folder: Path) -> None:
    encoded = outputs()
    while True:
        cache = opened(folder, tokens=True)
        fill(cache, encoded)
        cache.finish()
        for path in folder.glob("*"):
            if path.name != "description.json":
                path.unlink()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """What a killed builder left is whole or is built again; never is a wrong value read."""
    context, encoded = multiprocessing.get_context("fork"), outputs()
    for delay in torch.linspace(0.01, 0.2, 12).tolist():
        builder = context.Process(target=_build_forever, args=(tmp_path / "f",))
        builder.start()
        time.sleep(delay)
        os.kill(builder.pid, signal.SIGKILL)
        builder.join()
        cache = opened(tmp_path / "f", tokens=True)
        fill(cache, encoded)
        require_equal(cache.finish(), encoded, [*range(ROWS)], tokens=True)
        assert not list((tmp_path / "f").glob("*.partial"))


def _build(folder: Path, barrier: object) -> None:
    barrier.wait()
    cache = opened(folder, tokens=True)
    fill(cache, outputs())
    require_equal(cache.finish(), outputs(), [*range(ROWS)], tokens=True)


def test_many_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        barrier = context.Barrier(4)
        folder = tmp_path / f"f{attempt}"
        builders = [context.Process(target=_build, args=(folder, barrier)) for _ in range(4)]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join(60)
        assert [builder.exitcode for builder in builders] == [0] * 4
        names = {path.name for path in folder.iterdir()}
        assert names == {"description.json", "complete.json", "00000.part", "00001.part", "00002.part"}


def test_the_file_says_what_it_is_and_is_aligned(tmp_path: Path) -> None:
    cache = opened(tmp_path / "f", tokens=True)
    fill(cache, outputs())
    listed = json.loads((cache.finish().folder / "complete.json").read_text())["parts"]
    for number, part in enumerate(listed):
        path = tmp_path / "f" / f"{number:05}.part"
        assert part == {"bytes": path.stat().st_size, "sha256": checked(path)}
        about, sections, start = header_of(path)
        assert about["start"] == number * PART
        assert all((start + section["at"]) % 64 == 0 for section in sections.values())


@pytest.mark.parametrize(("tokens", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_the_size_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(store, "PART", 400)
    monkeypatch.setattr(store, "TOKEN_PART", 400)
    rows, width = 1000, 96
    lengths = torch.arange(rows) % 9 + 1
    mask = torch.arange(9) < lengths[:, None]
    encoded = Encoded(torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, 9, 32, dtype=dtype), mask)
    cache = FeatureFolder(tmp_path / "f", KEY, rows, tokens)
    fill(cache, encoded, torch.ones(rows, 3, dtype=torch.bool))
    needed = bytes_needed(rows, width, dtype.itemsize, float(lengths.double().mean()) if tokens else 0, 32)
    taken = cache.finish().bytes
    assert taken <= needed <= taken * 1.02 + 5000
