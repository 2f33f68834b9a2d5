"""checkpoint_activations: the same gradients to the bit in less memory, with micro-batches, ranks and stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mmfusion.encoders import SentenceTransformerEncoder, TimmEncoder
from mmfusion.encoders.checkpoint import MINILM, packaged_folder
from mmfusion.encoders.dual import DualImageEncoder, DualTextEncoder
from mmfusion.feature_cache.identity import described
from tests.ddp import run_ranks
from tests.small_run import small_data, small_module, small_shards, small_trainer, weights

TEXTS = ["a red shirt", "blue shoe of leather", "x"]
SIZE = (64, 64)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


@pytest.fixture
def make(clip, request) -> Callable[[bool], nn.Module]:
    """An encoder with dropout, or stochastic depth, by the test's parameter."""

    def made(on: bool) -> nn.Module:
        torch.manual_seed(0)
        if request.param == "timm":
            return TimmEncoder("test_vit", image_size=SIZE, drop_path=0.3, checkpoint_activations=on)
        if request.param == "dual image":
            return with_dropout(DualImageEncoder(str(clip), checkpoint_activations=on))
        if request.param == "dual text":
            return with_dropout(DualTextEncoder(str(clip), checkpoint_activations=on))
        folder = packaged_folder(MINILM)
        if folder is None:
            pytest.skip("the dev extra is not installed")
        return SentenceTransformerEncoder(str(folder), checkpoint_activations=on)  # it has dropout

    return made


EVERY = pytest.mark.parametrize("make", ["timm", "dual image", "dual text", "sentence-transformers"], indirect=True)


def with_dropout(encoder: nn.Module) -> nn.Module:
    """Of attention weights, as CLIP's models have it."""
    for part in encoder.modules():
        if hasattr(part, "config"):
            part.config.attention_dropout = 0.2
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.2
    return encoder


def encoded(encoder: nn.Module) -> torch.Tensor:
    if hasattr(encoder, "token_ids"):
        return encoder(TEXTS).pooled
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8, generator=generator)
    return encoder(photos, torch.arange(3)).pooled


def step(encoder: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The output, the gradients, and how many bytes of activations the forward pass keeps."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        pooled = encoded(encoder)
    (pooled * torch.linspace(-1, 1, pooled.shape[1])).sum().backward()
    return pooled.detach(), {name: p.grad for name, p in encoder.named_parameters()}, sum(kept.values())


@EVERY
def test_gradients_are_the_same_with_dropout_and_less_is_kept(make):
    (plain, gradients, much), (output, found, little) = step(make(False).train()), step(make(True).train())
    assert torch.equal(output, plain)
    assert [name for name, value in gradients.items() if not torch.equal(found[name], value)] == []
    assert all(value.any() for name, value in gradients.items() if "k_proj.bias" not in name and "key.bias" not in name)
    assert little < 0.6 * much
    torch.manual_seed(4)
    assert not torch.equal(encoded(make(True).train()), plain), "no dropout: the test would prove less than it says"


@EVERY
def test_the_feature_cache_knows_it_as_the_same_encoder(make):
    assert described(make(True).eval()) == described(make(False).eval())


def test_networks_that_cannot_are_refused():
    with pytest.raises(ValueError, match=r"checkpoint_activations: mobilenetv3_small_050 has BatchNorm.*micro_batch"):
        TimmEncoder("mobilenetv3_small_050", checkpoint_activations=True)
    with pytest.raises(ValueError, match="checkpoint_activations: convit_tiny has no blocks that can run again"):
        TimmEncoder("convit_tiny", checkpoint_activations=True)


def test_a_text_model_that_cannot_is_refused(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    static = StaticEmbedding(Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), embedding_dim=4)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path))
    with pytest.raises(ValueError, match=r"checkpoint_activations: .* has no blocks that can run again"):
        SentenceTransformerEncoder(str(tmp_path), checkpoint_activations=True)


def trained(shards: Path, folder: Path, on: bool, world: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    image = TimmEncoder("test_vit", image_size=(32, 32), augment="light", drop_path=0.3, checkpoint_activations=on)
    module = small_module(dropout=0.1, image=image, **options)
    strategy = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    small_trainer(folder, **strategy).fit(module, small_data(shards))
    return weights(module)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_run_of_three_stages_ends_with_the_same_weights(shards, tmp_path, micro_batch):
    plain, found = (trained(shards, tmp_path / str(on), on, micro_batch=micro_batch) for on in (False, True))
    assert [name for name, value in plain.items() if not torch.equal(found[name], value)] == []


def both(rank: int, world: int, shards: Path, folder: Path) -> tuple[dict, dict]:
    return trained(shards, folder, False, world), trained(shards, folder, True, world)


def test_so_do_two_ranks(shards, tmp_path):
    results = run_ranks(both, 2, shards, tmp_path, timeout=240)
    plain = results[0][0]
    for found in (results[0][1], *results[1]):
        assert [name for name, value in plain.items() if not torch.equal(found[name], value)] == []
