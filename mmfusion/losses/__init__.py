"""Losses over the batch of all ranks; modules.py has those that a YAML names."""

from mmfusion.losses.gather import identity_pairs, match_pairs
from mmfusion.losses.modules import InfoNCE, Loss
from mmfusion.losses.pairs import Pairs

__all__ = ["InfoNCE", "Loss", "Pairs", "identity_pairs", "match_pairs"]
