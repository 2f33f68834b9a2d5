"""An import that is stopped, by a mistake, a server or kill -9, and run again: the same bytes, nothing done twice."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

from datamodules.importing.partial import STAGING, partial_folder, publish
from datamodules.manifest import Manifest
from datamodules.photos.options import PhotoOptions
from datamodules.shards import Shards
from tests.datamodules.small import convert, small_catalogue
from tests.datamodules.streams import content as contents
from tests.datamodules.web import Answer, Web, page, status, web_server

BROKEN = "p63.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_catalogue(tmp_path / "small")


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def stop(folder: Path, out: Path, **options: object) -> Path:
    """An import that stops at a broken photo; the photo is whole again afterwards. Returns what it left."""
    photo = folder / "images" / BROKEN
    whole, times = photo.read_bytes(), (photo.stat().st_atime_ns, photo.stat().st_mtime_ns)
    photo.write_bytes(b"GIF89a and no more")
    with pytest.raises(ValueError, match=rf"'{BROKEN}'.*on_broken_photo=drop"):
        convert(str(folder), str(out), **options)
    photo.write_bytes(whole)
    os.utime(photo, ns=times)
    partial = out.with_name(out.name + ".partial")
    assert not out.exists()
    assert 0 < len(finished(partial)) < 16
    return partial


def finished(partial: Path) -> dict[str, int]:
    """Inodes of the finished shards."""
    return {
        path.name[:5]: partial.joinpath(f"{path.name[:5]}.tar").stat().st_ino for path in partial.glob("*.done.json")
    }


def test_finished_shards_are_kept_and_the_rest_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(str(folder), str(tmp_path / "straight"))
    partial = stop(folder, tmp_path / "out")
    done = finished(partial)
    assert f"{partial} keeps {len(done)} finished shards" in capsys.readouterr().err
    assert sorted(path.name for path in partial.iterdir() if "0" not in path.name) == [".writing", "import.json"]
    convert(str(folder), str(tmp_path / "out"))
    assert f"going on with {len(done)} of 16 shards" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert {name: (tmp_path / "out" / f"{name}.tar").stat().st_ino for name in done} == done
    assert not partial.exists()


def test_what_is_dropped_does_not_start_afresh(folder: Path, tmp_path: Path) -> None:
    done = finished(stop(folder, tmp_path / "out"))
    (folder / "images" / BROKEN).write_bytes(b"GIF89a and no more")
    manifest = convert(str(folder), str(tmp_path / "out"), on_broken_photo="drop")
    assert (manifest.photos, manifest.broken_photos) == (55, 1)
    assert {name: (tmp_path / "out" / f"{name}.tar").stat().st_ino for name in done} == done


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (lambda folder: edit(folder / "products.csv", "cup number 1,", "mug number 1,"), {}, "tables.products"),
        (lambda folder: edit(folder / "judgments.csv", "q0,p0,E", "q0,p0,S"), {}, "tables.judgments"),
        (lambda folder: None, {"seed": 5}, "seed"),
        (lambda folder: None, {"positive_from": {"relevance": 0.1}}, "labels"),
        (lambda folder: None, {"shard_size": 8}, "shards"),
    ],
)
def test_other_tables_or_options_start_afresh(
    folder: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    options: dict,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop(folder, tmp_path / "out")
    change(folder)
    convert(str(folder), str(tmp_path / "out"), **options)
    assert f"starting afresh: since the import that was stopped, {told} changed" in capsys.readouterr().err
    convert(str(folder), str(tmp_path / "straight"), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_photo_that_changed_in_between_is_noticed(folder: Path, tmp_path: Path) -> None:
    partial = stop(folder, tmp_path / "out")
    number = min(finished(partial))
    with_photo = next(sample for sample in samples(partial / f"{number}.tar") if sample.endswith(".png"))
    (folder / "images" / with_photo).write_bytes((folder / "images" / other(with_photo)).read_bytes())
    kept = finished(partial)
    convert(str(folder), str(tmp_path / "out"))
    convert(str(folder), str(tmp_path / "straight"))
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    again = {name for name, inode in kept.items() if (tmp_path / "out" / f"{name}.tar").stat().st_ino != inode}
    assert again == {number}


def samples(tar: Path) -> list[str]:
    import tarfile

    with tarfile.open(tar) as members:
        return members.getnames()


def other(photo: str) -> str:
    """A photo of another colour."""
    number = int(photo[1:-4])
    return f"p{number + 1 if (number + 1) % 8 else number + 2}.png"


def test_a_mistake_in_the_tables_leaves_nothing_but_earlier_shards(folder: Path, tmp_path: Path) -> None:
    edit(folder / "judgments.csv", "q0,p0,E", "q0,p0,X")
    with pytest.raises(ValueError, match="label 'X'"):
        convert(str(folder), str(tmp_path / "deep" / "out"))
    assert not list((tmp_path / "deep").iterdir())
    edit(folder / "judgments.csv", "q0,p0,X", "q0,p0,E")
    partial = stop(folder, tmp_path / "out")
    before = contents(partial)
    edit(folder / "judgments.csv", "q0,p0,E", "q0,p0,X")
    with pytest.raises(ValueError, match="label 'X'"):
        convert(str(folder), str(tmp_path / "out"))
    assert contents(partial) == before


def by_url(folder: Path, web: Web, answers: dict[str, Answer]) -> None:
    """The photos of the small catalogue come from the server from now on."""
    for path in (folder / "images").iterdir():
        web.add(f"/{path.name}", answers.get(path.name, page(path.read_bytes())))
        edit(folder / "products.csv", f",{path.name}\n", f",{web.url(f'/{path.name}')}\n")


def test_what_failed_for_the_moment_is_asked_for_again_and_nothing_else(folder: Path, web: Web, tmp_path: Path) -> None:
    convert(str(folder), str(tmp_path / "local"))
    by_url(folder, web, {"p9.png": status(503), "p10.png": status(404)})
    options: dict = {"photos": PhotoOptions(max_failed=0.03, retries=0)}
    with pytest.raises(ValueError, match=r"2 of 56 photos could not be downloaded: HTTP 503 1, HTTP 404 1|HTTP 404 1,"):
        convert(str(folder), str(tmp_path / "out"), **options)
    web.pages["/p9.png"] = page((folder / "images" / "p9.png").read_bytes())
    web.requests.clear()
    manifest = convert(str(folder), str(tmp_path / "out"), **options)
    assert dict(web.requests) == {"/p9.png": 1}
    assert (manifest.photos, manifest.missing_photos) == (55, 1)
    with (tmp_path / "out" / "missing_photos.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"product_id": "p10", "image": web.url("/p10.png"), "reason": "HTTP 404"}]
    ours, local = Shards.open(tmp_path / "out"), Shards.open(tmp_path / "local")
    for id in range(64):
        a, b = ours.read(id), local.read(id)
        assert (a.product_id, a.texts) == (b.product_id, b.texts)
        assert a.photo == (None if a.product_id == "p10" else b.photo)


def test_shards_that_are_there_cost_no_download(folder: Path, web: Web, tmp_path: Path) -> None:
    by_url(folder, web, {})
    first = convert(str(folder), str(tmp_path / "out"))
    web.requests.clear()
    before = contents(tmp_path / "out")
    assert convert(str(folder), str(tmp_path / "out")) == first
    with pytest.raises(ValueError, match=r"holds other shards \(different are photos.max_side\)"):
        convert(str(folder), str(tmp_path / "out"), photos=PhotoOptions(max_side=4))
    assert not web.requests
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()


STEPS = [("shutil.rmtree", "staging"), ("os.rename", "out.partial"), ("datamodules.importing.partial.tidy", "out")]
STEPS += [("pathlib.Path.unlink", "00003.done.json"), ("pathlib.Path.unlink", ".writing")]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("step", "name"), STEPS)
def test_stopped_while_it_is_published(
    folder: Path, tmp_path: Path, step: str, name: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kept`: as by kill -9, nothing is cleared away afterwards."""
    out, real, written = tmp_path / "out", resolve_name(step), tmp_path / "out.partial" / "manifest.json"

    def stops(path: Path, *rest: object, **options: object) -> object:
        if Path(path).name == name and (written.exists() or out.exists()):
            raise KeyboardInterrupt
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step, stops)
        if kept:
            patch.setattr("datamodules.importing.partial._leave", lambda folder: None)
        with pytest.raises(KeyboardInterrupt):
            convert(str(folder), str(out))
    convert(str(folder), str(out))
    convert(str(folder), str(tmp_path / "straight"))
    assert contents(out) == contents(tmp_path / "straight")
    assert not written.parent.exists()


