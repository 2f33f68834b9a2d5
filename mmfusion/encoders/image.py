"""Image encoders: photos in, pooled vectors and tokens out. Any timm model, with timm's own normalisation."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmfusion.encoders.activations import checkpoint_timm
from mmfusion.encoders.augment import PRESETS, Augment, AugmentName, augmented
from mmfusion.encoders.encoded import Encoded


class ImageEncoder(nn.Module, ABC):
    """`dim` is the width of the pooled vector, `token_dim` that of the tokens.

    Photos are augmented in training mode only: a frozen encoder, in eval mode, sees them as they are.
    """

    dim: int
    token_dim: int
    mean: Tensor
    std: Tensor

    def __init__(self, augment: AugmentName | Augment) -> None:
        super().__init__()
        self.augment = PRESETS[augment] if isinstance(augment, str) else augment

    @abstractmethod
    def forward(self, photo: UInt8[Tensor, "product 3 height width"], draw: Int[Tensor, "product"]) -> Encoded:
        """RGB photos; `draw` seeds the augmentation of each."""

    @abstractmethod
    def compile_network(self, **options: Any) -> None:
        """Compiles the network in place, with torch.compile's options; names in the state_dict stay as they are."""

    def require_whole_size(self, name: str) -> None:
        """Raises ValueError where photos are to be smaller in training, for a network that takes one size alone."""
        if self.augment is not None and self.augment.scale < 1:
            raise ValueError(
                f"augment: scale is {self.augment.scale}; {name} takes photos of one size alone: leave it out"
            )

    def set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Mean and standard deviation of red, green and blue, for values 0 to 1."""
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def prepared(
        self, photo: UInt8[Tensor, "product 3 height width"], draw: Int[Tensor, "product"]
    ) -> Float[Tensor, "product 3 high wide"]:
        """Augmented in training mode, then normalised."""
        values = photo.to(self.mean.dtype) / 255
        if self.training and self.augment is not None:
            values = augmented(values, draw, self.augment)
        return (values - self.mean) / self.std


class TimmEncoder(ImageEncoder):
    """Any timm model without its classifier.

    The pooled vector is what the classifier would receive; tokens are the last feature map or the transformer's tokens
    (class token included), and may be of another width. A CLIP model of timm's loses its projection this way: see
    DualImageEncoder.

    Args:
        model: a name of timm.list_models(), with or without the tag of its weights
        pretrained: load its weights, from the hub's local cache or the hub
        image_size: (height, width) of the photos, for models of a fixed input size; None is the model's own
        augment: "none", "light", "strong", or single values (mmfusion.encoders.augment.Augment)
        drop_path: stochastic depth, a probability; for models that have it
        checkpoint_activations: less memory in training for a second forward pass; not with BatchNorm
    """

    def __init__(
        self,
        model: str = "mobilenetv3_small_100",
        *,
        pretrained: bool = False,
        image_size: tuple[int, int] | None = None,
        augment: AugmentName | Augment = "light",
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(augment)
        from mmfusion.encoders.timm_model import TimmFeatures  # noqa: PLC0415  (importing timm takes seconds)

        self.network = TimmFeatures(model, pretrained, image_size, drop_path)
        if self.network.fixed_size is not None:
            self.require_whole_size(model)
        if checkpoint_activations:
            checkpoint_timm(self.network.model, model)
        self.dim, self.token_dim = self.network.dim, self.network.token_dim
        self.set_normalisation(self.network.mean, self.network.std)

    def forward(self, photo: UInt8[Tensor, "product 3 height width"], draw: Int[Tensor, "product"]) -> Encoded:
        self.network.check_size(tuple(photo.shape[2:]))
        # channels last: 14 times faster on CPU for depthwise convolutions, and what tensor cores want
        return Encoded.unpadded(*self.network(self.prepared(photo, draw).contiguous(memory_format=torch.channels_last)))

    def compile_network(self, **options: Any) -> None:
        self.network.compile(**options)
