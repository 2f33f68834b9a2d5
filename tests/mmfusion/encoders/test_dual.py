"""Both towers of one checkpoint: the checkpoint's own zero-shot scores. Checkpoints are tiny, random, made here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import normalize

from mmfusion.encoders import Augment, DualImageEncoder, DualTextEncoder
from tests.clip import LETTERS, TEXT, VISION

TEXTS = ["a red shirt", "", "striped " * 9]
DRAW = torch.arange(3)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer.json and, as on the hub, a configuration that names the class that needs sentencepiece."""
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    config = SiglipConfig(text_config={**TEXT, "projection_size": 40}, vision_config=VISION)
    SiglipModel(config).save_pretrained(folder)
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    written = folder / "tokenizer_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), "tokenizer_class": "SiglipTokenizer"}))
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def model(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def photos(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_clips_text_features(clip: Path) -> None:
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(clip)(
        TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    expected = model(clip).get_text_features(**inputs)
    encoder = DualTextEncoder(str(clip)).eval()
    encoded = encoder(TEXTS)
    torch.testing.assert_close(encoded.pooled, expected.pooler_output)
    torch.testing.assert_close(encoded.tokens, expected.last_hidden_state)
    assert encoded.mask.sum(1).tolist() == [11, 2, 16]
    assert (encoder.dim, encoder.token_dim) == (24, 32)


@torch.no_grad()
def test_siglips_text_features(siglip: Path) -> None:
    """Padded to the full length and without a mask, as SigLIP was trained; "a red shirt" is spelt by hand."""
    spelt = [{"▁": 2, **{letter: 3 + n for n, letter in enumerate(LETTERS)}}[c] for c in "▁a▁red▁shirt"]
    ids = torch.tensor([[*spelt, 1, *[1] * (15 - len(spelt))], [1] * 16])
    expected = model(siglip).get_text_features(input_ids=ids)
    encoded = DualTextEncoder(str(siglip)).eval()(TEXTS[:2])
    torch.testing.assert_close(encoded.pooled, expected.pooler_output)
    assert encoded.mask.sum(1).tolist() == [13, 1]


@torch.no_grad()
def test_image_features(folder: Path) -> None:
    """The checkpoint's own processor on photos of its own size."""
    from transformers import AutoImageProcessor

    processed = AutoImageProcessor.from_pretrained(folder)(list(photos(32, 32)), return_tensors="pt")
    expected = model(folder).get_image_features(**processed)
    encoder = DualImageEncoder(str(folder)).eval()
    encoded = encoder(photos(32, 32), DRAW)
    torch.testing.assert_close(encoded.pooled, expected.pooler_output)
    torch.testing.assert_close(encoded.tokens, expected.last_hidden_state)
    assert encoded.pooled.shape == (3, encoder.dim)
    assert encoded.tokens.shape == (3, 17 if folder.name.startswith("clip") else 16, encoder.token_dim)


@torch.no_grad()
def test_cosine_is_the_zero_shot_score(clip: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(clip)(TEXTS[:2], padding=True, return_tensors="pt")
    inputs |= AutoImageProcessor.from_pretrained(clip)(list(photos(32, 32)), return_tensors="pt")
    whole = model(clip)
    expected = whole(**inputs).logits_per_text / whole.logit_scale.exp()
    text = DualTextEncoder(str(clip)).eval()(TEXTS[:2]).pooled
    image = DualImageEncoder(str(clip)).eval()(photos(32, 32), DRAW).pooled
    torch.testing.assert_close(normalize(text, dim=1) @ normalize(image, dim=1).T, expected)


@torch.no_grad()
def test_photos_of_another_size_are_resized(folder: Path) -> None:
    encoder = DualImageEncoder(str(folder)).eval()
    grey = torch.full((3, 3, 80, 60), 130, dtype=torch.uint8)
    torch.testing.assert_close(encoder(grey, DRAW).pooled, encoder(grey[:, :, :32, :32], DRAW).pooled)
    assert encoder(photos(80, 60), DRAW).pooled.isfinite().all()


def test_smaller_photos_in_training_are_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match=r"scale is 0\.8; .* takes photos of one size alone"):
        DualImageEncoder(str(clip), augment=Augment(scale=0.8))


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    for encoder, inputs in (
        (DualTextEncoder(str(folder)), (TEXTS,)),
        (DualImageEncoder(str(folder), augment="light"), (photos(32, 32), DRAW)),
    ):
        assert all(module.training for module in encoder.modules())
        encoder(*inputs).pooled.square().sum().backward()
        assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_names_in_the_checkpoint_stay_when_compiled(clip: Path) -> None:
    for encoder, inputs in (
        (DualTextEncoder(str(clip)).eval(), (TEXTS,)),
        (DualImageEncoder(str(clip)).eval(), (photos(32, 32), DRAW)),
    ):
        expected, names = encoder(*inputs).pooled, list(encoder.state_dict())
        encoder.compile_network(backend="eager")
        torch.testing.assert_close(encoder(*inputs).pooled, expected)
        assert list(encoder.state_dict()) == names


def test_another_kind_of_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="its model_type is 'bert'; the encoders know clip and siglip"):
        DualTextEncoder(str(tmp_path))


def test_a_title_that_is_an_address_is_never_fetched(clip: Path) -> None:
    """A sentence-transformers model that also knows photos would take such a text for one."""
    from mmfusion.encoders import SentenceTransformerEncoder

    encoder = SentenceTransformerEncoder(str(clip), max_tokens=16).eval()
    encoded = encoder(["http://127.0.0.1:9/shirt.jpg", "a red shirt"])
    torch.testing.assert_close(encoded.pooled[1:], DualTextEncoder(str(clip)).eval()(["a red shirt"]).pooled)
    assert encoded.tokens.shape == (2, 1, encoder.token_dim)
