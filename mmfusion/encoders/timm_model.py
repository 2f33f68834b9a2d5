"""A timm model as one module that gives its pooled vector and its tokens. Importing this imports timm: some seconds."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from jaxtyping import Float
from torch import Tensor, nn

from mmfusion.encoders.checkpoint import cached_folder, require_hub

Size = tuple[int, int]


class TimmFeatures(nn.Module):
    """`mean` and `std` are timm's normalisation; `fixed_size` is (height, width) where the model accepts only that.

    Raises ValueError for a name, weights or option that timm or the model does not have.
    """

    def __init__(self, name: str, pretrained: bool, image_size: Size | None, drop_path: float) -> None:
        super().__init__()
        check_name(name)
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        if pretrained:
            options |= {"pretrained": True, "pretrained_cfg_overlay": cached_weights(name)}
        self.name = name
        self.model: Any = create_model(name, image_size, options)
        self.dim: int = self.model.head_hidden_size
        self.token_dim: int = self.model.num_features
        data = timm.data.resolve_model_data_config(self.model)
        self.mean, self.std = data["mean"], data["std"]
        self.fixed_size = fixed_size(name, self.model)

    def check_size(self, size: tuple[int, ...]) -> None:
        if self.fixed_size is not None and size != self.fixed_size:
            raise ValueError(
                f"TimmEncoder: {self.name} was made for photos of {self.fixed_size} (height, width) and received "
                f"{size}; set data.image_size to {list(self.fixed_size)} or the encoder's image_size to {list(size)}"
            )

    def forward(
        self, values: Float[Tensor, "product 3 high wide"]
    ) -> tuple[Float[Tensor, "product pooled"], Float[Tensor, "product token token_width"]]:
        features = self.model.forward_features(values)
        if not isinstance(features, Tensor):
            raise ValueError(f"TimmEncoder: {self.name} gives no single feature map; take another model")
        pooled = self.model.forward_head(features, pre_logits=True)
        if features.ndim == 4 and features.shape[1] == self.token_dim:  # channels first; else they are last
            features = features.permute(0, 2, 3, 1)
        return pooled, features.flatten(1, -2)


def create_model(name: str, image_size: Size | None, options: dict[str, Any]) -> Any:
    """`image_size` reaches models that are made for one size (transformers); others work with any."""
    sized = options | ({"img_size": image_size} if image_size else {})
    try:
        return timm.create_model(name, num_classes=0, **sized)
    except TypeError as error:
        if image_size and "img_size" in str(error):
            return create_model(name, None, options)
        if "drop_path_rate" in str(error):
            raise ValueError(f"TimmEncoder: {name} has no stochastic depth; set drop_path to 0") from error
        raise


def check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        near = ", ".join(get_close_matches(architecture, known, n=3, cutoff=0.4))
        raise ValueError(f"TimmEncoder: timm has no model {name!r}; the nearest names are {near or 'far'}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise ValueError(
            f"TimmEncoder: timm has no weights {name!r}; of this model it has {', '.join(tagged) or 'none'}"
        )


def cached_weights(name: str) -> dict[str, str]:
    """Where the weights lie in the hub's local cache, for timm; empty where the hub has to be asked, and answers."""
    source = timm.get_pretrained_cfg(name)
    if source is None or not source.hf_hub_id:
        raise ValueError(f"TimmEncoder: timm has no weights for {name} on the hub; set pretrained to false")
    folder = cached_folder(source.hf_hub_id)
    for file in ("model.safetensors", "pytorch_model.bin"):
        if folder is not None and (path := Path(folder, file)).is_file():
            return {"file": str(path)}
    require_hub(source.hf_hub_id)
    return {}


def fixed_size(name: str, model: Any) -> Size | None:
    """The only (height, width) that the model accepts, if so; ValueError where its patches would leave pixels out."""
    patches = getattr(model, "patch_embed", None)
    if patches is None or not getattr(patches, "strict_img_size", False):
        return None
    (height, width), (high, wide) = patches.img_size, patches.patch_size
    if height % high or width % wide:
        covered = [-(-height // high) * high, -(-width // wide) * wide]
        raise ValueError(
            f"TimmEncoder: {name} cuts photos into patches of {high} x {wide}, which do not cover {height} x {width}; "
            f"set data.image_size and the encoder's image_size to multiples, such as {covered}"
        )
    return height, width
