import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfusion.retrieval.vectors import VectorFile, write_vectors


def gaussian(rows: int = 100, dim: int = 7) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "corpus.npy"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sizes", [[100], [1, 98, 1], [0, 60, 0, 40]])
def test_numpy_reads_what_was_written(file: Path, dtype: str, sizes: list[int]) -> None:
    vectors = gaussian()
    assert len(write_vectors(file, vectors.split(sizes), dtype)) == 100
    assert np.array_equal(np.load(file), vectors.numpy().astype(dtype))
    assert [path.name for path in file.parent.iterdir()] == ["corpus.npy"]


def test_any_float_type_and_layout_is_written(file: Path) -> None:
    vectors = gaussian().bfloat16()
    write_vectors(file, [vectors[:50].T.contiguous().T, vectors[50:].requires_grad_()])
    assert np.array_equal(np.load(file), vectors.float().numpy())


def test_slices_and_rows_are_those_of_the_tensor(file: Path) -> None:
    vectors = gaussian()
    np.save(file, vectors.numpy())
    opened = VectorFile(file)
    assert len(opened) == 100
    assert opened.shape == vectors.shape
    for rows in (slice(0, 3), slice(90, 200), slice(5, 5), slice(None), torch.tensor([7, 0, 99, 7]), torch.arange(0)):
        assert torch.equal(opened[rows], vectors[rows])


def test_what_was_read_is_a_copy(file: Path) -> None:
    write_vectors(file, [gaussian()])
    opened = VectorFile(file)
    opened[:5].zero_()
    assert torch.equal(opened[:5], gaussian()[:5])


def test_no_vector_may_be_in_the_file(file: Path) -> None:
    assert len(write_vectors(file, [gaussian(rows=0)])) == 0
    assert VectorFile(file)[:10].shape == (0, 7)


def test_a_failure_leaves_what_was_there(file: Path) -> None:
    def batches() -> Iterator[Tensor]:
        yield gaussian()
        raise RuntimeError("the encoder failed")

    write_vectors(file, [gaussian(rows=3)])
    with pytest.raises(RuntimeError, match="encoder"):
        write_vectors(file, batches())
    assert len(VectorFile(file)) == 3
    assert [path.name for path in file.parent.iterdir()] == ["corpus.npy"]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no vectors to write"),
        ([gaussian(dim=4), gaussian(dim=5)], "row 100 on holds vectors of width 5; before, it was 4"),
        (
            [gaussian(), gaussian() * torch.inf],
            "row 100 on holds values that are NaN, infinite or too large for float16",
        ),
        ([gaussian() + 70_000], "row 0 .* too large for float16"),
    ],
)
def test_vectors_that_cannot_be_written_are_an_error(file: Path, batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_vectors(file, batches, "float16")
    assert not list(file.parent.iterdir())


def test_there_must_be_a_file(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of vectors at .*corpus\.npy"):
        VectorFile(file)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 4), np.float32), r"holds \(2, 3, 4\) of float32; expected rows of float16 or float32"),
        (np.zeros((2, 3)), "of float64"),
        (np.zeros((2, 3), np.float32, order="F"), "columns first"),
    ],
)
def test_other_arrays_are_an_error(file: Path, array: np.ndarray, message: str) -> None:
    np.save(file, array)
    with pytest.raises(ValueError, match=message):
        VectorFile(file)


def test_other_files_are_an_error(file: Path) -> None:
    file.write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"not a \.npy file of vectors"):
        VectorFile(file)


def test_a_file_that_was_cut_off_is_an_error(file: Path) -> None:
    np.save(file, gaussian().numpy())
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"2924 bytes, \(100, 7\) of float32 take 2928"):
        VectorFile(file)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_the_whole_file_keeps_none_of_it_resident(file: Path) -> None:
    def resident() -> int:
        """Bytes of mapped files that this process holds."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("RssFile:")[1].split()[0])

    opened = write_vectors(file, (torch.ones(1000, 1024) for _ in range(16)))
    size, before = len(opened) * 1024 * 4, resident()
    for start in range(0, len(opened), 1000):
        opened[start : start + 1000]
        opened[torch.randperm(len(opened), generator=torch.Generator().manual_seed(start))[:100]]
    assert resident() - before < size / 8
