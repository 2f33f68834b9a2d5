"""The two towers: plain modules, each usable alone. An encoder's output is projected into the shared space of `dim`.

`encode` and `project` are apart, because the outputs of a frozen encoder are computed once and projected many times.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmfusion.batch import ProductBatch
from mmfusion.encoders import Encoded, ImageEncoder, TextEncoder
from mmfusion.fusion import FusionHead
from mmfusion.losses.functional import widened

MODALITIES = ("text", "image")


class Projection(nn.Module):
    """An encoder's vectors into the shared space: linear, or with one hidden layer of the same size.

    A linear projection between equal sizes starts as the identity, so that towers that already share a space (CLIP,
    or one text encoder for both sides) start from their zero-shot similarity.
    """

    def __init__(self, width: int, dim: int, hidden: bool = False) -> None:
        super().__init__()
        self.network: nn.Module
        if hidden:
            self.network = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
        else:
            self.network = nn.Linear(width, dim, bias=False)
            if width == dim:
                nn.init.eye_(self.network.weight)

    def forward(self, x: Float[Tensor, "*any width"]) -> Float[Tensor, "*any dim"]:
        return self.network(x)


class View(nn.Module):
    """An encoder and its projection: text or photo into unit vectors of the shared space, and tokens for heads."""

    def __init__(self, encoder: TextEncoder | ImageEncoder, dim: int, hidden: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = Projection(encoder.dim, dim, hidden)
        self.token_projection: nn.Module | None = None

    def attend(self, dim: int) -> None:
        """Gives the tokens a projection of their own; only for heads that read tokens."""
        self.token_projection = Projection(self.encoder.token_dim, dim)

    def project(self, encoded: Encoded) -> Encoded:
        """Unit-norm pooled vectors (product, dim), in fp32 under autocast too; tokens (product, token, dim)."""
        pooled = normalize(widened(self.projection(encoded.pooled)), dim=-1)
        if self.token_projection is None:
            return Encoded.pooled_only(pooled)
        return Encoded(pooled, self.token_projection(encoded.tokens), encoded.mask)


class QueryTower(View):
    """Query text into unit vectors."""

    encoder: TextEncoder

    def forward(self, texts: list[str]) -> Float[Tensor, "query dim"]:
        return self.project(self.encoder(texts)).pooled


class ProductTower(nn.Module):
    """Title and photo into the views `text`, `image` and `fused`; with one modality alone only that view exists."""

    def __init__(self, text: View | None, image: View | None, fusion: FusionHead | None) -> None:
        super().__init__()
        if (fusion is None) == (text is not None and image is not None):
            raise ValueError("a fusion head goes with two modalities, and only with two")
        self.text, self.image, self.fusion = text, image, fusion
        if fusion is not None and fusion.needs_tokens:
            assert text is not None
            assert image is not None
            text.attend(fusion.dim)
            image.attend(fusion.dim)

    @property
    def views(self) -> list[str]:
        """The views that exist, the primary one last."""
        return [name for name in ("text", "image") if getattr(self, name) is not None] + ["fused"] * bool(self.fusion)

    def encode(self, batch: ProductBatch, names: set[str]) -> dict[str, Encoded]:
        """The encoders' own outputs for the modalities that the views `names` are made of."""
        encoded = {}
        if self.text is not None and names & {"text", "fused"}:
            encoded["text"] = self.text.encoder(batch.text)
        if self.image is not None and names & {"image", "fused"}:
            encoded["image"] = self.image.encoder(batch.photo, batch.draw)
        return encoded

    def project(self, encoded: dict[str, Encoded]) -> dict[str, Encoded]:
        """Encoder outputs of one or both modalities in the shared space; `pooled` are the single views."""
        return {name: getattr(self, name).project(part) for name, part in encoded.items()}

    def fuse(self, projected: dict[str, Encoded], present: Bool[Tensor, "product 2"]) -> Float[Tensor, "product dim"]:
        """The view `fused`, as unit vectors, in fp32 under autocast too."""
        assert self.fusion is not None
        return normalize(widened(self.fusion(projected["text"], projected["image"], present)), dim=-1)

    def forward(self, batch: ProductBatch) -> dict[str, Float[Tensor, "product dim"]]:
        """Every view of the products, as unit vectors."""
        return self.vectors(self.project(self.encode(batch, set(self.views))), set(self.views), batch.present)

    def vectors(
        self,
        projected: dict[str, Encoded],
        names: set[str],
        present: Bool[Tensor, "product 2"],
        visible: Bool[Tensor, "product 2"] | None = None,
    ) -> dict[str, Float[Tensor, "product dim"]]:
        """The views `names` from the projected modalities that they are made of.

        A single view of what is absent is the zero vector: no query finds a product by a photo that it lacks.
        visible: what the fused view may see of what is present; everything when not given.
        """
        views = {
            name: torch.where(present[:, MODALITIES.index(name), None], part.pooled, 0)
            for name, part in projected.items()
            if name in names
        }
        seen = present if visible is None else visible
        return views | {"fused": self.fuse(projected, seen)} if "fused" in names else views
