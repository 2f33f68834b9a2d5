"""A small text encoder from scratch, whose tokenizer is trained on the catalogue and travels in the checkpoint."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from mmfusion.encoders.encoded import Encoded
from mmfusion.encoders.text import TextEncoder, TokenIds

PAD, START = "[PAD]", "[START]"  # ids 0 and 1; START makes an empty text one token long
SMALLEST = 258  # vocabulary: each byte and the two marks


class ScratchTextEncoder(TextEncoder):
    """A pre-norm transformer with learned positions and masked mean pooling.

    Args:
        width: of tokens and pooled vectors
        layers: transformer layers
        heads: attention heads; must divide width
        vocabulary: rows of the embedding table, and most that the tokenizer may have
        max_tokens: longer texts are cut; at least 2
        dropout: a probability
    """

    def __init__(
        self,
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        vocabulary: int = 4096,
        max_tokens: int = 32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"ScratchTextEncoder: heads is {heads}; it must divide width, {width}")
        if max_tokens < 2:
            raise ValueError(f"ScratchTextEncoder: max_tokens is {max_tokens}; at least 2, a mark and a word")
        if vocabulary < SMALLEST:
            raise ValueError(
                f"ScratchTextEncoder: vocabulary is {vocabulary}; at least {SMALLEST}, all bytes and 2 marks"
            )
        self.dim = self.token_dim = width
        self.vocabulary, self.max_tokens = vocabulary, max_tokens
        self.tokenizer: Tokenizer | None = None
        self.network = TokenTransformer(vocabulary, max_tokens, width, layers=layers, heads=heads, dropout=dropout)

    def fit(self, texts: Iterable[str]) -> None:
        """The same texts, in any order, give the same tokenizer."""
        tokenizer = trained_tokenizer(texts, self.vocabulary)
        self._use(tokenizer)

    def _use(self, tokenizer: Tokenizer) -> None:
        if tokenizer.get_vocab_size() > self.vocabulary:
            raise ValueError(
                f"a tokenizer of {tokenizer.get_vocab_size()} entries for a vocabulary of {self.vocabulary}"
            )
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.enable_padding(pad_id=0, pad_token=PAD)
        self.tokenizer = tokenizer

    def forward(self, texts: list[str]) -> Encoded:
        ids = torch.tensor([row.ids for row in self._encodings(texts)]).to(self.network.embedding.weight.device)
        if not self.training:
            ids = nn.functional.pad(ids, (0, self.padded_length(ids.shape[1]) - ids.shape[1]))
        mask = ids != 0
        tokens = self.network(ids, mask)
        weights = mask / mask.sum(1, keepdim=True)
        return Encoded((weights[:, None].to(tokens.dtype) @ tokens)[:, 0], tokens, mask)

    def token_ids(self, texts: list[str]) -> list[TokenIds]:
        return [tuple(itertools.takewhile(bool, row.ids)) for row in self._encodings(texts)]  # 0 pads

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        if self.tokenizer is None:
            raise RuntimeError("ScratchTextEncoder has no tokenizer yet: call fit(texts) or load a checkpoint")
        return self.tokenizer.encode_batch(texts)

    def compile_network(self, **options: Any) -> None:
        self.network.compile(**{"dynamic": True, **options})

    def get_extra_state(self) -> str:
        return self.tokenizer.to_str() if self.tokenizer is not None else ""

    def set_extra_state(self, state: str) -> None:
        if state:
            self._use(Tokenizer.from_str(state))


class TokenTransformer(nn.Module):
    """Token ids into contextual tokens."""

    def __init__(
        self, vocabulary: int, max_tokens: int, width: int, *, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(max_tokens, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, ids: Int[Tensor, "product token"], mask: Bool[Tensor, "product token"]
    ) -> Float[Tensor, "product token width"]:
        tokens = self.dropout(self.embedding(ids) + self.position[: ids.shape[1]])
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=~mask)
        return self.norm(tokens)


def trained_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE on lower-cased words and punctuation marks, accents stripped; nothing is unknown.

    Not WordPiece: the library breaks its ties by the order of a hash map, so that the same texts give another tokenizer
    in each process.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, START],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    return tokenizer
