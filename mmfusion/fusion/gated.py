"""Gated multimodal unit (Arevalo 2017, arXiv 1702.01992, eq. 1 to 5): each product weighs its views."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, at_least, softmax_over_present, start_at_zero, unit_scale, views


class Gated(FusionHead):
    """Sum over the modalities m that are there of g_m h_m, with g = softmax over m of (Wg [t; v])_m.

    With two modalities that softmax is the paper's sigmoid. h_m is tanh(V_m x_m) as in the paper or, with `residual`,
    x_m + V_m x_m, and the sum is multiplied by the number of modalities there: with Wg and V_m at zero, where training
    starts, that is the masked sum.

    Args:
        kind: "scalar", one gate per modality, or "dimension", one per modality and dimension.
        hidden: width of a hidden layer of the gate (GELU), in multiples of dim; None: Wg alone, as in the paper.
        residual: gate the views themselves, corrected by V_m, starting from the masked sum.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["scalar", "dimension"] = "dimension",
        hidden: float | None = None,
        residual: bool = True,
    ) -> None:
        super().__init__(dim)
        self.residual = residual
        width = 2 * dim if hidden is None else at_least("Gated", "hidden * dim", int(hidden * dim), 1)
        self.gate_hidden = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(2 * dim, width), nn.GELU())
        self.gate = nn.Linear(width, 2 * {"scalar": 1, "dimension": dim}[kind])
        self.text = nn.Linear(dim, dim)
        self.image = nn.Linear(dim, dim)
        if residual:
            for layer in (self.gate, self.text, self.image):
                start_at_zero(layer)

    def _weights(
        self, t: Float[Tensor, "product dim"], v: Float[Tensor, "product dim"], present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product 2 gate"]:
        logits = self.gate(self.gate_hidden(torch.cat([unit_scale(t), unit_scale(v)], 1)))
        return softmax_over_present(logits.unflatten(1, (2, -1)), present)

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, v = views(text, image, present)
        weights = self._weights(t, v, present)
        learned = torch.stack([self.text(unit_scale(t)), self.image(unit_scale(v))], 1)
        if not self.residual:
            return (weights * learned.tanh()).sum(1)
        return (weights * (torch.stack([t, v], 1) + learned / self.dim**0.5)).sum(1) * present.sum(1, keepdim=True)

    def gates(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> dict[str, Float[Tensor, "product"]]:
        """The share of each modality; mean over the dimensions where each has its own."""
        weights = self._weights(*views(text, image, present), present).mean(2)
        return dict(zip(("text", "image"), weights.unbind(1), strict=True))
