"""The text and the image tower of one CLIP or SigLIP checkpoint, projections kept.

Both pooled vectors are in the checkpoint's own shared space: their cosine is its zero-shot score.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mmfusion.encoders.activations import checkpoint_transformer
from mmfusion.encoders.augment import Augment, AugmentName
from mmfusion.encoders.checkpoint import load_checkpoint
from mmfusion.encoders.encoded import Encoded
from mmfusion.encoders.image import ImageEncoder
from mmfusion.encoders.text import TextEncoder, TokenIds

CLIP = "openai/clip-vit-base-patch32"


class DualTextEncoder(TextEncoder):
    """The text tower, with the checkpoint's tokenizer used as in training (SigLIP: padded to full length, no mask).

    Args:
        checkpoint: a folder or a name on the hub; model_type clip or siglip
        checkpoint_activations: less memory in training for a second forward pass
    """

    def __init__(self, checkpoint: str = CLIP, *, checkpoint_activations: bool = False) -> None:
        super().__init__()
        model = load_checkpoint(checkpoint, _dual_model)
        if checkpoint_activations:
            checkpoint_transformer(model, checkpoint)
        self.tokenizer: Any = load_checkpoint(checkpoint, _tokenizer)
        self.network = ProjectedTower(model.text_model, getattr(model, "text_projection", None))
        config = model.config.text_config
        self.dim = self.network.width(getattr(config, "projection_size", config.hidden_size))
        self.token_dim, self.max_tokens = config.hidden_size, config.max_position_embeddings
        self.siglip = model.config.model_type == "siglip"
        self.train()

    def forward(self, texts: list[str]) -> Encoded:
        inputs = self._tokenised(texts, return_tensors="pt", **self._padding(texts))
        inputs = inputs.to(next(self.network.parameters()).device)
        attended = {} if self.siglip else {"attention_mask": inputs["attention_mask"]}
        pooled, tokens = self.network(input_ids=inputs["input_ids"], **attended)
        return Encoded(pooled, tokens, inputs["attention_mask"].bool())

    def _padding(self, texts: list[str]) -> dict[str, Any]:
        if self.siglip:
            return {"padding": "max_length", "max_length": self.max_tokens}
        if self.training:
            return {"padding": "longest"}
        return {"padding": "max_length", "max_length": self.padded_length(max(map(len, self.token_ids(texts))))}

    def _tokenised(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, **{"truncation": True, "max_length": self.max_tokens, **options})

    def token_ids(self, texts: list[str]) -> list[TokenIds]:
        return [tuple(row) for row in self._tokenised(texts)["input_ids"]]

    def compile_network(self, **options: Any) -> None:
        self.network.compile(**{"dynamic": True, **options})


class DualImageEncoder(ImageEncoder):
    """The image tower, with the checkpoint's normalisation; photos of another size are resized to the checkpoint's.

    Args:
        checkpoint: a folder or a name on the hub; model_type clip or siglip
        augment: "none", "light", "strong", or single values (mmfusion.encoders.augment.Augment)
        checkpoint_activations: less memory in training for a second forward pass
    """

    def __init__(
        self, checkpoint: str = CLIP, *, augment: AugmentName | Augment = "none", checkpoint_activations: bool = False
    ) -> None:
        super().__init__(augment)
        self.require_whole_size(checkpoint)
        model = load_checkpoint(checkpoint, _dual_model)
        if checkpoint_activations:
            checkpoint_transformer(model, checkpoint)
        processor = load_checkpoint(checkpoint, _image_processor)
        self.set_normalisation(tuple(processor.image_mean), tuple(processor.image_std))
        self.network = ProjectedTower(model.vision_model, getattr(model, "visual_projection", None))
        config = model.config.vision_config
        self.dim, self.token_dim = self.network.width(config.hidden_size), config.hidden_size
        self.image_size: int = config.image_size
        self.train()

    def forward(self, photo: UInt8[Tensor, "product 3 height width"], draw: Int[Tensor, "product"]) -> Encoded:
        values, size = self.prepared(photo, draw), (self.image_size, self.image_size)
        if values.shape[2:] != size:
            values = F.interpolate(values, size, mode="bicubic", antialias=True)
        pooled, tokens = self.network(pixel_values=values)
        return Encoded.unpadded(pooled, tokens)

    def compile_network(self, **options: Any) -> None:
        self.network.compile(**options)


class ProjectedTower(nn.Module):
    """Pooled vector, through the projection where the checkpoint has one (CLIP), and the last layer's tokens."""

    def __init__(self, body: nn.Module, projection: nn.Linear | None) -> None:
        super().__init__()
        self.body, self.projection = body, projection

    def width(self, unprojected: int) -> int:
        return self.projection.out_features if self.projection is not None else unprojected

    def forward(
        self, **inputs: Tensor
    ) -> tuple[Float[Tensor, "product pooled"], Float[Tensor, "product token token_width"]]:
        output = self.body(**inputs)
        pooled = output.pooler_output
        return self.projection(pooled) if self.projection is not None else pooled, output.last_hidden_state


def _dual_model(source: str) -> Any:
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415  (it takes seconds)

    kind = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    if kind not in ("clip", "siglip"):
        raise ValueError(f"its model_type is {kind!r}; the encoders know clip and siglip")
    return AutoModel.from_pretrained(source, trust_remote_code=False)


def _tokenizer(source: str) -> Any:
    """The checkpoint's own class; SigLIP's needs sentencepiece, without which its tokenizer.json is read as it is."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        try:
            return PreTrainedTokenizerFast.from_pretrained(source)
        except (OSError, ValueError):
            raise ImportError(f"its tokenizer needs a package: {str(error).split('.')[0].strip()}") from error


def _image_processor(source: str) -> Any:
    from transformers import AutoImageProcessor  # noqa: PLC0415

    return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
