"""Who is who among encoders: the same weights anywhere, nothing else."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mmfusion.encoders import ScratchTextEncoder, SentenceTransformerEncoder, TextEncoder, TimmEncoder
from mmfusion.encoders.checkpoint import MINILM, packaged_folder
from mmfusion.feature_cache import described, digest

TEXTS = ["red running shoes", "navy blue dress", "a shirt with stripes"]
IN_ANOTHER_PROCESS = """
import sys, torch
from mmfusion.feature_cache import described, digest
from tests.mmfusion.feature_cache.test_identity import photo_encoder, text_encoder
torch.manual_seed(99)
encoders = {"text": text_encoder(), "image": photo_encoder()}
for name, weights in torch.load(sys.argv[1], weights_only=True).items():
    encoders[name].load_state_dict(weights)
    print(digest(described(encoders[name].eval())))
"""


def text_encoder(texts: list[str] = TEXTS, **options: int) -> ScratchTextEncoder:
    torch.manual_seed(0)
    encoder = ScratchTextEncoder(**{"width": 16, "layers": 1, "heads": 2, "vocabulary": 300, "max_tokens": 8} | options)
    encoder.fit(texts)
    return encoder.eval()


def photo_encoder(**options: object) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder("test_efficientnet", **options).eval()


def of(encoder: nn.Module) -> str:
    return digest(described(encoder))


def test_the_same_in_another_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    encoders = {"text": text_encoder(), "image": photo_encoder()}
    torch.save({name: encoder.state_dict() for name, encoder in encoders.items()}, path)
    told = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(path)], capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [of(encoder) for encoder in encoders.values()]


def test_what_does_nothing_in_eval_mode_counts_not() -> None:
    encoder = photo_encoder()
    expected = of(encoder)
    assert of(photo_encoder(augment="strong")) == expected
    assert of(copy.deepcopy(encoder).train().requires_grad_(False)) == expected
    with torch.no_grad():
        encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2))
    assert of(encoder) == expected
    assert of(encoder.to(memory_format=torch.channels_last)) == expected


def weight(encoder: nn.Module) -> None:
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0].add_(1e-3)


def buffer(encoder: TimmEncoder) -> None:
    next(part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)).running_mean[0] += 1


def buffer_of_no_checkpoint(encoder: TimmEncoder) -> None:
    assert "mean" not in encoder.state_dict()
    encoder.mean[0] += 0.1


def wider_numbers(encoder: nn.Module) -> None:
    encoder.double()


def option_that_no_repr_shows(encoder: TimmEncoder) -> None:
    encoder.network.scale = 2.0


def function(encoder: TimmEncoder) -> None:
    encoder.network.activation = torch.relu


@pytest.mark.parametrize(
    "change", [weight, buffer, buffer_of_no_checkpoint, wider_numbers, option_that_no_repr_shows, function]
)
def test_a_change_in_an_image_encoder(change: Callable[[nn.Module], None]) -> None:
    encoder = photo_encoder()
    before = of(encoder)
    change(encoder)
    assert of(encoder) != before


def test_a_name_of_weights_belongs_to_them() -> None:
    class Pair(nn.Module):
        def __init__(self, *values: float) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor(value)) for value in values)

    assert of(Pair(1.0, 2.0)) != of(Pair(2.0, 1.0))


def test_the_number_of_heads_is_in_no_repr_and_no_weight() -> None:
    two, four = text_encoder(heads=2), text_encoder(heads=4)
    assert [part.shape for part in two.parameters()] == [part.shape for part in four.parameters()]
    assert of(two) != of(four)


def test_a_tokenizer_and_a_limit_count() -> None:
    expected = of(text_encoder())
    assert of(text_encoder([*TEXTS, "sunglasses sunglasses"])) != expected
    assert of(text_encoder(max_tokens=8)) == expected
    other = text_encoder()
    other.max_tokens = 4
    assert of(other) != expected


def test_without_a_tokenizer_there_is_no_identity() -> None:
    with pytest.raises(RuntimeError, match="no tokenizer yet"):
        described(ScratchTextEncoder(width=16, layers=1, heads=2))


def test_a_users_encoder_by_the_tokens_it_makes() -> None:
    class Letters(TextEncoder):
        dim, token_dim, max_tokens = 1, 1, 8

        def __init__(self, case: str) -> None:
            super().__init__()
            self._case = getattr(str, case)  # a method of str: in no attribute that could be told apart

        def forward(self, texts: list[str]) -> None: ...

        def token_ids(self, texts: list[str]) -> list[tuple[int, ...]]:
            return [tuple(map(ord, self._case(text)[: self.max_tokens])) for text in texts]

        def compile_network(self, **options: object) -> None: ...

    same, other = of(Letters("lower")), described(Letters("upper"))
    assert of(Letters("lower")) == same != digest(other)


def test_minilm_by_prompt_and_limit_not_by_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = packaged_folder(MINILM)
    if folder is None:
        pytest.skip("the dev extra is not installed")
    linked = tmp_path_factory.mktemp("elsewhere") / "model"
    linked.symlink_to(folder)
    encoder = SentenceTransformerEncoder(str(folder)).eval()
    expected = of(encoder)
    with torch.no_grad():
        encoder(TEXTS)
    assert of(encoder) == expected, "using it changes nothing"
    assert of(SentenceTransformerEncoder(str(linked)).eval()) == expected
    assert of(SentenceTransformerEncoder(str(folder), prompt="query: ").eval()) != expected
    assert of(SentenceTransformerEncoder(str(folder), max_tokens=32).eval()) != expected


def test_a_compiled_network_rounds_otherwise() -> None:
    encoder = photo_encoder()
    before = of(encoder)
    encoder.compile_network(backend="eager")
    assert of(encoder) != before


def test_digest_is_of_content_not_of_order() -> None:
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})
    with pytest.raises(TypeError):
        digest({"a": object()})
