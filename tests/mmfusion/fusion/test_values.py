"""Heads with weights set by hand, against values derived by hand or by a slow loop."""

import math

import pytest
import torch
from torch import Tensor, nn

from mmfusion.encoders import Encoded
from mmfusion.fusion import ConcatLinear, ConcatMLP, CrossAttention, Gated, MaskedSum, MoEBilinear, WeightedMean
from mmfusion.fusion.cross_attention import AttendTo

T, V = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
ROOT = math.sqrt(2)  # of dim: heads work on sqrt(dim) times the views
BOTH = torch.tensor([[True, True]])
TEXT = torch.tensor([[True, False]])
IMAGE = torch.tensor([[False, True]])


def fused(head: nn.Module, present: Tensor = BOTH) -> Tensor:
    return head(Encoded.pooled_only(T), Encoded.pooled_only(V), present)


@torch.no_grad()
def set_to(parameter: Tensor, *values: float) -> None:
    parameter.copy_(torch.tensor(values).reshape(parameter.shape))


def close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=torch.float32))


def test_masked_sum() -> None:
    close(fused(MaskedSum(2)), 1.6, 0.8)
    close(fused(MaskedSum(2), TEXT), 0.6, 0.8)
    close(fused(MaskedSum(2), ~(TEXT | IMAGE)), 0, 0)


def test_weighted_mean() -> None:
    head = WeightedMean(2, weight=0.25)
    close(fused(head), 0.25 * 0.6 + 0.75, 0.25 * 0.8)
    close(fused(head, TEXT), 0.6, 0.8)
    close(fused(head, IMAGE), 1, 0)
    assert list(head.parameters()) == []
    assert {name: round(gate.item(), 6) for name, gate in head.gates(*views(), BOTH).items()} == {
        "text": 0.25,
        "image": 0.75,
    }


def views() -> tuple[Encoded, Encoded]:
    return Encoded.pooled_only(T), Encoded.pooled_only(V)


def test_learned_weight_is_the_fixed_one_plus_a_gradient() -> None:
    head = WeightedMean(2, weight=0.25, learned=True)
    close(fused(head), 0.9, 0.2)
    fused(head).sum().backward()  # d/dlogit sum(w t + (1 - w) v) = w (1 - w) (sum t - sum v)
    close(head.logit.grad, 0.25 * 0.75 * (1.4 - 1.0))


def test_concat_linear() -> None:
    head = ConcatLinear(2)
    set_to(head.out.weight, 1, 0, 0, 0, 0, 1, 1, 0)  # first output: t1; second: t2 + v1
    set_to(head.out.bias, 0, ROOT)
    close(fused(head), 1.6 + 0.6, 0.8 + 0.8 + 1 + 1)
    close(fused(head, IMAGE), 1 + 0, 0 + 1 + 1)
    head.residual = False
    close(fused(head), 0.6, 2.8)


def test_a_wide_concat_linear_is_linear() -> None:
    torch.manual_seed(0)
    head = ConcatLinear(2, hidden=3.0, residual=False)
    plain = ConcatLinear(2, residual=False)
    with torch.no_grad():
        plain.out.weight.copy_(head.out.weight @ head.first.weight)
        plain.out.bias.copy_(head.out.bias)
    assert sum(p.numel() for p in head.parameters()) == 4 * 6 + 6 * 2 + 2
    torch.testing.assert_close(fused(head), fused(plain))


def test_concat_mlp() -> None:
    head = ConcatMLP(2, hidden=0.5, layers=1, residual=False).eval()
    set_to(head.hidden[0][0].weight, 0, 0, 1, 0)
    set_to(head.hidden[0][0].bias, 0)
    set_to(head.out.weight, 2, -1)
    set_to(head.out.bias, 0, 0)
    gelu = ROOT * 0.5 * (1 + math.erf(ROOT / math.sqrt(2)))  # gelu(sqrt(2) v1)
    close(fused(head), 2 * gelu / ROOT, -gelu / ROOT)


def test_gated_scalar_by_hand() -> None:
    head = Gated(2, kind="scalar", residual=False)
    set_to(head.gate.weight, *[0] * 8)
    set_to(head.gate.bias, math.log(3), 0)  # 3/4 text, 1/4 image
    set_to(head.text.weight, 1, 0, 0, 1)
    set_to(head.image.weight, 0, 1, 1, 0)
    set_to(head.text.bias, 0, 0)
    set_to(head.image.bias, 0, 0)
    a, b = math.tanh(ROOT * 0.6), math.tanh(ROOT * 0.8)
    close(fused(head), 0.75 * a + 0.25 * 0, 0.75 * b + 0.25 * math.tanh(ROOT))
    close(fused(head, TEXT), a, b)


def test_residual_gate_weighs_the_views() -> None:
    head = Gated(2, kind="dimension")
    set_to(head.gate.bias, math.log(3), 0, 0, 0)  # text has 3/4 of the first dimension, 1/2 of the second
    close(fused(head), 2 * (0.75 * 0.6 + 0.25), 2 * 0.5 * 0.8)
    close(fused(head, IMAGE), 1, 0)
    assert head.gates(*views(), BOTH)["text"].item() == pytest.approx((0.75 + 0.5) / 2)


