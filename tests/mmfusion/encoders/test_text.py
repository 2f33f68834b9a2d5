"""Sentence-transformers models: the library's own vectors, tokens, loading."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch.nn.functional import normalize

from mmfusion.encoders import SentenceTransformerEncoder
from mmfusion.encoders.checkpoint import MINILM, packaged_folder

TEXTS = ["red running shoes", "", "Women's long-sleeve dress, floral, navy blue", "http://localhost:1/shoe.jpg"]


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = packaged_folder(MINILM)
    if folder is None:
        pytest.skip("the dev extra is not installed")
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceTransformerEncoder:
    return SentenceTransformerEncoder(str(folder)).eval()


def test_zero_shot_is_the_librarys(encoder: SentenceTransformerEncoder, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    expected = torch.as_tensor(SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True))
    with torch.no_grad():
        pooled = encoder(TEXTS).pooled
    assert pooled.shape == (4, encoder.dim) == (4, 384)
    torch.testing.assert_close(normalize(pooled, dim=1), expected, atol=1e-5, rtol=0)


def test_tokens_pool_to_the_vector(encoder: SentenceTransformerEncoder) -> None:
    with torch.no_grad():
        encoded = encoder(TEXTS)
    assert encoded.tokens.shape == (*encoded.mask.shape, encoder.token_dim)
    assert encoded.mask.sum(1)[:2].tolist() == [5, 2]
    for pooled, tokens, mask in zip(encoded.pooled, encoded.tokens, encoded.mask, strict=True):
        torch.testing.assert_close(pooled, tokens[mask].mean(0))


def test_long_texts_are_cut(folder: Path) -> None:
    short = SentenceTransformerEncoder(str(folder), max_tokens=8).eval()
    with torch.no_grad():
        assert short(["shoe " * 50]).mask.shape == (1, 8)
        a, b = short(["shoe " * 6 + "red", "shoe " * 6 + "blue"]).pooled
    assert torch.equal(a, b)


def test_a_prompt_comes_before_each_text(folder: Path, encoder: SentenceTransformerEncoder) -> None:
    prompted = SentenceTransformerEncoder(str(folder), prompt="query: ").eval()
    with torch.no_grad():
        torch.testing.assert_close(prompted(["red"]).pooled, encoder(["query: red"]).pooled)


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    fresh = SentenceTransformerEncoder(str(folder))
    assert all(module.training for module in fresh.modules())
    fresh(TEXTS).pooled.sum().backward()
    assert [name for name, p in fresh.named_parameters() if p.grad is None] == []


def test_minilm_by_name_comes_from_the_dev_extra(encoder: SentenceTransformerEncoder) -> None:
    named = SentenceTransformerEncoder().eval()
    with torch.no_grad():
        assert torch.equal(named(TEXTS).pooled, encoder(TEXTS).pooled)


def test_a_name_comes_from_the_local_cache(
    folder: Path, encoder: SentenceTransformerEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--small-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("1" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with torch.no_grad():
        assert torch.equal(
            SentenceTransformerEncoder("someone/small-model").eval()(TEXTS).pooled, encoder(TEXTS).pooled
        )
