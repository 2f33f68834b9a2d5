"""What an importer's stream holds, as rows, the way it is staged: text everywhere, "" for null."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from datamodules.importing.staging import Stream


def rows(stream: Stream) -> list[dict[str, Any]]:
    """Read twice, since a stream must give the same each time it is asked."""
    once, again = (pa.Table.from_batches(list(stream.batches())).to_pylist() for _ in range(2))
    assert once == again
    return [{name: ("" if value is None else value) for name, value in row.items()} for row in once]


def column(stream: Stream, name: str) -> list[Any]:
    return [row[name] for row in rows(stream)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
