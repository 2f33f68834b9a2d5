import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmfusion.losses import distillation
from mmfusion.losses.distillation import Distillation, Kind, distillation_kl, margin_mse, pair_similarities
from mmfusion.losses.pairs import Pairs
from tests.mmfusion.losses.steps import (
    PRODUCTS,
    QUERIES,
    SCORES,
    TUPLES,
    VALID,
    check_ranks_equal_one_process,
    vectors,
    whole_pairs,
)
from tests.mmfusion.losses.test_sigmoid import Largest

KINDS = pytest.mark.parametrize("kind", get_args(Kind))


def slow_distillation(left: Tensor, right: Tensor, valid: str, *, kind: str, scale: float, temperature: float) -> float:
    """The papers' definitions in Python's floats: KL over a row's list; Margin-MSE over two loops."""
    losses = []
    for i in range(len(left)):
        student, teacher = [], []
        for j in range(len(right)):
            score = SCORES.get((int(QUERIES[i]), int(PRODUCTS[j])))
            if score is not None and VALID[valid][0][i] and VALID[valid][1][j]:
                cosine = math.fsum(a * b for a, b in zip(left[i].tolist(), right[j].tolist(), strict=True))
                student.append(scale * cosine)
                teacher.append(score / temperature)
        n = len(student)
        if n < 2:
            continue
        if kind == "kl":
            p, q = ([math.exp(x) / math.fsum(map(math.exp, xs)) for x in xs] for xs in (teacher, student))
            losses.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        else:
            margins = [((student[a] - student[b]) - (teacher[a] - teacher[b])) ** 2 for a in range(n) for b in range(a)]
            losses.append(math.fsum(margins) / len(margins))
    return math.fsum(losses) / len(losses)


@KINDS
@pytest.mark.parametrize("valid", ["all", "some"])
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, 1.0), (0.05, 3.0), (0.01, 0.5)])
def test_equals_the_slow_definition(kind: Kind, valid: str, temperature: float, teacher_temperature: float) -> None:
    loss = Distillation("teacher", kind=kind, temperature=temperature, teacher_temperature=teacher_temperature).double()
    scale = loss.scale.item()
    expected = slow_distillation(*vectors(), valid, kind=kind, scale=scale, temperature=teacher_temperature)
    found = loss(*vectors(), whole_pairs("teacher"), *VALID[valid])
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_batch_has_what_the_tests_are_about() -> None:
    count = torch.bincount(whole_pairs("teacher").rows[:, 0], minlength=TUPLES)
    assert {0, 1} < set(count.tolist())
    assert count.max() > 5


def scored(teacher: list[float]) -> Pairs:
    """Left row 0 with right rows 0, 1, ..."""
    rows = torch.tensor([[0, j] for j in range(len(teacher))])
    return Pairs(rows, torch.tensor(teacher), torch.zeros(len(teacher), dtype=torch.bool))


