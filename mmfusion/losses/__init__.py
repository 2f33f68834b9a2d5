"""Losses over the batch of all ranks; a YAML names them by their class."""

from mmfusion.losses.distillation import Distillation
from mmfusion.losses.gather import identity_pairs, match_pairs
from mmfusion.losses.info_nce import GradedInfoNCE, InfoNCE
from mmfusion.losses.matryoshka import Matryoshka
from mmfusion.losses.modules import Loss
from mmfusion.losses.pairs import Pairs
from mmfusion.losses.sigmoid import Sigmoid

__all__ = [
    "Distillation",
    "GradedInfoNCE",
    "InfoNCE",
    "Loss",
    "Matryoshka",
    "Pairs",
    "Sigmoid",
    "identity_pairs",
    "match_pairs",
]
