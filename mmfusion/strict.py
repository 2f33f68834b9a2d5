"""Reading a YAML file strictly: what is unexpected is a ValueError with the file, the key and the nearest name."""

import dataclasses
import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of arms and variants: they are names of folders


@dataclass(frozen=True)
class StrictFile:
    """A file that is read; `where` in its methods is the dotted key at hand. Each raises ValueError."""

    path: Path

    def content(self) -> Any:
        try:
            return yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is no YAML: {error}") from error

    def keys(self, given: Any, of: type, where: str, needs: Collection[str] = ()) -> dict[str, Any]:
        """A mapping whose keys are fields of the dataclass `of`, and that has those that it needs."""
        if not isinstance(given, dict):
            raise self.error(where, f"is {given!r}", "expected keys and values")
        fields = [f.name for f in dataclasses.fields(of) if f.name != "name"]
        for key in given:
            self.among(key, fields, f"{where}.{key}".lstrip("."), "is an unknown key")
        for key in needs:
            if given.get(key) is None:
                raise self.error(f"{where}.{key}".lstrip("."), "is missing", f"needed are {', '.join(needs)}")
        return given

    def named(self, given: Any, where: str, reserved: Collection[str] = ()) -> dict[str, Any]:
        """A mapping by names that folders can have."""
        if not isinstance(given, dict):
            raise self.error(where, f"is {given!r}", "expected names, each with its options")
        for name in given:
            if not isinstance(name, str) or not NAME.fullmatch(name) or name in reserved:
                taken = f", and not {' or '.join(reserved)}" if reserved else ""
                raise self.error(where, f"names {name!r}", f"expected letters, digits, _ . and -{taken}")
        return given

    def text(self, given: Any, where: str) -> str:
        if not isinstance(given, str) or not given:
            raise self.error(where, f"is {given!r}", "expected a text")
        return given

    def text_or_none(self, given: Any, where: str) -> str | None:
        return None if given is None else self.text(given, where)

    def texts(self, given: Any, where: str) -> tuple[str, ...]:
        if not isinstance(given, list):
            raise self.error(where, f"is {given!r}", "expected a list")
        return tuple(self.text(item, where) for item in given)

    def switch(self, given: Any, where: str) -> bool:
        if not isinstance(given, bool):
            raise self.error(where, f"is {given!r}", "expected true or false")
        return given

    def count(self, given: Any, where: str) -> int:
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise self.error(where, f"is {given!r}", "expected a whole number from 1 on")
        return given

    def among(self, name: Any, names: Collection[str], where: str, found: str = "") -> None:
        if name not in names:
            near = difflib.get_close_matches(str(name), list(names), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise self.error(where, found or f"names {name!r}", f"there are {', '.join(names)}{hint}")

    def error(self, where: str, found: str, expected: str) -> ValueError:
        return ValueError(f"{self.path}: {where or 'the file'} {found}: {expected}")