def yes(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


def test_equal_embeddings() -> None:
    """We give each of 2 products 1/2 and the margin 0; the teacher 3/4 and 1/4, its margin is log 3."""
    rows = torch.full((3, 4), 0.5)
    pairs = scored([5.0 + math.log(3), 5.0])
    kl = Distillation("teacher")(rows[:1], rows, pairs, yes(1), yes(3))
    margin = Distillation("teacher", kind="margin")(rows[:1], rows, pairs, yes(1), yes(3))
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert margin.item() == pytest.approx(math.log(3) ** 2, rel=1e-5)


@KINDS
def test_a_student_that_scores_as_the_teacher_but_for_a_constant_loses_nothing(kind: Kind) -> None:
    left, right = vectors()
    teacher = (12 * left[:1] @ right.T)[0] + 100
    left.requires_grad_()
    loss = Distillation("teacher", kind=kind, temperature=0.5, teacher_temperature=6.0).double()
    found = loss(left[:1], right, scored(teacher.tolist()), yes(1), yes(len(right)))
    gradients = torch.autograd.grad(found, [left, *loss.parameters()])
    assert found.item() == pytest.approx(0, abs=1e-7)  # the temperature is stored in fp32, the scores too
    torch.testing.assert_close(gradients, (torch.zeros_like(left), torch.zeros_like(gradients[1])), rtol=0, atol=1e-5)


def test_margin_of_two_products_is_the_squared_difference_of_margins() -> None:
    losses = margin_mse(torch.tensor([3.0, 1.0, 8.0]), torch.tensor([1.0, 4.0, 9.0]), torch.tensor([1, 1, 0]), 3)
    assert losses.tolist() == [0.0, 25.0, 0.0]


@KINDS
def test_the_order_of_rows_and_pairs_does_not_matter(kind: Kind) -> None:
    (left, right), pairs, valid = vectors(), whole_pairs("teacher"), VALID["some"]
    rows, columns, order = torch.randperm(TUPLES), torch.randperm(2 * TUPLES), torch.randperm(len(pairs))
    moved = torch.stack([rows.argsort()[pairs.rows[:, 0]], columns.argsort()[pairs.rows[:, 1]]], 1)
    shuffled = Pairs(moved[order], pairs.gain[order], pairs.positive[order])
    loss = Distillation("teacher", kind=kind).double()
    again = loss(left[rows], right[columns], shuffled, valid[0][rows], valid[1][columns])
    torch.testing.assert_close(again, loss(left, right, pairs, *valid), rtol=1e-12, atol=0)


@KINDS
def test_rows_with_less_than_two_scores_and_invalid_rows_do_not_matter(kind: Kind) -> None:
    results = []
    for fill in 0.0, 9.0:
        left, right = vectors(torch.float32)
        pairs = whole_pairs("teacher")
        kept = pairs.between(*VALID["some"])
        alone = torch.bincount(kept.rows[:, 0], minlength=TUPLES) < 2
        left[alone], right[~VALID["some"][1]] = fill, -fill
        loss = Distillation("teacher", kind=kind)(left.requires_grad_(), right, pairs, *VALID["some"])
        gradient = torch.autograd.grad(loss, left)[0]
        assert 0 < gradient[~alone].count_nonzero() == (~alone).sum() * left.shape[1]
        assert not gradient[alone].any()
        results.append((loss, gradient))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


@KINDS
def test_without_scores_loss_and_gradients_are_zero(kind: Kind) -> None:
    left, right = (rows.requires_grad_() for rows in vectors(torch.float32))
    pairs = whole_pairs("teacher")
    loss = Distillation("teacher", kind=kind)
    single = pairs.where(torch.arange(len(pairs)) == 3)
    for few, valid in ((single, "all"), (pairs, "none"), (single.where(single.positive), "all")):
        found = loss(left, right, few, *VALID[valid])
        gradients = torch.autograd.grad(found, [left, right, *loss.parameters()])
        assert found.item() == 0
        assert not any(gradient.any() for gradient in gradients)


@KINDS
def test_gradients(kind: Kind) -> None:
    pairs, compare = whole_pairs("teacher"), {"kl": distillation_kl, "margin": margin_mse}[kind]
    left, right = (rows.requires_grad_() for rows in vectors())
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def losses(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        return compare(scale * pair_similarities(left, right, pairs.rows), pairs.gain, pairs.rows[:, 0], TUPLES)

    assert torch.autograd.gradcheck(losses, (left, right, scale))


@pytest.mark.parametrize("entries", [1, 35, 10**6])
def test_pair_similarities_are_those_of_the_matrix(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ENTRIES", entries)
    rows = whole_pairs("teacher").rows
    left, right = (rows.requires_grad_() for rows in vectors())
    weight = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    found = [
        (values, *torch.autograd.grad(values, (left, right), weight))
        for values in (pair_similarities(left, right, rows), (left @ right.T)[rows.unbind(1)])
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda a, b: pair_similarities(a, b, rows), (left, right))
    assert pair_similarities(left, right, rows[:0]).shape == (0,)


def test_a_million_pairs_do_not_repeat_their_rows_a_million_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ENTRIES", 2**18)
    left, right = torch.randn(400, 32, requires_grad=True), torch.randn(2500, 32, requires_grad=True)
    rows = torch.cartesian_prod(torch.arange(400), torch.arange(2500))
    with Largest() as largest:
        pair_similarities(left, right, rows).sum().backward()
    assert largest.elements == 2 * 10**6  # the coordinates themselves
    assert left.grad is not None
    torch.testing.assert_close(left.grad, right.detach().sum(0).expand(400, 32), rtol=1e-3, atol=1e-3)


@KINDS
def test_fp32_is_finite_and_exact_at_scale_100(kind: Kind) -> None:
    """Scores 100 and -100 of ours, the other way round the teacher's. KL: 200. Margin: 400 squared."""
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = Distillation("teacher", kind=kind, temperature=0.01)
    found = loss(left, right, scored([-100.0, 100.0]), yes(1), yes(2))
    slope = {"kl": 100.0, "margin": 2 * 400 * 100.0}[kind]
    assert found.item() == pytest.approx({"kl": 200.0, "margin": 160_000.0}[kind], rel=1e-5)
    gradient = torch.autograd.grad(found, right)[0]
    torch.testing.assert_close(gradient, torch.tensor([[slope, 0.0], [-slope, 0.0]]), rtol=1e-5, atol=0)


@KINDS
def test_bf16_towers_under_autocast_get_an_fp32_loss(kind: Kind) -> None:
    left, right = (rows.bfloat16() for rows in vectors())
    loss, pairs = Distillation("teacher", kind=kind), whole_pairs("teacher")
    exact = loss(left.float(), right.float(), pairs, *VALID["some"])
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(left, right, pairs, *VALID["some"])
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_it_teaches_the_teachers_order() -> None:
    """Free vectors, 200 steps: the order of each row's products becomes the teacher's."""
    pairs = scored([3.0, 1.0, -2.0, 0.5])
    for kind in get_args(Kind):
        left, right = (rows.requires_grad_() for rows in vectors(torch.float32))
        loss = Distillation("teacher", kind=kind, temperature=0.2, learnable=False)
        optimizer = torch.optim.SGD([left, right], lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            loss(normalize(left[:1], dim=1), normalize(right[:4], dim=1), pairs, yes(1), yes(4)).backward()
            optimizer.step()
        scores = normalize(left[:1], dim=1) @ normalize(right[:4], dim=1).T
        assert scores[0].argsort(descending=True).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"kind": "kl"}, "all"),
        ({"kind": "kl", "teacher_temperature": 4.0}, "some"),
        ({"kind": "margin"}, "some"),
        ({"kind": "margin", "learnable": False}, "some"),
        ({"kind": "margin"}, "none of the last half's products"),
        ({"kind": "kl"}, "none"),
    ],
    ids=str,
)
def test_ranks_equal_one_process(world: int, options: dict[str, Any], valid: str) -> None:
    found = check_ranks_equal_one_process(Distillation("teacher", **options), "teacher", world, valid)
    assert all(value.any() for value in found.values()) == (valid != "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": ""}, "label is empty; name the table of scores"),
        ({"kind": "mse"}, "kind is 'mse'; choose one of kl, margin"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0; expected a number above 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation.__init__.__wrapped__(Distillation.__new__(Distillation), **{"label": "teacher", **options})


def test_the_label_is_required() -> None:
    with pytest.raises(TypeError, match="label"):
        Distillation()  # type: ignore