def test_a_partial_folder_that_another_import_began_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with partial_folder(out) as first:
        (first / STAGING).mkdir()
        publish(first, out)
        with partial_folder(tmp_path / "out") as second:
            (second / "00000.tar").touch()
            os.rename(second, tmp_path / "aside")
        os.rename(tmp_path / "aside", second)
    assert (second / "00000.tar").exists()


def test_a_record_that_was_cut_short_counts_for_nothing(folder: Path, tmp_path: Path) -> None:
    partial = stop(folder, tmp_path / "out")
    record = min(partial.glob("*.done.json"))
    record.write_text(record.read_text()[:-20])
    convert(str(folder), str(tmp_path / "out"))
    convert(str(folder), str(tmp_path / "straight"))
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_downloads_of_another_import_are_not_thrown_away(folder: Path, web: Web, tmp_path: Path) -> None:
    by_url(folder, web, {"p9.png": status(404)})
    hopeful: dict = {"photos": PhotoOptions(max_failed=0.0)}
    with pytest.raises(ValueError, match="1 of 56 photos could not be downloaded"):
        convert(str(folder), str(tmp_path / "out"), **hopeful)
    before = contents(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"keeps 16 shards with downloaded photos .*different are seed\): delete"):
        convert(str(folder), str(tmp_path / "out"), seed=5, **hopeful)
    assert contents(tmp_path / "out.partial") == before


