"""What a user gets wrong outside the tables' rows: one message with the file's name, never a traceback."""

import csv
import errno
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.importers.amazon_photos import photo_addresses
from datamodules.importers.fashion import read_styles
from datamodules.importers.json_entries import json_entries
from datamodules.importers.marqo_queries import _named_texts
from datamodules.importing.tables import column_names, csv_batches
from datamodules.shards import Shards
from mmfusion import cli
from tests.datamodules.small import small_catalogue

STYLES = b"id,gender,articleType,baseColour,usage,productDisplayName\n1,Men,Ties,Red,Casual,Tie\n"
MISTAKES: list[tuple[str, bytes, Callable[[Path], object], str]] = [
    ("a.csv", STYLES * 999 + b"2,Men,Ties,Red,Casual,Caf\xe9\n", read_styles, "comma-separated UTF-8, behind row"),
    ("a.csv", STYLES + b'2,Men,"Ties,Red,Casual,x\n3,a,b,c,d,e"\n', read_styles, "row 2: a cell holds a line break"),
    ("a.csv", STYLES + b'2,Men,Ties,Red,Casual,"' + b"x" * 200_000, read_styles, "behind row 1: field larger"),
    ("a.csv", b"x" * 200_000, column_names, "comma-separated UTF-8: field larger than"),
    ("a.csv.gz", gzip.compress(b"")[:10] + b"\xff" * 99, column_names, "comma-separated UTF-8: Error -3"),
    (
        "a.csv",
        b"id,b\n" * 9999 + b"2,\xff\n",
        lambda path: list(csv_batches(path)),
        "comma-separated UTF-8: .*nvalid UTF8",
    ),
    ("a.json", b'{"q": "te', _named_texts, "no JSON or cut short"),
    ("a.json", b'{"q": "\xff"}', _named_texts, "no JSON or cut short"),
    ("a.json", b'"text"', _named_texts, "holds 'text'; expected an object"),
    ("a.json", b'{"q": 1}', _named_texts, "query 'q' is 1"),
    ("a.json", b'{"a": 1}\n{"b": 2}', lambda path: list(json_entries(path)), 'behind the end of its object: \'{"b"'),
    ("a.json", b"{}" + b" " * 3_000_000 + b"x", lambda path: list(json_entries(path)), "behind the end .*'x'"),
    (
        "a.json",
        b'{"type": "product", "asin": "B0", "locale": "us", "image": ["http://x/1.jpg"]}\n',
        lambda path: photo_addresses(path, ["us"]),
        r"line 1: the image is \['http",
    ),
]


@pytest.mark.parametrize(("name", "content", "read", "message"), MISTAKES)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, read: Callable[[Path], object], message: str
) -> None:
    limit = csv.field_size_limit(131072)  # Python's own, which other tests may have raised
    try:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
    finally:
        csv.field_size_limit(limit)
    assert type(caught.value) is ValueError
    assert str(tmp_path / name) in str(caught.value)


def test_options_may_be_separated_by_spaces(tmp_path: Path) -> None:
    folder = small_catalogue(tmp_path / "small")
    cli.data(["--from", "catalogue", "--src", str(folder), "--out", str(tmp_path / "out"), "--photos.max_side", "4"])
    assert Shards.open(tmp_path / "out").manifest.products == 64
    with pytest.raises(ValueError, match="make data FROM=catalogue needs OUT"):
        cli.data(["--from", "catalogue", "--src", str(folder), "--out="])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_nothing_is_told_and_the_same_command_goes_on(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = small_catalogue(tmp_path / "small"), tmp_path / "out"
    command = ["--from=catalogue", f"--src={folder}", f"--out={out}"]
    written = Path.write_text

    def full(path: Path, *rest: object, **options: object) -> int:
        if path.name == "00003.done.json.part":
            raise OSError(code, "no")
        return written(path, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(ValueError, match=rf"{out}: .*\. Once that is mended, the same command goes on"):
            cli.data(command)
    assert len(list((tmp_path / "out.partial").glob("*.done.json"))) == 3
    cli.data(command)
    assert Shards.open(out).manifest.products == 64