def test_gate_with_a_hidden_layer() -> None:
    head = Gated(2, hidden=0.5, kind="scalar")
    set_to(head.gate_hidden[0].weight, 0, 0, 1, 0)
    set_to(head.gate_hidden[0].bias, 0)
    set_to(head.gate.weight, 1, 0)
    gelu = ROOT * 0.5 * (1 + math.erf(ROOT / math.sqrt(2)))  # gelu(sqrt(2) v1)
    share = 1 / (1 + math.exp(-gelu))
    close(fused(head), 2 * (share * 0.6 + (1 - share)), 2 * share * 0.8)


def test_moe_is_its_formula() -> None:
    """A slow loop over products and experts, term by term from FACTS: g, h and out."""
    torch.manual_seed(0)
    dim, experts, width = 6, 3, 4
    head = MoEBilinear(dim, experts=experts, rank=2, hidden=width / dim, residual=False).eval().double()
    t, v = (nn.functional.normalize(torch.randn(5, dim, dtype=torch.float64), dim=1) for _ in range(2))
    head.second_bias.data.normal_()
    out = head(Encoded.pooled_only(t), Encoded.pooled_only(v), torch.ones(5, 2, dtype=torch.bool))
    gates = head.gates(Encoded.pooled_only(t), Encoded.pooled_only(v), torch.ones(5, 2, dtype=torch.bool))
    for row in range(5):
        a, b = t[row] * dim**0.5, v[row] * dim**0.5
        g = (head.gate.weight @ torch.cat([a, b, a * b]) + head.gate.bias).softmax(0)
        h = torch.zeros(dim, dtype=torch.float64)
        for m in range(experts):
            rows = slice(m * width, (m + 1) * width)
            hidden = nn.functional.gelu(head.first.weight[rows] @ torch.cat([a, b]) + head.first.bias[rows])
            h = h + g[m] * (head.second[m].T @ hidden + head.second_bias[m])
            assert gates[f"expert_{m}"][row].item() == pytest.approx(g[m].item(), rel=1e-12)
        bilinear = (head.bilinear_text.weight @ a) * (head.bilinear_image.weight @ b)
        torch.testing.assert_close(out[row], head.out.weight @ torch.cat([h, bilinear]) / dim**0.5)


def test_moe_without_a_bilinear_term() -> None:
    head = MoEBilinear(2, rank=0, experts=1, hidden=0.5, residual=False).eval()
    assert [name for name, _ in head.named_parameters() if "bilinear" in name] == []
    set_to(head.second, 0, 0)
    set_to(head.second_bias, 3, 4)
    set_to(head.out.weight, 1, 0, 0, 1)
    close(fused(head), 3 / ROOT, 4 / ROOT)


def test_attention_with_one_key_returns_its_value() -> None:
    torch.manual_seed(0)
    layer = AttendTo(dim=4, heads=2, width=4, dropout=0.0)
    nn.init.zeros_(layer.feed[-1].weight)
    nn.init.zeros_(layer.feed[-1].bias)
    own, other = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    out = layer(own, other, torch.tensor([[False, True]]))
    value = layer.key_value(layer.key_norm(other[:, 1:])).chunk(2, -1)[1]
    torch.testing.assert_close(out, own + layer.attended(value))


def test_attention_against_torch() -> None:
    torch.manual_seed(0)
    layer = AttendTo(dim=8, heads=2, width=4, dropout=0.0)
    oracle = nn.MultiheadAttention(8, 2, batch_first=True)
    oracle.in_proj_weight.data = torch.cat([layer.query.weight, layer.key_value.weight]).detach()
    oracle.in_proj_bias.data = torch.cat([layer.query.bias, layer.key_value.bias]).detach()
    oracle.out_proj.load_state_dict(layer.attended.state_dict())
    nn.init.zeros_(layer.feed[-1].weight)
    nn.init.zeros_(layer.feed[-1].bias)
    own, other = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    keys = layer.key_norm(other)
    expected = own + oracle(layer.query_norm(own), keys, keys, key_padding_mask=~mask)[0]
    torch.testing.assert_close(layer(own, other, mask), expected)


def test_cross_attention_reads_the_other_modality() -> None:
    """The text's mean moves with an image token, and only with real ones."""
    torch.manual_seed(0)
    head = CrossAttention(8, residual=False).eval()
    text, image = (
        Encoded(nn.functional.normalize(torch.randn(1, 8), dim=1), torch.randn(1, 2, 8), torch.tensor([[True, False]]))
        for _ in range(2)
    )
    before = head(text, image, BOTH)
    image.tokens[0, 1] += 1
    assert torch.equal(head(text, image, BOTH), before)
    nn.init.zeros_(head.out.weight[:, 8:])  # the image's own mean does not reach the output
    before = head(text, image, BOTH)
    image.tokens[0, 0] += torch.randn(8)
    assert not torch.allclose(head(text, image, BOTH), before)