def test_a_server_that_fails_all_the_time_stops_the_import(
    folder: Path, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.importing.writer.ENOUGH", 7)
    by_url(folder, web, {f"p{i}.png": status(404) for i in range(64)})
    with pytest.raises(ValueError, match=r"\d+ of \d+ photos could not be .*HTTP 404 \d+\..* it stops here"):
        convert(str(folder), str(tmp_path / "out"))
    assert 7 < sum(web.requests.values()) < 56


def test_a_copy_of_a_folder_gives_the_same_import_and_an_edited_photo_is_noticed(folder: Path, tmp_path: Path) -> None:
    convert(str(folder), str(tmp_path / "out"))
    other_times = tmp_path / "copy" / "small"
    shutil.copytree(folder, other_times, copy_function=shutil.copyfile)
    convert(str(other_times), str(tmp_path / "other"))
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    photo = folder / "images" / BROKEN
    photo.write_bytes(photo.read_bytes()[:-1] + b"?")  # behind the end of the image
    with pytest.raises(ValueError, match="holds other shards"):
        convert(str(folder), str(tmp_path / "out"))


SCRIPT = """
import sys
from datamodules.importers.catalogue import OwnCatalogue
if __name__ == "__main__":
    OwnCatalogue(src=sys.argv[1], out=sys.argv[2], jobs=int(sys.argv[3])).run()
"""


@pytest.mark.parametrize(
    ("how", "jobs"),
    [
        (signal.SIGKILL, 2),
        (signal.SIGINT, 2),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle(folder: Path, web: Web, tmp_path: Path, how: signal.Signals, jobs: int) -> None:
    """The server does not answer for two photos: the import finishes some shards, then waits, and is killed there."""
    going_on = threading.Event()

    def held(path: Path) -> Answer:
        def answer(request) -> None:  # type: ignore[no-untyped-def]
            going_on.wait(60)
            page(path.read_bytes())(request)

        return answer

    by_url(folder, web, {name: held(folder / "images" / name) for name in ("p9.png", "p33.png")})
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(out), str(jobs)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as process:
        wait_for(
            lambda: len(list(partial.glob("*.done.json"))) >= 2 and web.requests["/p9.png"] + web.requests["/p33.png"]
        )
        time.sleep(0.5)
        done = finished(partial)
        process.send_signal(how)
        process.wait(30)
        wait_for(lambda: not alive(process.pid))
    going_on.set()
    web.requests.clear()
    assert not out.exists()
    resumed = convert(str(folder), str(out))
    assert {name: (out / f"{name}.tar").stat().st_ino for name in done} == done
    assert max(web.requests.values()) == 1
    assert sum(web.requests.values()) < 56
    assert isinstance(resumed, Manifest)
    convert(str(folder), str(tmp_path / "straight"))
    assert contents(out) == contents(tmp_path / "straight")


def alive(group: int) -> bool:
    """Whether a process of the group is left, other than as a zombie that waits for its parent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(of) == group and state != "Z":
            return True
    return False


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
