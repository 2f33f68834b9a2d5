import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfusion.losses import contrast as module
from mmfusion.losses.contrast import Contrast, contrast
from tests.mmfusion.losses.slow import drawn_pairs, unit

CHUNKS = pytest.mark.parametrize("chunk", [None, 1, 4, 11, 64])
ROWS, COLUMNS = 11, 17
ROW_VALID, COLUMN_VALID = torch.arange(ROWS) != 5, torch.arange(COLUMNS) % 6 != 1
LISTED = drawn_pairs(ROWS, COLUMNS).between(ROW_VALID, COLUMN_VALID).sorted().rows


@pytest.fixture(autouse=True, params=[3 * COLUMNS, 2**19], ids=["small tiles", "one tile"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", {"cpu": request.param})
    monkeypatch.setattr(module, "PART", 2 * request.param)


def sides() -> tuple[Tensor, Tensor]:
    return (20 * unit(ROWS)).requires_grad_(), unit(COLUMNS, seed=1).requires_grad_()


def dense(query: Tensor, product: Tensor) -> Contrast:
    """The same from the whole matrix by autograd's own operations."""
    logits = query @ product.T
    out = torch.zeros(ROWS, COLUMNS, dtype=torch.bool).index_put_(LISTED.unbind(1), torch.tensor(True))
    masked = logits.masked_fill(out | ~ROW_VALID[:, None] | ~COLUMN_VALID, torch.finfo(logits.dtype).min)
    return Contrast(masked.logsumexp(1), masked.logsumexp(0), logits[LISTED.unbind(1)])


@CHUNKS
@pytest.mark.parametrize("columns", [True, False])
def test_equals_the_whole_matrix_and_its_gradient(chunk: int | None, columns: bool) -> None:
    query, product = sides()
    expected, weight = dense(query, product), [torch.rand(n).double() for n in (ROWS, COLUMNS, len(LISTED))]
    weight[0][~ROW_VALID], weight[1][~COLUMN_VALID] = 0, 0  # of what is masked, nothing is asked
    if not columns:
        weight[1][:] = 0
    found = contrast(query, product, LISTED, ROW_VALID, COLUMN_VALID, columns=columns, chunk=chunk)
    torch.testing.assert_close(found.row, expected.row, rtol=1e-12, atol=1e-12)
    if columns:
        torch.testing.assert_close(found.column, expected.column, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.listed, expected.listed, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((w * part).sum() for w, part in zip(weight, parts, strict=True)), (query, product))
        for parts in (found, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-13)


@CHUNKS
def test_gradcheck(chunk: int | None) -> None:
    def usable(query: Tensor, product: Tensor) -> tuple[Tensor, ...]:
        found = contrast(query, product, LISTED, ROW_VALID, COLUMN_VALID, chunk=chunk)
        return found.row[ROW_VALID], found.column[COLUMN_VALID], found.listed

    assert torch.autograd.gradcheck(usable, sides())


def test_nothing_listed_and_nothing_valid() -> None:
    query, product = sides()
    none = torch.zeros(0, 2, dtype=torch.int64)
    found = contrast(query, product, none, torch.zeros_like(ROW_VALID), torch.zeros_like(COLUMN_VALID))
    lowest = torch.finfo(query.dtype).min
    assert (found.row <= lowest / 2).all()
    assert (found.column <= lowest / 2).all()
    assert found.listed.shape == (0,)


@pytest.mark.parametrize(("chunk", "least"), [(None, True), (16, False)])
def test_chunks_never_hold_the_square_matrix(chunk: int | None, least: bool) -> None:
    """The largest tensor that forward and backward make has chunk x columns entries; without chunks all of them."""
    rows, dim = 256, 8
    query, product = unit(rows, dim).requires_grad_(), unit(rows, dim, seed=1).requires_grad_()
    listed, valid = torch.arange(rows)[:, None].repeat(1, 2), torch.ones(rows, dtype=torch.bool)
    with Largest() as largest:
        found = contrast(query, product, listed, valid, valid, chunk=chunk)
        (found.row.sum() + found.column.sum() - found.listed.sum()).backward()
    assert (largest.entries >= rows * rows) == least
    assert least or largest.entries == 16 * rows


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor has that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.entries = max(self.entries, one.numel())
        return result


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_backward_pass_can_run_again(chunk: int | None) -> None:
    query, product = sides()
    total = contrast(query, product, LISTED, ROW_VALID, COLUMN_VALID, chunk=chunk).row[ROW_VALID].sum()
    first, again = (torch.autograd.grad(total, query, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("chunk", [None, 4])
def test_autocast_does_not_reach_it(chunk: int | None) -> None:
    results = []
    for enabled in (False, True):
        query, product = (side.detach().float().requires_grad_() for side in sides())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = contrast(query, product, LISTED, ROW_VALID, COLUMN_VALID, chunk=chunk)
            assert found.row.dtype == torch.float32
            results.append([found.row, *torch.autograd.grad(found.row[ROW_VALID].sum(), (query, product))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_equal_rows_give_the_log_of_their_number() -> None:
    rows, valid = torch.full((8, 4), 0.5), torch.ones(8, dtype=torch.bool)
    found = contrast(rows, rows, torch.tensor([[0, 0], [0, 3]]), valid, valid)
    assert found.row[0].item() == pytest.approx(1 + math.log(6))
    assert found.column[3].item() == pytest.approx(1 + math.log(7))
    assert found.listed.tolist() == [1, 1]


def test_a_chunk_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="chunk is 0; expected a number of rows, at least 1"):
        contrast(*sides(), LISTED, ROW_VALID, COLUMN_VALID, chunk=0)
