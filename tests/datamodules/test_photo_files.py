"""Photos by name: what is found where, that no name leads out of its folder, and what becomes of large photos."""

import io
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from datamodules.photos.decode import PhotoError
from datamodules.photos.files import Photos, photos_of, prepared, web_photos
from datamodules.photos.options import Failure, PhotoOptions
from tests.datamodules.images import encoded, smooth
from tests.datamodules.web import Web, page, web_server

OPTIONS = PhotoOptions(timeout=2.0, retries=0)
ABSENT = Failure("no such file", False)
Make = Callable[..., Path]


def write_loose(folder: Path, **contents: bytes) -> Path:
    """Files of these names, dots for "__" and slashes for "___", below images/."""
    for name, content in contents.items():
        path = folder / "images" / file_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_tar(folder: Path, **contents: bytes) -> Path:
    with tarfile.open(folder / "images.tar", "w") as tar:
        for name, content in contents.items():
            add(tar, f"./images/{file_name(name)}", content)
    return folder


def file_name(name: str) -> str:
    return name.replace("___", "/").replace("__", ".")


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(content)
    tar.addfile(member, io.BytesIO(content))


def opened(folder: Path) -> Photos:
    photos = photos_of(folder, OPTIONS)
    assert photos is not None
    return photos


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with web_server() as server:
        yield server


both = pytest.mark.parametrize("make", [write_loose, write_tar])


@both
def test_photos_are_named_with_or_without_their_folder(make: Make, tmp_path: Path) -> None:
    photos = opened(make(tmp_path, a__jpg=b"a", sub___b__jpg=b"b"))
    names = ["sub/b.jpg", "images/a.jpg", "a.jpg", "./images/sub//b.jpg", "./a.jpg"]
    assert photos.get(names) == [b"b", b"a", b"a", b"b", b"a"]
    assert photos.get([]) == []


@both
def test_what_is_no_file_is_missing(make: Make, tmp_path: Path) -> None:
    photos = opened(make(tmp_path, sub___b__jpg=b"b"))
    assert photos.get(["c.jpg", "sub", "sub/b.jpg/c", "images", ".", "x" * 300, "B.jpg", "ü.jpg"]) == [ABSENT] * 8


def test_a_folder_without_photos_has_none_and_one_with_both_kinds_is_refused(tmp_path: Path) -> None:
    assert photos_of(tmp_path, OPTIONS) is None
    write_tar(write_loose(tmp_path, a=b"a"), a=b"a")
    with pytest.raises(ValueError, match=r"has images/ and images.tar; keep the one that counts"):
        photos_of(tmp_path, OPTIONS)


OUTSIDE = ["../secret", "sub/../../secret", "images/../secret", "/etc/passwd", "//host/p.jpg", "a\0b"]
OUTSIDE += ["file:///etc/passwd", "FILE:/etc/passwd", "file:a.jpg"]


