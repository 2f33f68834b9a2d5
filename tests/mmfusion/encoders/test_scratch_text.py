"""The text encoder from scratch: its tokenizer, its checkpoint, its invariances."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfusion.encoders import ScratchTextEncoder
from mmfusion.encoders.scratch_text import trained_tokenizer

WORDS = [
    "red",
    "blue",
    "green",
    "shirt",
    "jeans",
    "dress",
    "striped",
    "dotted",
    "plain",
    "crew-neck",
    "Café",
    "men's",
    "women's",
    "2019",
]
TEXTS = [" ".join(random.Random(number).choices(WORDS, k=5)) for number in range(300)]


def fitted(**options: int) -> ScratchTextEncoder:
    torch.manual_seed(0)
    encoder = ScratchTextEncoder(**{"width": 16, "heads": 2, "vocabulary": 400, "max_tokens": 12, **options})
    encoder.fit(TEXTS)
    return encoder.eval()


def test_shapes_and_mean_pooling() -> None:
    encoder = fitted()
    encoded = encoder(["red shirt", "", "unheard-of ἄνθος 衣 " * 9])
    assert encoded.pooled.shape == (3, encoder.dim)
    assert encoded.tokens.shape == (3, 12, encoder.token_dim)
    assert encoded.mask.sum(1).tolist() == [3, 1, 12]
    for pooled, tokens, mask in zip(encoded.pooled, encoded.tokens, encoded.mask, strict=True):
        torch.testing.assert_close(pooled, tokens[mask].mean(0))


def test_case_and_accents_do_not_matter_and_order_does() -> None:
    encoder = fitted()
    a, b, c, d = encoder(["Café RED", "cafe red", "red cafe", "cafe blue"]).pooled
    assert torch.equal(a, b)
    assert not torch.allclose(b, c, atol=1e-3)
    assert not torch.allclose(b, d, atol=1e-3)


def test_the_batch_around_a_text_does_not_matter() -> None:
    encoder = fitted()
    alone = encoder(["red shirt"]).pooled
    together = encoder(["plain striped dotted blue jeans", "red shirt"]).pooled
    torch.testing.assert_close(together[1:], alone)


def test_the_same_texts_give_the_same_tokenizer_in_any_process_and_order() -> None:
    script = (
        "import hashlib, random, sys\n"
        "from tests.mmfusion.encoders.test_scratch_text import TEXTS, trained_tokenizer\n"
        "random.Random(int(sys.argv[1])).shuffle(TEXTS)\n"
        "print(hashlib.sha256(trained_tokenizer(TEXTS, 400).to_str().encode()).hexdigest())\n"
    )
    here = hashlib.sha256(trained_tokenizer(TEXTS, 400).to_str().encode()).hexdigest()
    root = Path(__file__).parents[3]
    there = subprocess.run([sys.executable, "-c", script, "1"], cwd=root, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_the_tokenizer_travels_in_the_checkpoint(tmp_path: Path) -> None:
    encoder = fitted()
    torch.save(encoder.state_dict(), tmp_path / "checkpoint.pt")
    other = ScratchTextEncoder(width=16, heads=2, vocabulary=400, max_tokens=12).eval()
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert torch.equal(other(TEXTS[:4]).pooled, encoder(TEXTS[:4]).pooled)


def test_an_unfitted_encoder_can_be_saved_and_says_what_it_lacks() -> None:
    encoder = ScratchTextEncoder()
    ScratchTextEncoder().load_state_dict(encoder.state_dict())
    with pytest.raises(RuntimeError, match="no tokenizer yet: call fit"):
        encoder(["red"])


def test_a_small_catalogue_leaves_rows_of_the_table_unused() -> None:
    encoder = fitted(vocabulary=4096)
    assert encoder.tokenizer is not None
    assert encoder.tokenizer.get_vocab_size() < 400
    assert encoder.network.embedding.weight.shape == (4096, 16)


def test_every_parameter_gets_a_gradient() -> None:
    encoder = fitted().train()
    encoder(TEXTS[:20]).pooled.square().sum().backward()
    zero = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert zero == []


def test_dropout_acts_in_training_only() -> None:
    encoder = fitted()
    assert torch.equal(encoder(TEXTS[:3]).pooled, encoder(TEXTS[:3]).pooled)
    encoder.train()
    assert not torch.equal(encoder(TEXTS[:3]).pooled, encoder(TEXTS[:3]).pooled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads is 3; it must divide width, 128"),
        ({"max_tokens": 1}, "max_tokens is 1; at least 2"),
        ({"vocabulary": 100}, "vocabulary is 100; at least 258"),
    ],
)
def test_wrong_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScratchTextEncoder(**options)


def test_a_checkpoint_with_a_larger_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="a tokenizer of 400 entries for a vocabulary of 300"):
        ScratchTextEncoder(vocabulary=300).set_extra_state(
            trained_tokenizer([" ".join(map(str, range(999)))], 400).to_str()
        )
