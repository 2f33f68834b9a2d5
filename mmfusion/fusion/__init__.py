"""Fusion heads, swapped by name: `--model.fusion=Gated`."""

from mmfusion.fusion.concat_linear import ConcatLinear
from mmfusion.fusion.concat_mlp import ConcatMLP
from mmfusion.fusion.cross_attention import CrossAttention
from mmfusion.fusion.gated import Gated
from mmfusion.fusion.head import FusionHead
from mmfusion.fusion.masked_sum import MaskedSum
from mmfusion.fusion.moe_bilinear import MoEBilinear
from mmfusion.fusion.weighted_mean import WeightedMean

__all__ = [
    "ConcatLinear",
    "ConcatMLP",
    "CrossAttention",
    "FusionHead",
    "Gated",
    "MaskedSum",
    "MoEBilinear",
    "WeightedMean",
]