@both
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_folder_is_refused(make: Make, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    for photos in (opened(make(tmp_path, a__jpg=b"a")), web_photos(OPTIONS)):
        for read in (photos.get, photos.signature):
            with pytest.raises(ValueError, match=r"the photo .* name it relative to") as caught:
                read(["a.jpg", name])
            assert repr(name) in str(caught.value)


def test_links_are_followed_within_the_folder_only(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    images = write_loose(tmp_path / "shop", a__jpg=b"a", sub___b__jpg=b"b") / "images"
    (images / "inside.jpg").symlink_to("sub/b.jpg")
    (images / "nowhere.jpg").symlink_to("sub/c.jpg")
    (images / "outside.jpg").symlink_to("../../secret")
    (images / "up").symlink_to(tmp_path)
    (images / "loop").symlink_to("loop")
    photos = opened(tmp_path / "shop")
    assert photos.get(["inside.jpg", "nowhere.jpg", "loop"]) == [b"b", ABSENT, ABSENT]
    for name in ("outside.jpg", "up/secret", "up/absent"):
        with pytest.raises(ValueError, match=rf"'{name}' is a link that leads out of .*images"):
            photos.get([name])


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write_loose(tmp_path / "disk", a__jpg=b"a")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "images").symlink_to(tmp_path / "disk" / "images")
    assert opened(tmp_path / "shop").get(["a.jpg"]) == [b"a"]


def test_a_pipe_is_no_photo_to_wait_for(tmp_path: Path) -> None:
    write_loose(tmp_path, a__jpg=b"a")
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    assert opened(tmp_path).get(["pipe.jpg"]) == [ABSENT]


def test_only_regular_files_of_a_tar_are_photos(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        add(tar, "a.jpg", b"a")
        add(tar, "soft.jpg", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add(tar, "hard.jpg", kind=tarfile.LNKTYPE, target="a.jpg")
        add(tar, "device.jpg", kind=tarfile.CHRTYPE)
        add(tar, "folder.jpg", kind=tarfile.DIRTYPE)
        add(tar, "../secret", b"secret")
        add(tar, "/absolute", b"secret")
    names = ["soft.jpg", "hard.jpg", "device.jpg", "folder.jpg", "secret", "absolute"]
    assert opened(tmp_path).get(["a.jpg", *names]) == [b"a"] + [ABSENT] * 6


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_with_long_foreign_and_repeated_names(form: int, tmp_path: Path) -> None:
    long = "x" * 150 + "ü/" + "y" * 150 + ".jpg"
    with tarfile.open(tmp_path / "images.tar", "w", format=form) as tar:
        add(tar, long, b"long")
        add(tar, "a.jpg", b"before")
        add(tar, "a.jpg", b"after")
        add(tar, "latin\udcfc.jpg", b"no UTF-8")
        add(tar, "b.jpg", b"b")
    assert opened(tmp_path).get([long, "a.jpg", "b.jpg"]) == [b"long", b"after", b"b"]


def test_every_member_of_a_large_tar_is_found(tmp_path: Path) -> None:
    names = [f"{number * 7919 % 3000}.jpg" for number in range(3000)]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in names:
            add(tar, name, name.encode())
    photos = opened(tmp_path)
    assert photos.get(names) == [name.encode() for name in names]
    assert len(pickle.dumps(photos)) < 2000  # the index is not sent along


def test_an_empty_tar_has_no_photos(tmp_path: Path) -> None:
    assert opened(write_tar(tmp_path)).get(["a.jpg"]) == [ABSENT]


def compressed(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        add(tar, "a.jpg", content)
    return packed.getvalue()


DAMAGES = {  # of a tar with three files, each of a header of 512 bytes and two blocks of content
    "cut within a file": lambda content: content[:2000],
    "cut within a header": lambda content: content[:1700],
    "cut after a file's header": lambda content: content[:2048],
    "a header overwritten": lambda content: content[:1536] + b"\xff" * 512 + content[2048:],
    "compressed": compressed,
    "no tar": lambda content: b"PK" + bytes(5000),
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_refused_whole(damage: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path, a=bytes(1024), b=bytes(1024), c=bytes(1024)) / "images.tar"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"images.tar is no uncompressed tar, or it is damaged: .+"):
        photos_of(tmp_path, OPTIONS)


def test_a_tar_without_its_last_blocks_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path, a=bytes(1024), b=bytes(1024)) / "images.tar"
    path.write_bytes(path.read_bytes()[: 2 * 1536])
    assert opened(tmp_path).get(["b"]) == [bytes(1024)]


def test_photos_go_to_other_processes(tmp_path: Path) -> None:
    photos = opened(write_tar(tmp_path, a__jpg=b"a", b__jpg=b"b"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(photos.get, [["b.jpg", "c.jpg", "a.jpg"]]) == [b"b", ABSENT, b"a"]
    assert photos.get(["a.jpg"]) == [b"a"]  # what the other process closed was its own


def test_on_another_machine_a_tar_is_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    sent = pickle.dumps(opened(write_tar(tmp_path, a__jpg=b"a")))
    assert list((tmp_path / "tmp").iterdir()) == []  # the index went with the photos, as it is not on another machine
    assert pickle.loads(sent).get(["a.jpg", "b.jpg"]) == [b"a", ABSENT]


@both
def test_a_signature_tells_of_changed_files(make: Make, tmp_path: Path) -> None:
    def signature(*names: str) -> str:
        return opened(tmp_path).signature(names)

    make(tmp_path, a__jpg=b"a", b__jpg=b"b")
    names = ("a.jpg", "b.jpg", "c.jpg", "https://shop.example/p.jpg")
    before = signature(*names)
    assert before == signature(*names)
    assert len({before, signature(*names[:2]), signature(*reversed(names)), signature()}) == 4
    changed = [before]
    for contents in ({"a": b"longer"}, {"a": b"longer", "c": b"new"}):
        make(tmp_path, **{f"{name}__jpg": content for name, content in {"b": b"b", **contents}.items()})
        changed.append(signature(*names))
    path = next(path for path in (tmp_path / "images.tar", tmp_path / "images" / "a.jpg") if path.is_file())
    os.utime(path, ns=(1, 1))
    assert len({*changed, signature(*names)}) == 4


def test_a_signature_is_of_the_files_that_are_named(tmp_path: Path) -> None:
    photos = opened(write_loose(tmp_path, a=b"a", b=b"b"))
    before = photos.signature(["a"])
    write_loose(tmp_path, b=b"longer")
    assert photos.signature(["a"]) == before


@both
def test_files_and_urls_may_stand_side_by_side(make: Make, tmp_path: Path, web: Web) -> None:
    content = encoded(Image.new("RGB", (9, 9)))
    photos = opened(make(tmp_path, a__jpg=b"a"))
    url = web.add("/p.png", page(content))
    names = [url, "a.jpg", web.url("/none"), "b.jpg", url, "ftp://host/p.jpg", "data:image/png;base64,AA", "odd: name"]
    other = Failure("not http or https", False)
    assert photos.get(names) == [content, b"a", Failure("HTTP 404", False), ABSENT, content, other, other, ABSENT]
    assert web.requests["/p.png"] == 1
    assert pickle.loads(pickle.dumps(photos)).get([url]) == [content]


def test_web_photos_with_and_without_a_folder(tmp_path: Path, web: Web) -> None:
    content = encoded(Image.new("RGB", (9, 9)))
    url = web.add("/p.png", page(content))
    write_loose(tmp_path, a__jpg=b"a")
    assert web_photos(OPTIONS).get([url, "a.jpg"]) == [content, ABSENT]
    names = ["images/a.jpg", "a.jpg", url]  # relative to the folder itself
    assert web_photos(OPTIONS, tmp_path).get(names) == [b"a", ABSENT, content]


ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "MPO": "jpg"}


@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize("max_side", [None, 60, 61])
def test_a_photo_that_is_not_larger_keeps_its_bytes(kind: str, max_side: int | None) -> None:
    content = encoded(smooth(40, 60), kind)
    assert prepared(content, "p1", max_side, 90) == (content, ENDINGS[kind])


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_larger_photo_becomes_a_jpeg_of_that_side(kind: str) -> None:
    image = smooth(80, 120)
    photo = prepared(encoded(image, kind), "p1", 60, 95)
    found = Image.open(io.BytesIO(photo.content))
    assert (photo.ending, found.format, found.size) == ("jpg", "JPEG", (60, 40))
    expected = np.asarray(image.resize((60, 40), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(np.asarray(found).astype(int) - expected).mean() < (20 if kind == "GIF" else 3)  # GIF: 256 colours


def test_a_resized_photo_is_upright_on_white_and_says_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "who took it"
    content = encoded(smooth(80, 120), "JPEG", exif=exif, comment=b"where", icc_profile=b"profile", quality=95)
    found = Image.open(io.BytesIO(prepared(content, "p1", 60, 95).content))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).resize((40, 60), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 3
    assert set(found.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    clear = encoded(Image.new("RGBA", (120, 80), (0, 0, 0, 0)))
    assert np.asarray(Image.open(io.BytesIO(prepared(clear, "p1", 60, 90).content))).min() == 255


def test_the_quality_is_as_asked_and_the_bytes_are_the_same_each_time() -> None:
    content = encoded(smooth(80, 120))
    for quality in (50, 90):
        photo = prepared(content, "p1", 60, quality)
        assert photo == prepared(content, "p1", 60, quality)
        tables = Image.open(io.BytesIO(encoded(smooth(8, 8), "JPEG", quality=quality))).quantization
        assert Image.open(io.BytesIO(photo.content)).quantization == tables


BROKEN = {
    "empty": b"",
    "not a photo": b"<html>sorry</html>",
    "damaged": encoded(smooth(80, 120), "JPEG")[:-400],
    "too large": encoded(Image.new("1", (9000, 8000))),
}


@pytest.mark.parametrize("max_side", [None, 60, 500, 10_000])
@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_photo_is_a_photo_error_with_and_without_resizing(reason: str, max_side: int | None) -> None:
    with pytest.raises(PhotoError, match="photo of product 'p1'") as caught:
        prepared(BROKEN[reason], "p1", max_side, 90)
    assert caught.value.reason == reason


def test_a_jpeg_that_only_the_fast_decoder_opens_is_damaged() -> None:
    """Its JFIF segment ends before the version: Pillow cannot say how large it is."""
    content = encoded(Image.new("RGB", (64, 64), (200, 30, 30)), "JPEG")
    short = content.replace(content[2:20], b"\xff\xe0\x00\x07JFIF\0", 1)
    for max_side in (None, 32):
        with pytest.raises(PhotoError, match="'p1' cannot be decoded: damaged") as caught:
            prepared(short, "p1", max_side, 90)
        assert caught.value.reason == "damaged"
