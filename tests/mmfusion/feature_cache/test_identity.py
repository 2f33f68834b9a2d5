"""Who is who among encoders: the same weights anywhere, nothing else."""

import copy
import importlib
import linecache
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmfusion.encoders import ScratchTextEncoder, SentenceTransformerEncoder, TextEncoder, TimmEncoder
from mmfusion.encoders.checkpoint import MINILM, packaged_folder
from mmfusion.feature_cache import NoIdentityError, described, digest, plain

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


# ---- attributes that no weight and no repr shows ---------------------------------------------------------------------


@dataclass
class Crop:
    size: int = 8


class Mean:
    def __init__(self, *of: float) -> None:
        self.of = of

    def times(self, by: float = 2.0) -> float:
        return sum(self.of) * by


class Colour(IntEnum):
    RED = 1


class Side(IntEnum):
    LEFT = 1


def times(by: float) -> Callable[[float], float]:
    return lambda value: value * by


UNLIKE: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "a dataclass": (lambda: Crop(8), lambda: Crop(9)),
    "an object": (lambda: Mean(1.0, 2.0), lambda: Mean(1.0, 3.0)),
    "an object within": (lambda: [Mean(1.0)], lambda: [Mean(2.0)]),
    "a method of an object": (lambda: Mean(1.0).times, lambda: Mean(2.0).times),
    "arguments of a partial": (lambda: partial(pow, 2), lambda: partial(pow, 3)),
    "keywords of a partial": (lambda: partial(pow, exp=2), lambda: partial(pow, exp=3)),
    "a partial's function": (lambda: partial(max, 2), lambda: partial(min, 2)),
    "code": (lambda: lambda value: value + 1, lambda: lambda value: value - 1),
    "constants in code": (lambda: lambda value: value + 1, lambda: lambda value: value + 2),
    "what a function closes over": (lambda: times(2.0), lambda: times(3.0)),
    "defaults": (lambda: lambda value, by=1: value * by, lambda: lambda value, by=2: value * by),
    "numpy values": (lambda: np.arange(3), lambda: np.arange(3)[::-1]),
    "numpy dtypes": (lambda: np.float32(1), lambda: np.float64(1)),
    "bytes": (lambda: b"a", lambda: b"b"),
    "kinds of numbers": (lambda: 1, lambda: 1.0),
    "kinds of keys": (lambda: {1: 0}, lambda: {"1": 0}),
    "order": (lambda: {"a": 0, "b": 1}, lambda: {"b": 1, "a": 0}),
    "list and tuple": (lambda: [1], lambda: (1,)),
    "enums of one value": (lambda: Colour.RED, lambda: Side.LEFT),
    "a pattern's flags": (lambda: re.compile("a"), lambda: re.compile("a", re.IGNORECASE)),
    "harmless names elsewhere": (lambda: {"augment": 1}, lambda: {"augment": 2}),
    "a class": (lambda: Mean, lambda: Crop),
}


@pytest.mark.parametrize("name", ["option", "_private"])
@pytest.mark.parametrize("what", UNLIKE)
def test_what_may_differ_has_another_key(what: str, name: str) -> None:
    class Own(nn.Module):
        def __init__(self, value: object) -> None:
            super().__init__()
            setattr(self, name, value)

    one, other = UNLIKE[what]
    assert of(Own(one())) == of(Own(one())) != of(Own(other()))


def of_itself() -> object:
    value: list[object] = []
    value.append(value)
    return value


UNKNOWN: dict[str, tuple[Callable[[], object], str]] = {
    "a lock": (threading.Lock, r"its part 'inner': option is a _thread.lock"),
    "within": (lambda: {"a": [threading.Lock()]}, r"option\['a'\]\[0\] is a _thread.lock"),
    "in a closure": (lambda: times(threading.Lock()), r"the closure of .*option\[0\] is a _thread.lock"),
    "in an object": (lambda: Mean(threading.Lock()), r"option.of\[0\] is a _thread.lock"),
    "a module in a list": (lambda: [nn.Linear(1, 1)], r"option\[0\] is a torch.nn.modules.linear.Linear"),
    "objects of numpy": (lambda: np.array([threading.Lock()]), r"option is a numpy.ndarray"),
    "itself": (of_itself, "holds itself"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_told_apart_has_no_key(what: str) -> None:
    value, told = UNKNOWN[what]
    encoder = nn.Sequential()
    encoder.inner = nn.Linear(1, 1)
    encoder.inner.option = value()
    with pytest.raises(NoIdentityError, match=told):
        described(encoder)


def test_a_method_of_a_part_is_that_part() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

    first, second = Own(), Own()
    first.chosen, second.chosen = first.a.forward, second.b.forward
    again = Own()
    again.chosen = again.a.forward
    assert of(first) == of(again) != of(second)


def test_other_code_in_the_file_of_a_users_encoder_is_another_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for number, line in enumerate(["return x * 2", "return x * 2  # twice", "return x * 3"]):
        source = f"from torch import nn\n\n\nclass Own(nn.Module):\n    def forward(self, x):\n        {line}\n"
        (tmp_path / f"own{number}").mkdir()
        (tmp_path / f"own{number}" / "users_own.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / f"own{number}")
        monkeypatch.delitem(sys.modules, "users_own", raising=False)
        plain._source.cache_clear()
        linecache.clearcache()
        keys.append(of(importlib.import_module("users_own").Own()))
    assert keys[0] == keys[1] != keys[2]
