"""Options of an encoder as JSON holds them: never the same for what may act differently, else a reason why not."""

import ast
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfusion.feature_cache.part import raw_bytes

LIBRARIES = {"torch", "timm", "transformers", "sentence_transformers", "tokenizers", "numpy", "builtins"}
# Training only, or of the loading: where weights lay, who wrote them, on which device they are.
HARMLESS = {
    "augment",
    "training",
    "grad_checkpointing",
    "gradient_checkpointing",
    "name_or_path",
    "_name_or_path",
    "transformers_version",
    "pretrained_cfg",
    "default_cfg",
    "pretrained_model_args",
    "model_card_data",
    "_model_card_text",
    "_is_hf_initialized",
    "_modules_placed",
    "_device_map",
}
STATE_OF_A_CALL = {"truncation", "padding"}  # of a tokenizer: set anew by each call


class NoIdentityError(ValueError):
    """An encoder holds what cannot be told from others of its kind: its outputs cannot be stored. Says what."""


class _Bare:
    """All its state lies in vars()."""


class Plain:
    """Values of an encoder's attributes as JSON holds them: numbers as they are, objects by content and code.

    Code of `LIBRARIES` counts by name alone, as their versions belong into the key. Raises NoIdentityError that names
    `where` for what is none of the known kinds: an object that keeps its state where Python does not see it, a module
    that is not registered as a part.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.parts = {id(part): name for name, part in encoder.named_modules()}

    def __call__(self, value: Any, where: str) -> Any:
        if type(value) in (NoneType, str, bool, int, float):
            return value
        found = self._kind(value, where)
        if found is None:
            raise NoIdentityError(
                f"{where} is a {class_name(type(value))}, of which it cannot be told what it does: hold numbers, "
                "texts, tensors, functions or plain objects of these instead"
            )
        return {"class": class_name(type(value))} | found

    def _kind(self, value: Any, where: str) -> dict[str, Any] | None:  # noqa: PLR0911  (a table of kinds)
        if isinstance(value, Enum):
            return {"name": value.name, "code": code_of_class(type(value))}
        if isinstance(value, Tensor):
            return {"values": tensor_digest(value)}
        if isinstance(value, np.ndarray | np.generic):
            return _array(np.asarray(value))
        if isinstance(value, bytes | bytearray):
            return {"sha256": hashlib.sha256(value).hexdigest()}
        if isinstance(value, torch.device):
            return {}  # results depend on it, and the key of a folder names it
        if isinstance(value, complex | range | slice | PurePath | torch.dtype | torch.layout | torch.memory_format):
            return {"is": str(value)}
        if isinstance(value, re.Pattern):
            return {"pattern": self(value.pattern, where), "flags": value.flags}
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if isinstance(value, list | tuple):
            return {"items": [self(item, f"{where}[{place}]") for place, item in enumerate(value)]}
        if isinstance(value, set | frozenset):
            return {"items": sorted((self(item, where) for item in value), key=json.dumps)}
        if isinstance(value, nn.Module):
            return {"part": self.parts[id(value)]} if id(value) in self.parts else None
        return self._callable(value, where) or self._object(value, where)

    def _mapping(self, value: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """In its own order, which may matter."""
        items = [[self(key, where), self(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {"items": items, "default": self(getattr(value, "default_factory", None), f"{where}'s default")}

    def _callable(self, value: Any, where: str) -> dict[str, Any] | None:
        if isinstance(value, type):
            return {"name": class_name(value), "code": code_of_class(value)}
        if isinstance(value, partial):
            given = {"args": self(value.args, where), "keywords": self(value.keywords, where)}
            return {"func": self(value.func, where), **given}
        if isinstance(value, MethodType):
            return {"func": self(value.__func__, where), "of": self(value.__self__, f"what {where} is a method of")}
        if isinstance(value, BuiltinFunctionType | MethodDescriptorType):
            bound = getattr(value, "__self__", None)
            owner = None if bound is None or inspect.ismodule(bound) else self(bound, f"what {where} is a method of")
            return {"name": value.__qualname__, "module": getattr(value, "__module__", None), "of": owner}
        if isinstance(value, FunctionType):
            return self._function(value, where)
        return None

    def _function(self, function: FunctionType, where: str) -> dict[str, Any]:
        plain: Any = inspect.unwrap(function)  # without what checks its shapes
        found = {"name": class_name(plain)}
        if _is_of_library(plain.__module__) and "<" not in plain.__qualname__:
            return found
        cells = [_content(cell) for cell in plain.__closure__ or ()]
        return found | {
            "code": [_code(plain.__code__), _source(plain.__module__)],
            "defaults": self([plain.__defaults__, plain.__kwdefaults__], f"a default of {where}"),
            "closure": self(cells, f"the closure of {where}"),
        }

    def _object(self, value: Any, where: str) -> dict[str, Any] | None:
        """By content: a configuration of transformers, a tokenizer; what else has all its state where it is seen."""
        if hasattr(value, "to_dict") and hasattr(value, "_attn_implementation"):
            config = self(_without(value.to_dict()), where)
            return {"config": config, "attention": value._attn_implementation}
        backend = getattr(value, "backend_tokenizer", value)
        if class_name(type(backend)) == "tokenizers.Tokenizer":
            held = {name: part for name, part in json.loads(backend.to_str()).items() if name not in STATE_OF_A_CALL}
            return {"tokenizer": hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()}
        if type(value).__basicsize__ == _Bare.__basicsize__ and hasattr(value, "__dict__"):
            held = vars(value)
        elif is_dataclass(value) and "__slots__" in vars(type(value)):
            held = {field.name: getattr(value, field.name) for field in fields(value)}
        else:
            return None
        state = {name: self(item, f"{where}.{name}") for name, item in held.items()}
        return {"state": state, "code": code_of_class(type(value))}


def class_name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def tensor_digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw_bytes(tensor)).hexdigest()}"


def code_of_class(of: type) -> list[Any]:
    """What its code and that of its bases is, but for `LIBRARIES`: the modules that they are written in."""
    own = [base for base in of.__mro__ if not _is_of_library(base.__module__)]
    return [[class_name(base), _source(base.__module__) or _methods(base)] for base in own]


def _is_of_library(module: str | None) -> bool:
    top = (module or "builtins").split(".")[0]
    return top in LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


@cache
def _source(module: str) -> str | None:
    """Of a module as it is written, comments apart; None where it is not in a file, such as in a notebook."""
    try:
        source = inspect.getsource(sys.modules[module])
        return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()
    except (KeyError, OSError, TypeError, SyntaxError):
        return None


def _methods(of: type) -> dict[str, Any]:
    functions = {name: getattr(value, "__func__", value) for name, value in vars(of).items()}
    return {name: _code(f.__code__) for name, f in functions.items() if isinstance(f, FunctionType)}


def _code(code: CodeType) -> list[Any]:
    """What it computes, not where it stands."""
    constants = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
    return [hashlib.sha256(code.co_code).hexdigest(), *map(list, names), constants]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _array(array: np.ndarray) -> dict[str, Any] | None:
    if array.dtype.hasobject:
        return None
    values = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": values}


def _without(config: Any) -> Any:
    """A configuration without what is harmless, at any depth."""
    if isinstance(config, dict):
        return {key: _without(value) for key, value in config.items() if key not in HARMLESS}
    return config
