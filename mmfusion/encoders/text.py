"""Text encoders: strings in, pooled vectors and tokens out. Any sentence-transformers model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.encoders.activations import checkpoint_transformer
from mmfusion.encoders.checkpoint import MINILM, load_checkpoint
from mmfusion.encoders.encoded import Encoded

TokenIds = tuple[int, ...]
STEP = 8  # tokens: in eval mode, texts are padded to a multiple


class TextEncoder(nn.Module, ABC):
    """`dim` is the width of the pooled vector, `token_dim` that of the tokens; longer texts are cut at `max_tokens`."""

    dim: int
    token_dim: int
    max_tokens: int

    @abstractmethod
    def forward(self, texts: list[str]) -> Encoded:
        """Tokenises on the CPU and encodes on the device of the parameters; an empty text is a text."""

    @abstractmethod
    def token_ids(self, texts: list[str]) -> list[TokenIds]:
        """What the network is given of each text, without padding: equal ids, equal outputs."""

    def padded_length(self, longest: int) -> int:
        """Tokens that a batch is padded to in eval mode, whose longest text has `longest`.

        Products of other shapes round otherwise: texts of one padded length, encoded so many at a time, have outputs
        that do not depend on their neighbours to the last bit.
        """
        return min(self.max_tokens, steps(longest) * STEP)

    @abstractmethod
    def compile_network(self, **options: Any) -> None:
        """Compiles the network in place, with torch.compile's options; names in the state_dict stay as they are."""

    def fit(self, texts: Iterable[str]) -> None:
        """Trains the tokenizer on the catalogue's texts before training; nothing where it comes with the weights."""


def steps(tokens: int) -> int:
    """A text's length in whole steps, upwards; an empty one is a step long."""
    return max(1, -(-tokens // STEP))


class SentenceTransformerEncoder(TextEncoder):
    """Any sentence-transformers model; pooled vectors have the cosines of SentenceTransformer.encode.

    Vectors are not normalised, even where the model's own last module does so. Code that comes with a checkpoint is
    never run.

    Args:
        model: a folder, or a name on the hub (its local cache and, for all-MiniLM-L6-v2, the dev extra come first)
        max_tokens: longer texts are cut; never more than the model's own limit
        prompt: put before every text, such as "query: " for E5; None is the model's own default
        checkpoint_activations: less memory in training for a second forward pass; for transformers
    """

    def __init__(
        self,
        model: str = MINILM,
        *,
        max_tokens: int = 64,
        prompt: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.network = load_checkpoint(model, _sentence_transformer)
        if checkpoint_activations:
            checkpoint_transformer(getattr(self.network[0], "model", None), model)
        self.max_tokens = min(max_tokens, self.network.max_seq_length or max_tokens)
        self.network.max_seq_length = self.max_tokens
        self.prompt = self.network._resolve_prompt(prompt, None)
        with torch.no_grad():
            probe = self(["probe"])
        self.dim, self.token_dim = probe.pooled.shape[-1], probe.tokens.shape[-1]
        self.train()  # a loaded network is in eval mode

    def forward(self, texts: list[str]) -> Encoded:
        device = next(self.network.parameters()).device
        features = self._features(texts, {} if self.training else self._padding(texts))
        features = {key: part.to(device) if isinstance(part, Tensor) else part for key, part in features.items()}
        features = self.network(features)
        pooled, tokens = features["sentence_embedding"], features.get("token_embeddings")
        if tokens is None:  # static embeddings, CLIP: the model shows no tokens
            tokens, mask = pooled[:, None], torch.ones(len(pooled), 1, device=device)
        else:
            mask = features["attention_mask"]
        return Encoded(pooled, tokens, mask.bool())

    def _padding(self, texts: list[str]) -> dict[str, Any]:
        return {"padding": "max_length", "max_length": self.padded_length(max(map(len, self.token_ids(texts))))}

    def _features(self, texts: list[str], padding: dict[str, Any]) -> Any:
        # as a mapping where a model also knows photos: it would take a title that is an address for one, and fetch it
        inputs = texts if self.network.modalities == ["text"] else [{"text": text} for text in texts]
        options = {"processing_kwargs": {"text": padding}} if padding else {}
        return self.network.preprocess(inputs, prompt=self.prompt, **options)

    def token_ids(self, texts: list[str]) -> list[TokenIds]:
        features = self._features(texts, {})
        ids, mask = features["input_ids"], features.get("attention_mask")
        if mask is None:  # static embeddings: one list of tokens, and where each text starts
            rows = ids.tensor_split(features["offsets"][1:])
        else:
            rows = [row[seen] for row, seen in zip(ids, mask.bool(), strict=True)]
        return [tuple(row.tolist()) for row in rows]

    def compile_network(self, **options: Any) -> None:
        self.network[0].compile(**{"dynamic": True, **options})


def _sentence_transformer(source: str) -> Any:
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  (it takes seconds)
    from sentence_transformers.sentence_transformer.modules import Normalize  # noqa: PLC0415

    network = SentenceTransformer(source, device="cpu", trust_remote_code=False)
    if isinstance(network[-1], Normalize):
        del network[-1]
    if getattr(network[0], "module_output_name", None) == "token_embeddings" and hasattr(network[0].model, "pooler"):
        network[0].model.pooler = None  # BERT's own, whose output nobody reads: parameters without a gradient
    return network
