"""Outputs of frozen encoders, kept for the run: each text and photo is encoded once, not once an epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from mmfusion.encoders import Encoded, ImageEncoder, TextEncoder
from mmfusion.encoders.augment import splitmix64
from mmfusion.encoders.text import steps
from mmfusion.ranks import checksum

Key = str | int | bytes
TOKEN = np.dtype(np.int32)
ROWS = 64  # rows that an encoder is given at a time, so that what it gives does not depend on the batch around


class FeatureMemo:
    """Encoder outputs by what was encoded (a text's tokens, the hash of a photo), in memory, on the encoder's device.

    Used only in eval mode and without gradient, where an output depends on weights and input alone; `sync` forgets
    everything when the weights change. What is equal is encoded once: products with one title have one vector, bit for
    bit, and their ties are broken by id, not by the rounding of the batches that they happened to be in. What does not
    fit under `limit_gib` is computed each time.

    Args:
        keep_tokens: keep the tokens too (for heads that attend); without them the token axis is 0 long
        limit_gib: GiB of features this memo may hold
    """

    def __init__(self, keep_tokens: bool, limit_gib: float) -> None:
        self.keep_tokens = keep_tokens
        self.limit_bytes = int(limit_gib * 2**30)
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.slot: dict[Key, int] = {}
        self.kept: Encoded | None = None
        self.weights: Tensor | None = None

    def sync(self, weights: Tensor) -> None:
        """Forgets everything unless the encoder's weights, by `weights_of`, are those that were used."""
        if self.weights is None or not torch.equal(weights, self.weights):
            self.clear()
            self.weights = weights

    def __call__(
        self,
        encoder: nn.Module,
        keys: Sequence[Key],
        encode: Callable[[list[int]], Encoded],
        contents: Callable[[list[Any]], Sequence[Key]] = list,
    ) -> Encoded:
        """The outputs for `keys`; `encode` computes those of the given rows of the batch that are not kept yet.

        contents: what the encoder is given for keys that are new, such as texts' tokens: other texts, the same tokens.
        """
        if not keeps(encoder):
            return encode(list(range(len(keys))))
        new = list(dict.fromkeys(key for key in keys if key not in self.slot))
        content = dict(zip(new, contents(new), strict=True)) if new else {}
        first: dict[Key, int] = {}
        for row, key in enumerate(keys):
            if content.get(key, key) not in self.slot:
                first.setdefault(content[key], row)
        if first:
            with torch.no_grad():
                fresh = self._encoded(first, encode)
            if not self._keep(list(first), fresh):
                return _cut(self._joined([content.get(key, key) for key in keys], list(first), fresh))
        self.slot.update((key, self.slot[same]) for key, same in content.items())
        assert self.kept is not None
        return _cut(_pick(self.kept, [self.slot[key] for key in keys]))

    def _encoded(self, first: dict[Key, int], encode: Callable[[list[int]], Encoded]) -> Encoded:
        """In batches of ROWS of one padded length, the last one filled up: products of other shapes round otherwise."""
        rows = list(first.values())
        places: dict[int, list[int]] = {}
        for place, content in enumerate(first):
            places.setdefault(steps(_length(content)), []).append(place)
        groups = [group[i : i + ROWS] for group in places.values() for i in range(0, len(group), ROWS)]
        parts = []
        for group in groups:
            some = [rows[place] for place in group]
            parts.append(rows_of(self._shorten(encode(_filled(some))), slice(len(some))))
        order = torch.tensor([place for group in groups for place in group])
        return _pick(joined(parts), order.argsort().tolist())

    def _joined(self, keys: Sequence[Key], missing: list[Key], fresh: Encoded) -> Encoded:
        """Rows that are kept, and fresh ones that could not be, in the batch's order."""
        place = {key: row for row, key in enumerate(missing)}
        if self.kept is None:
            return _pick(fresh, [place[key] for key in keys])
        length = max(self.kept.mask.shape[1], fresh.mask.shape[1])
        kept = _lengthen(_pick(self.kept, [self.slot.get(key, 0) for key in keys]), length)
        new = _lengthen(_pick(fresh, [place.get(key, 0) for key in keys]), length)
        is_new = torch.tensor([key in place for key in keys], device=fresh.pooled.device)
        return Encoded(
            torch.where(is_new[:, None], new.pooled, kept.pooled),
            torch.where(is_new[:, None, None], new.tokens, kept.tokens),
            torch.where(is_new[:, None], new.mask, kept.mask),
        )

    def _shorten(self, encoded: Encoded) -> Encoded:
        if self.keep_tokens:
            return encoded
        return Encoded(encoded.pooled, encoded.tokens[:, :0], encoded.mask[:, :0])

    def _keep(self, keys: list[Key], fresh: Encoded) -> bool:
        """Stores the rows, first come first kept; False when they would not fit under the limit."""
        kept = self.kept if self.kept is not None else rows_of(fresh, slice(0))
        kept = _lengthen(kept, max(kept.mask.shape[1], fresh.mask.shape[1]))
        fresh = _lengthen(fresh, kept.mask.shape[1])
        count, needed = self.count, self.count + len(keys)
        if needed > len(kept.pooled):
            capacity = max(needed, len(kept.pooled) * 3 // 2)
            if capacity * _bytes_per_row(fresh) > self.limit_bytes:
                capacity = needed
            if capacity * _bytes_per_row(fresh) > self.limit_bytes:
                return False
            kept = _concatenate(rows_of(kept, slice(count)), rows_of(fresh, slice(0)), capacity)
        kept.pooled[count:needed] = fresh.pooled
        kept.tokens[count:needed] = fresh.tokens
        kept.mask[count:needed] = fresh.mask
        self.slot.update(zip(keys, range(count, needed), strict=True))
        self.kept, self.count = kept, needed
        return True


def weights_of(encoder: nn.Module) -> Int[Tensor, "tensor"]:
    """One number for each weight and buffer, on the CPU; equal for equal ones."""
    return checksum([*encoder.parameters(), *encoder.buffers()]).cpu()


def keeps(encoder: nn.Module) -> bool:
    """Whether an output depends on weights and input alone, and needs no gradient."""
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
    return not (encoder.training or trains)


def in_parts(encoded: dict[str, Encoded], count: int) -> Iterator[tuple[dict[str, Encoded], Tensor, int]]:
    """ROWS rows at a time, the last ones filled up: the part, which rows these are, how many of them count.

    In evaluation all that comes after the encoders goes through this too: what a product gets must depend neither on
    its neighbours nor on its place in a batch of any size, to the last bit, or equal products would not tie.
    """
    for start in range(0, count, ROWS):
        rows = [*range(start, min(start + ROWS, count))]
        filled = _filled(rows)
        part = {name: _pick(of_modality, filled) for name, of_modality in encoded.items()}
        yield part, torch.tensor(filled), len(rows)


def encode_texts(memo: FeatureMemo, encoder: TextEncoder, texts: list[str]) -> Encoded:
    """What an encoder makes of texts, by way of its memo: of equal tokens the same, to the bit, in whatever batch."""
    contents = partial(token_keys, encoder)
    return memo(encoder, texts, lambda rows: encoder([texts[i] for i in rows]), contents)


def encode_photos(
    memo: FeatureMemo,
    encoder: ImageEncoder,
    photo: UInt8[Tensor, "product 3 height width"],
    draw: Int[Tensor, "product"],
) -> Encoded:
    """The same of photos."""
    keys = photo_keys(photo) if keeps(encoder) else range(len(photo))
    return memo(encoder, keys, lambda rows: encoder(photo[rows], draw[rows]))


def _filled(rows: list[int]) -> list[int]:
    """ROWS rows, the first one again and again after the last."""
    return rows + rows[:1] * (ROWS - len(rows))


def token_keys(encoder: TextEncoder, texts: list[str]) -> list[Key]:
    """The tokens of each text, in little memory."""
    return [np.array(ids, TOKEN).tobytes() for ids in encoder.token_ids(texts)]


def _length(content: Key) -> int:
    """Tokens of a text; a photo has none."""
    return len(content) // TOKEN.itemsize if isinstance(content, bytes) else 0


def photo_keys(photo: UInt8[Tensor, "product 3 height width"]) -> list[Key]:
    """A 64-bit hash of each photo's pixels: sums with fixed random odd weights, modulo 2^64."""
    if not photo.numel():
        return [0] * len(photo)
    weights = splitmix64(torch.arange(1, photo[0].numel() + 1, device=photo.device)) | 1
    # A product of integer matrices is not to be had on a GPU; a few photos at a time bound the 64-bit copies.
    return [key for some in photo.flatten(1).split(8) for key in (some * weights).sum(1).tolist()]


def _pick(encoded: Encoded, rows: list[int]) -> Encoded:
    index = torch.tensor(rows, device=encoded.pooled.device)
    return Encoded(encoded.pooled[index], encoded.tokens[index], encoded.mask[index])


def rows_of(encoded: Encoded, rows: slice) -> Encoded:
    return Encoded(encoded.pooled[rows], encoded.tokens[rows], encoded.mask[rows])


def joined(parts: Sequence[Encoded]) -> Encoded:
    """One after the other, the token axis as long as the longest part's."""
    length = max(part.mask.shape[1] for part in parts)
    longest = [_lengthen(part, length) for part in parts]
    return Encoded(*(torch.cat([getattr(part, f.name) for part in longest]) for f in fields(Encoded)))


def _cut(encoded: Encoded) -> Encoded:
    """The token axis as long as the longest row: what is computed from it depends on no other batch, to the bit."""
    if not encoded.mask.shape[1]:
        return encoded
    real = encoded.mask.any(0).nonzero()
    length = int(real.max()) + 1 if len(real) else 0
    return Encoded(encoded.pooled, encoded.tokens[:, :length], encoded.mask[:, :length])


def _bytes_per_row(encoded: Encoded) -> int:
    return sum(part[0].numel() * part.element_size() for part in (encoded.pooled, encoded.tokens, encoded.mask))


def _lengthen(encoded: Encoded, tokens: int) -> Encoded:
    extra = tokens - encoded.mask.shape[1]
    if extra <= 0:
        return encoded
    pad = nn.functional.pad
    return Encoded(encoded.pooled, pad(encoded.tokens, (0, 0, 0, extra)), pad(encoded.mask, (0, extra)))


def _concatenate(head: Encoded, like: Encoded, capacity: int) -> Encoded:
    def grow(part: Tensor, template: Tensor) -> Tensor:
        grown = template.new_zeros((capacity, *template.shape[1:]))
        grown[: len(part)] = part
        return grown

    return Encoded(grow(head.pooled, like.pooled), grow(head.tokens, like.tokens), grow(head.mask, like.mask))
