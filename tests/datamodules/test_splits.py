"""Splits by text: what counts as one text, and that the hash is the same everywhere and even."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.importing.splits import in_val, normalised, position


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Red  Shoe ", "red shoe"),
        ("STRASSE", "straße"),
        ("ﬁsh\u00a0tank", "fish tank"),
        ("Ｔシャツ", "tシャツ"),
        ("cafe\u0301", "café"),
    ],
)
def test_texts_that_count_as_one(text: str, same: str) -> None:
    assert normalised(text) == normalised(same)
    assert position(text, 3) == position(same, 3)


def test_accents_and_words_tell_texts_apart() -> None:
    assert len({normalised(text) for text in ("cana", "caña", "ca na", "cana's")}) == 4


@given(st.text())
def test_normalised_is_a_fixed_point(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_the_hash_is_the_same_on_every_machine() -> None:
    """Values of the first run: whoever changes them gives every imported data set another val split."""
    assert position("red shoe", 0) == 0.7753608966405102
    assert position("red shoe", 1) != position("red shoe", 0)


def test_val_is_an_even_fraction_that_grows_with_itself() -> None:
    queries = [f"query {i}" for i in range(20000)]
    share = {fraction: [in_val(query, 7, fraction) for query in queries] for fraction in (0.0, 0.05, 0.1, 0.999)}
    assert not any(share[0.0])
    for fraction, chosen in share.items():
        assert np.mean(chosen) == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 20000) ** 0.5)
    assert all(later for later, earlier in zip(share[0.1], share[0.05], strict=True) if earlier)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_leaves_no_train(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected 0 or more and less than 1"):
        in_val("red", 0, fraction)
