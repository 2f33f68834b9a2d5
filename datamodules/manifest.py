"""manifest.json: what a folder of shards holds, and the hash that names exactly these shards."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
SPLITS = ("train", "val", "test")
Unlisted = Literal["irrelevant", "unknown"]
UNLISTED: dict[str, Unlisted] = {"train": "unknown", "val": "irrelevant", "test": "irrelevant"}


@dataclass(frozen=True)
class Label:
    """A label column. `gains` maps its labels to what they are worth; None: labels are numbers, their own gains."""

    gains: dict[str, float] | None
    positive_from: float


@dataclass(frozen=True)
class Split:
    queries: int
    judgments: int
    unlisted: Unlisted


@dataclass(frozen=True)
class Shard:
    """One tar. `trainable`: products with a train positive in the primary label column; `pairs`: those positives."""

    name: str
    sha256: str
    bytes: int
    products: int
    trainable: int
    pairs: int


@dataclass(frozen=True)
class Manifest:
    """`labels` is ordered: the first column is the primary one. `source`: which importer made it, with its options."""

    name: str
    seed: int
    source: dict[str, Any]
    fields: list[str]
    labels: dict[str, Label]
    splits: dict[str, Split]
    products: int
    photos: int
    missing_photos: int
    broken_photos: int
    tables: dict[str, str]
    shards: list[Shard]
    schema: int = field(default=SCHEMA)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of everything else."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        # Sorted keys forget which label column is the primary one.
        return hashlib.sha256((canonical + ",".join(self.labels)).encode()).hexdigest()

    @property
    def primary(self) -> str:
        return next(iter(self.labels))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "hash": self.hash}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError when the schema is another one, or the content does not match the hash."""
        record = json.loads(text)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            found = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"the manifest has schema {found}, this version reads {SCHEMA}: import the data again")
        claimed = record.pop("hash", None)
        try:
            manifest = cls(**{**record, **_typed(record)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the manifest is not complete ({error}): import the data again") from error
        if manifest.hash != claimed:
            raise ValueError("the manifest was changed after it was written (its hash differs): import the data again")
        return manifest


def _typed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "labels": {name: Label(**label) for name, label in record["labels"].items()},
        "splits": {name: Split(**split) for name, split in record["splits"].items()},
        "shards": [Shard(**shard) for shard in record["shards"]],
    }


def read_manifest(path: Path) -> Manifest:
    """Raises FileNotFoundError or ValueError, saying what `path` is instead of a folder of shards."""
    if (path / "manifest.json").is_file():
        try:
            return Manifest.from_json((path / "manifest.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path / 'manifest.json'}: {error}") from error
    how = f"make them with: make data FROM=catalogue SRC={path if path.is_dir() else '<folder>'} OUT=data/<name>"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a folder of shards (manifest.json, *.tar): {how}")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder of shards (manifest.json, *.tar): {how}")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    is_catalogue = any(path.glob("products.*"))
    looks = "It looks like a catalogue that is not imported yet" if is_catalogue else "It is no folder of shards"
    raise ValueError(f"{path} has no manifest.json (found: {found}). {looks}: {how}")
