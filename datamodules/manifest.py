"""manifest.json: what a folder of shards holds, and the hash that names exactly these shards.

Tables of pairs that are made later (pair_tables.py) are listed, and left out of the hash: the catalogue stays the same,
so results stay comparable, and each table has a sha256 of its own.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

SCHEMA = 1
SPLITS = ("train", "val", "test")
Unlisted = Literal["irrelevant", "unknown"]
PairKind = Literal["negatives", "scores"]
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
class PairTable:
    """A table beside the shards, `pairs/<name>.parquet`. `made_by`: what made it, of what, with which options."""

    kind: PairKind
    sha256: str
    rows: int
    made_by: dict[str, Any]


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
    pairs: dict[str, PairTable] = field(default_factory=dict)
    schema: int = field(default=SCHEMA)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of everything else but `pairs`."""
        catalogue = {name: value for name, value in asdict(self).items() if name != "pairs"}
        canonical = json.dumps(catalogue, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        # Sorted keys forget which label column is the primary one.
        return hashlib.sha256((canonical + ",".join(self.labels)).encode()).hexdigest()

    @cached_property
    def primary(self) -> str:
        """The label column that says what is positive."""
        return next(iter(self.labels))

    @cached_property
    def positive_from(self) -> float:
        """The least gain of a positive."""
        return self.labels[self.primary].positive_from

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
            manifest: Manifest = _typed(cls, {"pairs": {}, **record}, "the manifest")
        except TypeError as error:
            raise ValueError(f"{error}: import the data again") from error
        if manifest.hash != claimed:
            raise ValueError("the manifest was changed after it was written (its hash differs): import the data again")
        for name, pair in manifest.pairs.items():
            pair_file(name)
            if not re.fullmatch(r"[0-9a-f]{64}", pair.sha256):
                raise ValueError(f"the manifest: pairs: {name} has the sha256 {pair.sha256[:70]!r}: write it again")
        return manifest


def _typed(kind: Any, value: Any, place: str) -> Any:
    """A JSON value as the type `kind`, its objects as dataclasses. Raises TypeError where it is of another type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # with None
        return None if value is None else _typed(args[0], value, place)
    if origin is dict and isinstance(value, dict):
        return {name: _typed(args[1], item, f"{place}: {name}") for name, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_typed(args[0], item, f"{place} [{i}]") for i, item in enumerate(value)]
    if is_dataclass(kind) and isinstance(value, dict):
        types = get_type_hints(kind)
        if value.keys() != types.keys():
            raise TypeError(f"{place} has {', '.join(value) or 'nothing'}; expected {', '.join(types)}")
        made: Any = kind
        return made(**{name: _typed(types[name], item, f"{place}: {name}") for name, item in value.items()})
    if not _is_plain(value, kind):
        raise TypeError(f"{place} is {repr(value)[:40]}; expected {getattr(kind, '__name__', kind)}")
    return value


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind is float:
        return type(value) in (int, float)
    return kind is str and isinstance(value, str)


def pair_file(name: str) -> str:
    """Where in the folder a table of pairs lies. Raises ValueError when its name is none."""
    if not re.fullmatch(r"[a-z0-9_-]{1,100}", name):
        raise ValueError(f"a table of pairs is called {name!r}; expected lower-case letters, digits, _ and - alone")
    return f"pairs/{name}.parquet"


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
