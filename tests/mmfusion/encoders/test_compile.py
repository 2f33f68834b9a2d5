"""Compiled in place: the same vectors, the same names in the checkpoint."""

from collections.abc import Callable

import pytest
import torch

from mmfusion.encoders import (
    Encoded,
    ImageEncoder,
    ScratchTextEncoder,
    SentenceTransformerEncoder,
    TextEncoder,
    TimmEncoder,
)

TEXTS = ["red shirt", "striped blue dress"]


def scratch() -> ScratchTextEncoder:
    encoder = ScratchTextEncoder(width=16, heads=2, vocabulary=300)
    encoder.fit(TEXTS)
    return encoder


@pytest.mark.parametrize(
    "make", [scratch, SentenceTransformerEncoder, lambda: TimmEncoder("test_resnet")], ids=["scratch", "minilm", "timm"]
)
@torch.no_grad()
def test_compiled_is_the_same(make: Callable[[], TextEncoder | ImageEncoder]) -> None:
    encoder = make().eval()

    def encoded() -> Encoded:
        if isinstance(encoder, ImageEncoder):
            return encoder(torch.arange(3 * 48 * 40, dtype=torch.uint8).reshape(1, 3, 48, 40), torch.tensor([0]))
        return encoder(TEXTS)

    expected, names = encoded(), list(encoder.state_dict())
    encoder.compile_network(backend="eager")
    torch.testing.assert_close(encoded().pooled, expected.pooled)
    torch.testing.assert_close(encoded().tokens, expected.tokens)
    assert list(encoder.state_dict()) == names
