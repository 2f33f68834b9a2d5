"""What every head must do: gaps, gradients, gates, batches, precision. Values by hand are in test_values.py."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from mmfusion import fusion
from mmfusion.encoders import Encoded
from mmfusion.fusion import FusionHead

DIM = 16
HEADS: dict[str, Callable[[int], FusionHead]] = {
    "MaskedSum": fusion.MaskedSum,
    "WeightedMean": fusion.WeightedMean,
    "WeightedMean-learned": lambda dim: fusion.WeightedMean(dim, weight=0.3, learned=True),
    **{
        f"{name}{'' if residual else '-plain'}": lambda dim, head=head, residual=residual: head(dim, residual=residual)
        for residual in (True, False)
        for name, head in {
            "ConcatLinear": fusion.ConcatLinear,
            "ConcatLinear-wide": lambda dim, residual: fusion.ConcatLinear(dim, hidden=2.5, residual=residual),
            "ConcatMLP": lambda dim, residual: fusion.ConcatMLP(dim, layers=2, residual=residual),
            "Gated-scalar": lambda dim, residual: fusion.Gated(dim, kind="scalar", residual=residual),
            "Gated-dimension": lambda dim, residual: fusion.Gated(dim, kind="dimension", residual=residual),
            "Gated-hidden": lambda dim, residual: fusion.Gated(dim, hidden=1.5, residual=residual),
            "CrossAttention": lambda dim, residual: fusion.CrossAttention(dim, layers=2, residual=residual),
            "MoEBilinear": lambda dim, residual: fusion.MoEBilinear(dim, rank=8, residual=residual),
        }.items()
    },
}
LEARNED = [name for name in HEADS if name not in ("MaskedSum", "WeightedMean")]
RESIDUAL = [name for name in LEARNED if not name.endswith("-plain") and name != "WeightedMean-learned"]
PATTERNS = torch.tensor(list(itertools.product([True, False], repeat=2)))  # both, text, image, neither


def drawn(seed: int, products: int = 8, tokens: int = 5) -> tuple[Encoded, Encoded]:
    generator = torch.Generator().manual_seed(seed)

    def one(length: int) -> Encoded:
        mask = torch.rand(products, length, generator=generator) < 0.7
        rows = 3 * torch.randn(products, length, DIM, generator=generator)
        return Encoded(normalize(torch.randn(products, DIM, generator=generator), dim=1), rows, mask)

    return one(tokens), one(tokens + 3)


def trained(make: Callable[[int], FusionHead], seed: int = 0) -> FusionHead:
    """A head whose every parameter has left its starting point."""
    torch.manual_seed(seed)
    head = make(DIM).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


@pytest.fixture(params=HEADS)
def make(request: pytest.FixtureRequest) -> Callable[[int], FusionHead]:
    return HEADS[request.param]


@pytest.fixture(params=LEARNED)
def make_learned(request: pytest.FixtureRequest) -> Callable[[int], FusionHead]:
    return HEADS[request.param]


def filled(encoded: Encoded, present: torch.Tensor, value: float) -> Encoded:
    """Another filling of the gaps: vectors, tokens and even the token mask."""
    gap = ~present
    pooled, tokens, mask = encoded.pooled.clone(), encoded.tokens.clone(), encoded.mask.clone()
    pooled[gap], tokens[gap], mask[gap] = value, value, ~mask[gap]
    return Encoded(pooled, tokens, mask)


@pytest.mark.parametrize("value", [0.0, 7.0, float("nan"), float("inf")])
def test_the_vector_does_not_depend_on_what_fills_the_gap(make: Callable[[int], FusionHead], value: float) -> None:
    head, (text, image) = trained(make), drawn(0)
    present = PATTERNS.repeat(2, 1)
    expected, gates = head(text, image, present), head.gates(text, image, present)
    text, image = filled(text, present[:, 0], value), filled(image, present[:, 1], value)
    assert torch.equal(head(text, image, present), expected)
    assert expected.isfinite().all()
    for name, gate in head.gates(text, image, present).items():
        assert torch.equal(gate, gates[name])


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_token_at_all_is_finite(make_learned: Callable[[int], FusionHead], tokens: int) -> None:
    text, image = drawn(0, products=4, tokens=5)
    nothing = [Encoded(e.pooled, e.tokens[:, :tokens], torch.zeros_like(e.mask[:, :tokens])) for e in (text, image)]
    head = trained(make_learned)
    fused = head(*nothing, PATTERNS)
    assert fused.isfinite().all()
    fused.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("row", range(4), ids=["both", "text", "image", "neither"])
def test_every_parameter_is_in_the_graph_of_every_batch(make_learned: Callable[[int], FusionHead], row: int) -> None:
    """DDP waits for the gradient of each parameter, whatever is absent in a rank's batch."""
    head, (text, image) = make_learned(DIM), drawn(1)
    head(text, image, PATTERNS[row].expand(8, 2)).square().sum().backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []


def test_after_a_step_every_gradient_is_more_than_zero(make_learned: Callable[[int], FusionHead]) -> None:
    torch.manual_seed(0)
    head, (text, image) = make_learned(DIM), drawn(2)
    target, optimizer = torch.randn(8, DIM), torch.optim.SGD(head.parameters(), lr=0.1)
    for step in range(2):
        (head(text, image, PATTERNS.repeat(2, 1)) - target).square().sum().backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    zero = [name for name, parameter in head.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert zero == []


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_residual_head_starts_as_the_masked_sum(name: str) -> None:
    text, image = drawn(3)
    present = PATTERNS.repeat(2, 1)
    fused = HEADS[name](DIM)(text, image, present)
    torch.testing.assert_close(fused, fusion.MaskedSum(DIM)(text, image, present))


def test_a_head_that_says_it_needs_no_tokens_reads_none(make: Callable[[int], FusionHead]) -> None:
    head, (text, image) = trained(make), drawn(4)
    without = Encoded.pooled_only(text.pooled), Encoded.pooled_only(image.pooled)
    present = torch.ones(8, 2, dtype=torch.bool)
    same = torch.equal(head(text, image, present), head(*without, present))
    assert same is not head.needs_tokens


def test_gates_sum_to_one(make: Callable[[int], FusionHead]) -> None:
    head, (text, image) = trained(make), drawn(5)
    present = PATTERNS.repeat(2, 1)
    gates = head.gates(text, image, present)
    if not gates:
        return
    total = sum(gates.values())
    expected = torch.ones(8) if "expert_0" in gates else present.any(1).float()
    torch.testing.assert_close(total, expected)
    if "text" in gates:
        assert (gates["text"][~present[:, 0]] == 0).all()
        assert (gates["image"][~present[:, 1]] == 0).all()


def test_heads_with_gates() -> None:
    text, image = drawn(5)
    present = PATTERNS.repeat(2, 1)
    named = {name: list(make(DIM).gates(text, image, present)) for name, make in HEADS.items()}
    assert named["Gated-scalar"] == named["Gated-dimension"] == named["WeightedMean"] == ["text", "image"]
    assert named["MoEBilinear"] == ["expert_0", "expert_1", "expert_2", "expert_3"]
    assert named["MaskedSum"] == named["ConcatMLP"] == named["CrossAttention"] == []


def test_products_do_not_see_each_other(make: Callable[[int], FusionHead]) -> None:
    head, (text, image) = trained(make), drawn(6)
    present = PATTERNS.repeat(2, 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = [Encoded(e.pooled[order], e.tokens[order], e.mask[order]) for e in (text, image)]
    torch.testing.assert_close(head(*shuffled, present[order]), head(text, image, present)[order])


def test_padding_of_tokens_does_not_matter(make: Callable[[int], FusionHead]) -> None:
    head, (text, image) = trained(make), drawn(7)
    pad = torch.nn.functional.pad
    longer = [Encoded(e.pooled, pad(e.tokens, (0, 0, 0, 3), value=9.0), pad(e.mask, (0, 3))) for e in (text, image)]
    torch.testing.assert_close(head(*longer, PATTERNS.repeat(2, 1)), head(text, image, PATTERNS.repeat(2, 1)))


def test_bf16_autocast_is_near_fp32(make_learned: Callable[[int], FusionHead]) -> None:
    torch.manual_seed(0)
    head, (text, image) = make_learned(DIM).eval(), drawn(8)
    present = PATTERNS.repeat(2, 1)
    expected = head(text, image, present)
    with torch.autocast("cpu", torch.bfloat16):
        fused = head(text, image, present)
    torch.testing.assert_close(fused.float(), expected, atol=0.03, rtol=0.03)
    fused.float().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_fp64_is_fp64(make: Callable[[int], FusionHead]) -> None:
    head, (text, image) = trained(make).double(), drawn(9)
    wide = [Encoded(e.pooled.double(), e.tokens.double(), e.mask) for e in (text, image)]
    assert head(*wide, PATTERNS.repeat(2, 1)).dtype == torch.float64


def test_dropout_acts_in_training_only() -> None:
    text, image = drawn(10)
    present = torch.ones(8, 2, dtype=torch.bool)
    for head in (
        fusion.ConcatMLP(DIM, dropout=0.5, residual=False),
        fusion.MoEBilinear(DIM, dropout=0.5, residual=False),
    ):
        assert not torch.equal(head(text, image, present), head(text, image, present))
        head.eval()
        assert torch.equal(head(text, image, present), head(text, image, present))


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: fusion.CrossAttention(8, heads=3), "CrossAttention: heads is 3; it must divide dim, 8"),
        (lambda: fusion.CrossAttention(8, heads=0), "CrossAttention: heads is 0; it must be at least 1"),
        (lambda: fusion.ConcatMLP(8, layers=0), "ConcatMLP: layers is 0; it must be at least 1"),
        (lambda: fusion.ConcatLinear(8, hidden=0.5), r"ConcatLinear: hidden \* dim is 4; it must be at least 8"),
        (lambda: fusion.Gated(8, hidden=0), r"Gated: hidden \* dim is 0; it must be at least 1"),
        (lambda: fusion.MoEBilinear(8, experts=0), "MoEBilinear: experts is 0; it must be at least 1"),
        (lambda: fusion.WeightedMean(8, weight=1.0), "WeightedMean: weight is 1.0"),
    ],
)
def test_wrong_options(make_wrong: Callable[[], FusionHead], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_wrong()


@pytest.mark.slow
def test_compiled_is_the_same() -> None:
    head, (text, image) = trained(HEADS["MoEBilinear"]), drawn(11)
    expected = head(text, image, PATTERNS.repeat(2, 1))
    head.compile()
    torch.testing.assert_close(head(text, image, PATTERNS.repeat(2, 1)), expected)
