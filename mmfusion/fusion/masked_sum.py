"""Sum of the views that are there: no parameters, and hard to beat (UniIR, arXiv 2311.17136, "score-level" fusion)."""

from jaxtyping import Bool, Float
from torch import Tensor

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, views


class MaskedSum(FusionHead):
    """t + v; with one modality absent, the other view alone."""

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, v = views(text, image, present)
        return t + v
