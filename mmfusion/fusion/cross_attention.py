"""Cross-attention: text tokens attend to image tokens and the reverse (co-attention of ViLBERT, arXiv 1908.02265)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.fusion.head import FusionHead, at_least, start_at_zero, unit_scale


class CrossAttention(FusionHead):
    """W [mean of the text's tokens; mean of the image's tokens] + b, after layers in which each attends to the other.

    A modality's sequence is its view vector, then its tokens: it is never empty where the modality is there. A product
    with one modality has nothing to attend to: attention adds nothing, and the other mean is zeros.

    Args:
        layers: number of layers, each with both directions.
        heads: attention heads; must divide dim.
        hidden: width of the feed-forward layers, in multiples of dim.
        dropout: on attention weights and after both parts of a layer, a probability.
        residual: add to the masked sum of the views, starting from it.
    """

    needs_tokens: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 1,
        heads: int = 4,
        hidden: float = 2.0,
        dropout: float = 0.1,
        residual: bool = True,
    ) -> None:
        super().__init__(dim)
        at_least("CrossAttention", "layers", layers, 1)
        width = at_least("CrossAttention", "hidden * dim", int(hidden * dim), 1)
        if at_least("CrossAttention", "heads", heads, 1) and dim % heads:
            raise ValueError(f"CrossAttention: heads is {heads}; it must divide dim, {dim}")
        self.residual = residual
        self.text_layers = nn.ModuleList(AttendTo(dim, heads, width, dropout) for _ in range(layers))
        self.image_layers = nn.ModuleList(AttendTo(dim, heads, width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(2 * dim, dim)
        if residual:
            start_at_zero(self.out)

    def forward(
        self, text: Encoded, image: Encoded, present: Bool[Tensor, "product 2"]
    ) -> Float[Tensor, "product dim"]:
        t, text_mask = sequence(text, present[:, 0])
        v, image_mask = sequence(image, present[:, 1])
        views = (t[:, 0] + v[:, 0]) / self.dim**0.5
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            t, v = text_layer(t, v, image_mask), image_layer(v, t, text_mask)
        means = [masked_mean(self.norm(t), text_mask), masked_mean(self.norm(v), image_mask)]
        added = self.out(torch.cat(means, 1)) / self.dim**0.5
        return views + added if self.residual else added


class AttendTo(nn.Module):
    """A pre-norm transformer layer whose keys and values are the other modality's sequence."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_norm, self.key_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.attended = nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        own: Float[Tensor, "product own dim"],
        other: Float[Tensor, "product other dim"],
        mask: Bool[Tensor, "product other"],
    ) -> Float[Tensor, "product own dim"]:
        """`mask` is True on real positions of `other`; with none, attention adds nothing."""
        empty = ~mask.any(1)[:, None]
        query = self._split(self.query(self.query_norm(own)))
        key, value = (self._split(part) for part in self.key_value(self.key_norm(other)).chunk(2, -1))
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=(mask | empty)[:, None, None], dropout_p=self.dropout * self.training
        )
        attended = self.attended(attended.transpose(1, 2).flatten(2))
        own = own + self.drop(torch.where(empty[:, :, None], 0, attended))
        return own + self.drop(self.feed(self.feed_norm(own)))

    def _split(self, rows: Float[Tensor, "product length dim"]) -> Float[Tensor, "product head length head_dim"]:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sequence(
    encoded: Encoded, present: Bool[Tensor, "product"]
) -> tuple[Float[Tensor, "product length dim"], Bool[Tensor, "product length"]]:
    """[view; tokens] with zeros at every position that is not real, and the mask of the real ones."""
    mask = torch.cat([present[:, None], encoded.mask & present[:, None]], 1)
    rows = torch.cat([unit_scale(encoded.pooled)[:, None], encoded.tokens], 1)
    return torch.where(mask[:, :, None], rows, 0), mask


def masked_mean(
    rows: Float[Tensor, "product length dim"], mask: Bool[Tensor, "product length"]
) -> Float[Tensor, "product dim"]:
    """Mean over the real positions; zeros where there is none."""
    weights = mask.to(rows.dtype) / mask.sum(1, keepdim=True).clamp_min(1)
    return (weights[:, None] @ rows)[:, 0]
