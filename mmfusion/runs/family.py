"""What a run belongs to: a study or a sweep, or nothing but its experiment."""

from pathlib import Path

MARKS = {"study.json": "study", "journal.log": "sweep"}  # the files that the folder of either has
DEPTH = 4  # folders above a run's that may be of its study or sweep


def family(run: Path) -> str | None:
    """`study paper` or `sweep fusion`: the outermost, as a sweep may have a study of its best; None for neither."""
    above = run.resolve().parents
    for folder in reversed(list(above)[1:DEPTH]):
        for mark, kind in MARKS.items():
            if (folder / mark).is_file():
                return f"{kind} {folder.name}"
    return None
