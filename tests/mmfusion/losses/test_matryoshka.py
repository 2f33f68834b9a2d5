import math
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.losses.distillation import Distillation
from mmfusion.losses.info_nce import InfoNCE
from mmfusion.losses.matryoshka import Matryoshka
from mmfusion.losses.modules import Loss
from mmfusion.losses.pairs import Pairs
from mmfusion.losses.sigmoid import Sigmoid
from tests.mmfusion.losses.steps import TUPLES, VALID, check_ranks_equal_one_process, vectors, whole_pairs
from tests.mmfusion.losses.test_sigmoid import slow_sigmoid


def slow_leading(rows: Tensor, dim: int) -> Tensor:
    """The leading coordinates of each row, divided by their norm."""
    short = [row[:dim] for row in rows.double().tolist()]
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in short]
    return torch.tensor(
        [[x / length for x in row] for row, length in zip(short, lengths, strict=True)], dtype=torch.float64
    )


@pytest.mark.parametrize(
    ("dims", "weights", "expected"),
    [
        ([2], None, {2: 1, 5: 1}),
        ([2, 3, 5], None, {2: 1, 3: 1, 5: 1}),
        ([1, 4], [3.0, 0.5], {1: 3, 4: 0.5, 5: 1}),
        ([1, 5], [1.0, 3.0], {1: 1, 5: 3}),
    ],
)
def test_equals_the_slow_definition(dims: list[int], weights: list[float] | None, expected: dict[int, float]) -> None:
    """Equation 1 of the paper around the sigmoid loss's, with weights divided by their sum; the whole takes part."""
    inner = Sigmoid(temperature=0.5, bias=-1.0)
    losses = {
        dim: slow_sigmoid(*(slow_leading(rows, dim) for rows in vectors()), "some", scale=2.0, bias=-1.0)
        for dim in expected
    }
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)
    mean = math.fsum(weight * losses[dim] for dim, weight in expected.items()) / sum(expected.values())
    found = Matryoshka(inner.double(), dims, weights)(*vectors(), whole_pairs("judged"), *VALID["some"])
    assert found.item() == pytest.approx(mean, rel=1e-7)  # the temperature is stored in fp32


@pytest.mark.parametrize("weights", [None, [0.3]])
def test_the_whole_alone_is_the_inner_loss_to_the_bit(weights: list[float] | None) -> None:
    left, right = (rows.requires_grad_() for rows in vectors(torch.float32))
    inner = InfoNCE()
    found = []
    for loss in inner, Matryoshka(inner, [5], weights):
        value = loss(left, right, whole_pairs("judged"), *VALID["some"])
        found.append((value, *torch.autograd.grad(value, [left, right, inner.log_scale])))
    if weights is None:
        assert all(torch.equal(*both) for both in zip(*found, strict=True))
    torch.testing.assert_close(*found)


def test_equal_leading_coordinates_give_the_loss_of_equal_embeddings() -> None:
    """Rows differ in their last coordinates only: cut, all are equal, and a choice of one of 4 costs log 4."""
    rows = normalize(torch.cat([torch.full((4, 2), 0.1), torch.eye(4)], 1), dim=1)
    valid = torch.ones(4, dtype=torch.bool)
    pairs = Pairs(torch.arange(4)[:, None].expand(4, 2), torch.ones(4), valid)
    inner = InfoNCE(temperature=0.01)
    assert inner(rows, rows, pairs, valid, valid).item() == pytest.approx(0, abs=1e-6)
    loss = Matryoshka(inner, [2], [3.0])(rows, rows, pairs, valid, valid)
    assert loss.item() == pytest.approx(3 / 4 * math.log(4), rel=1e-5)


def test_label_scale_and_dims_are_those_of_a_loss() -> None:
    loss = Matryoshka(Sigmoid("desirability", temperature=0.05), [2, 4])
    assert (loss.label, loss.dims, loss.scale.item()) == ("desirability", (2, 4), pytest.approx(20))
    assert isinstance(getattr(loss, "scale", None), Tensor)
    assert getattr(Matryoshka(Unscaled(), [2]), "scale", None) is None
    assert Unscaled().dims == ()


class Unscaled(Loss):
    def forward(self, left: Tensor, right: Tensor, *_: Any) -> Tensor:
        return (left * right[: len(left)]).sum()


@pytest.mark.parametrize("dims", [[], [0, 2], [3, 2], [2, 2], [-1]])
def test_dims_that_do_not_ascend_are_named(dims: list[int]) -> None:
    with pytest.raises(ValueError, match="expected different sizes, at least 1, ascending"):
        Matryoshka(InfoNCE(), dims)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, 1.0, 1.0], [1.0, -1.0], []])
def test_weights_that_do_not_fit_are_named(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected 2 numbers above 0, one for each of dims, \[2, 3\]"):
        Matryoshka(InfoNCE(), [2, 3], weights)


def test_dims_beyond_the_vectors_are_named() -> None:
    with pytest.raises(ValueError, match=r"dims is \[2, 6\], but the vectors have 5 dimensions"):
        Matryoshka(InfoNCE(), [2, 6])(*vectors(), whole_pairs("judged"), *VALID["all"])


def test_rows_of_zeros_that_are_not_valid_get_no_gradient() -> None:
    """Zero leading coordinates have no direction; those of a missing photo must not make NaN."""
    left, right = vectors(torch.float32)
    right[~VALID["some"][1]] = 0
    right[0, :2] = 0  # of a valid row too
    right.requires_grad_()
    for inner in InfoNCE(), Sigmoid():
        loss = Matryoshka(inner, [2, 4])(left, right, whole_pairs("judged"), *VALID["some"])
        gradient = torch.autograd.grad(loss, right)[0]
        assert torch.isfinite(gradient).all()
        assert not gradient[~VALID["some"][1]].any()


def test_fp32_is_finite_at_scale_100_and_bf16_computes_in_fp32() -> None:
    left, right = (rows.bfloat16() for rows in vectors())
    for inner in InfoNCE(temperature=0.01), Sigmoid(temperature=0.01):
        loss = Matryoshka(inner, [2, 4])
        exact = loss(left.float(), right.float(), whole_pairs("judged"), *VALID["some"])
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(left, right, whole_pairs("judged"), *VALID["some"])
        assert found.dtype == torch.float32
        assert torch.isfinite(found)
        assert torch.equal(found, exact)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("inner", [InfoNCE(), Sigmoid(chunk=3, bias=-2.0), Distillation("t", kind="margin")], ids=str)
def test_ranks_equal_one_process(world: int, inner: Loss) -> None:
    table = "teacher" if isinstance(inner, Distillation) else "judged"
    found = check_ranks_equal_one_process(Matryoshka(inner, [2, 3], [2.0, 1.0]), table, world, "some")
    assert "loss.loss.log_scale" in found
    assert all(value.any() for value in found.values())


def test_a_yaml_can_name_it_with_its_inner_loss() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--term", type=Loss)
    inner = {"class_path": "mmfusion.losses.sigmoid.Sigmoid", "init_args": {"chunk": 2}}
    options = {"class_path": "mmfusion.losses.matryoshka.Matryoshka", "init_args": {"loss": inner, "dims": [2, 4]}}
    loss = parser.instantiate(parser.parse_object({"term": options})).term
    assert isinstance(loss, Matryoshka)
    assert isinstance(loss.loss, Sigmoid)
    assert (loss.dims, loss.loss.chunk, TUPLES) == ((2, 4), 2, 16)
