"""2,000 mutated shards: nothing escapes but our own exception, nothing hangs, and every product is accounted for."""

import hashlib
import json
import resource
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.catalogue import read_catalogue
from datamodules.importing.writer import write_shards
from datamodules.shards import ShardError, Shards
from datamodules.stream.batches import Look, Reader, Request
from datamodules.stream.failures import PHOTO_REASONS, REASONS, SAMPLE_REASONS, Failed
from tests.datamodules.damage import header, member, parts_of, sample
from tests.datamodules.small import small_catalogue, write_rows

PRODUCTS, SPOILED = 6, 1  # products of a shard; the shard that is mutated, of four
BLOCK = 512

Mutation = Callable[[np.random.Generator, bytearray, list[slice]], bytes]


def png_bomb() -> bytes:
    """A header of 200 megapixels, and rows that would fill them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(bytes(9000))) + chunk(b"IEND", b"")
    )


PHOTOS = {
    "empty": b"",
    "html": b"<!doctype html><title>404 Not Found</title>",
    "bomb": png_bomb(),
    "a gif's start": b"GIF89a\xff\xff\xff\xff\xf7\x00\x00",
    "a jpeg's start": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01",
    "a pickle": b"\x80\x04\x95\x15\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
}


def flip_bits(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    for place in random.integers(0, len(content), 2 ** random.integers(0, 8)):
        content[place] ^= 1 << int(random.integers(8))
    return bytes(content)


def truncate(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    return bytes(content[: random.integers(0, len(content))])


def swap_blocks(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    """Two blocks of a header's size: most often two headers."""
    headers = [start for start in range(0, len(content), BLOCK) if content[start + 257 : start + 262] == b"ustar"]
    a, b = random.choice(headers if random.random() < 0.7 else len(content) // BLOCK * np.array([1]), 2)
    a, b = (int(place) // BLOCK * BLOCK for place in (a, b))
    content[a : a + BLOCK], content[b : b + BLOCK] = content[b : b + BLOCK], content[a : a + BLOCK]
    return bytes(content)


def swap_samples(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    a, b = (content[places[i]] for i in random.choice(len(places), 2))
    first, second = random.choice(len(places), 2)
    for place, other in ((places[first], b), (places[second], a)):
        room = place.stop - place.start
        content[place] = other[:room].ljust(room, b"\0")
    return bytes(content)


def zero_blocks(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    start = int(random.integers(0, len(content)))
    length = int(min(random.choice([8, BLOCK, 4096]), len(content) - start))
    content[start : start + length] = bytes(length)
    return bytes(content)


def insert_bytes(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    start, count = int(random.integers(0, len(content))), int(random.choice([1, 3, BLOCK]))
    content[start:start] = random.bytes(count)
    return bytes(content)


def replace_photo(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    photos = [*PHOTOS.values(), random.bytes(int(random.integers(1, 400)))]
    return _replaced(random, content, places, lambda record, photo: (record, photos[random.integers(len(photos))]))


def damage_json(random: np.random.Generator, content: bytearray, places: list[slice]) -> bytes:
    def damaged(record: bytes, photo: bytes) -> tuple[bytes, bytes]:
        return _damaged(random, record), photo

    return _replaced(random, content, places, damaged)


def _damaged(random: np.random.Generator, record: bytes) -> bytes:
    """The JSON with one value of another type, or its bytes spoiled; in as much room."""
    if random.random() < 0.4:
        place = int(random.integers(len(record)))
        return record[:place] + random.bytes(int(random.integers(3))) + record[place + 1 :]
    found: dict[str, Any] = json.loads(record)
    values = [None, True, -1, 2**70, 1e300, "x", "\ud800", [], {}, [[]], ["x"], float("nan"), 7]
    value = values[random.integers(len(values))]
    name = str(random.choice([*found, "texts/title", "judgments/query", "judgments/relevance", "more"]))
    outer, _, inner = name.partition("/")
    if not inner:
        found[outer] = value
    elif isinstance(value, list) or random.random() < 0.5 or outer == "texts" or not found[outer][inner]:
        found[outer][inner] = value
    else:
        found[outer][inner][random.integers(len(found[outer][inner]))] = value
    return json.dumps(found).encode().ljust(len(record))


def _replaced(
    random: np.random.Generator,
    content: bytearray,
    places: list[slice],
    change: Callable[[bytes, bytes], tuple[bytes, bytes]],
) -> bytes:
    place = places[random.integers(len(places))]
    room = place.stop - place.start
    key, record, photo = parts_of(bytes(content[place]))
    new = sample(key, *change(record, photo))
    content[place] = (new if len(new) <= room else member(f"{key}.json", record) + header(f"{key}.png", 10**9))[
        :room
    ].ljust(room, b"\0")
    return bytes(content)


ALL: list[Mutation] = [
    flip_bits, truncate, swap_blocks, swap_samples, zero_blocks, insert_bytes, replace_photo, damage_json,
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    catalogue = small_catalogue(folder / "catalogue", products=24)
    for number in range(0, 24, 8):  # else without: each has a photo, with room for those above
        (catalogue / "images" / f"p{number}.png").write_bytes((catalogue / "images" / "p1.png").read_bytes())
    for photo in (catalogue / "images").iterdir():
        photo.write_bytes(photo.read_bytes() + bytes(600))
    ids = [f"p{number}" for number in range(24)]  # titles so far apart that no bit turns one into another
    rows = [[id, hashlib.sha256(id.encode()).hexdigest(), f"{id}.png"] for id in ids]
    write_rows(catalogue / "products.csv", ["product_id", "title", "image"], rows)
    write_shards(read_catalogue(catalogue), folder / "shards", shard_size=PRODUCTS)
    return folder / "shards"


def mutated(path: Path, mutations: int) -> Iterator[tuple[int, Shards]]:
    """Each mutation in turn, in its file, and the shards open."""
    shards = Shards.open(path)
    tar = path / shards.manifest.shards[SPOILED].name
    whole = tar.read_bytes()
    own = shards.index.shard == SPOILED
    places = [slice(int(o), int(o + s)) for o, s in zip(shards.index.offset[own], shards.index.size[own], strict=True)]
    for number in range(mutations):
        random = np.random.default_rng(number)
        tar.write_bytes(ALL[number % len(ALL)](random, bytearray(whole), places))
        shards.close()
        yield number, shards
    tar.write_bytes(whole)


def found_in(shards: Shards, ids: np.ndarray, truth: dict[int, Any]) -> Counter[str]:
    """Each product's own outcome: "read", or the reason why its sample is not; no text is another product's."""
    outcomes: Counter[str] = Counter()
    titles = {texts["title"]: id for id, texts in truth.items()}
    for id in ids.tolist():
        try:
            texts = shards.read(id).texts
        except ShardError as error:
            outcomes[error.reason] += 1
        else:
            assert titles.get(texts["title"], id) == id, "another product's text"
            outcomes["read"] += 1
    assert outcomes.keys() <= {"read", *SAMPLE_REASONS}
    return outcomes


def counted(failed: list[Failed]) -> Counter[str]:
    assert {one.reason for one in failed} <= set(REASONS)
    return Counter(one.reason for one in failed)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutations", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_shards(path: Path, mutations: int) -> None:
    clean = Shards.open(path)
    truth = {id: clean.read(id).texts for id in range(len(clean))}
    assert len({texts["title"] for texts in truth.values()}) == len(truth)
    assert clean.index.photo.all()
    ids = np.flatnonzero(clean.index.shard == SPOILED).astype(np.int64)
    trained = ids[clean.index.trainable[ids]]
    one = np.zeros(len(trained), np.int64)
    seen: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
        for number, shards in mutated(path, mutations):
            outcomes = found_in(shards, ids, truth)
            reader = Reader(shards, Look(("title",), (4, 4)), damping=0.5, cache_mib=0)
            batch, failed = reader.products(ids, ids)
            counts, shown = counted(failed), batch.present[:, 1].sum().item()
            assert len(ids) == shown + counts.total(), number
            assert {r: counts[r] for r in SAMPLE_REASONS} == {r: outcomes[r] for r in SAMPLE_REASONS}, number
            assert batch.id.tolist() == ids.tolist()
            trains(reader, Request(0, number, trained, one, one + 1), number)
            seen += counts
    assert set(seen) >= {"truncated", "wrong member", "invalid JSON", "empty", "not a photo", "too large", "damaged"}


def trains(reader: Reader, request: Request, number: int) -> None:
    """As many tuples as asked for; those replaced and those without photo are as many as counted."""
    batch, failed = reader.tuples(request)
    counts = counted(failed)
    replaced = int((batch.product.id.numpy() != request.product).sum())
    blind = int((~batch.product.present[:, 1]).sum())
    assert len(batch) == len(request.product)
    assert replaced == sum(counts[reason] for reason in SAMPLE_REASONS), number
    assert blind == sum(counts[reason] for reason in PHOTO_REASONS), number
    assert all(reader.shards.index.trainable[batch.product.id.numpy()])


def test_a_pixel_bomb_is_never_decoded(path: Path) -> None:
    """With memory for a tenth of it: it is refused as too large, not for want of memory."""
    shards = Shards.open(path)
    ids = np.flatnonzero(shards.index.shard == SPOILED).astype(np.int64)[:1]
    tar = path / shards.manifest.shards[SPOILED].name
    whole = tar.read_bytes()
    place = slice(int(shards.index.offset[ids[0]]), int(shards.index.offset[ids[0]] + shards.index.size[ids[0]]))
    key, record, _ = parts_of(whole[place])
    bomb = sample(key, record, png_bomb()).ljust(place.stop - place.start, b"\0")
    tar.write_bytes(whole[: place.start] + bomb + whole[place.stop :])
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 60 * 2**20, limits[1]))
    try:
        _, failed = Reader(shards, Look(("title",), (4, 4)), damping=0.5, cache_mib=0).products(ids, ids)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        tar.write_bytes(whole)
    assert [one.reason for one in failed] == ["too large"]
