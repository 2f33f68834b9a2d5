"""What makes two encoders the same: all that their outputs in eval mode depend on, besides the input.

Two that could give other outputs have other descriptions; the other way round only what is known to be harmless is
left out, so that an encoder may now and then be taken for another one and encoded again, never the reverse.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mmfusion.encoders import TextEncoder
from mmfusion.feature_cache.part import raw_bytes

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
TORCHS_OWN = set(vars(nn.Module()))  # parameters, hooks: the former are hashed, the latter nobody's option
UNSTABLE = re.compile(r" at 0x[0-9a-fA-F]+| \(GPU \d+\)")  # in a repr: addresses, and the device of a listed parameter
# Other tokens under another prompt, limit, case, normalisation or vocabulary; longer than any limit on titles.
PROBE = " ".join(
    f"{word}{number}" for number in range(64) for word in ("Women's ", "CAFÉ-crème/", "size=42½ ", "navy_blue; ", "靴 ")
)


def described(encoder: nn.Module) -> dict[str, Any]:
    """JSON-able; equal for equal weights loaded in another process, on another device; computed anew at each call.

    Code is not part of it: who changes what an encoder computes raises store.VERSION. Raises what a text encoder's
    `token_ids` raises, such as where it has no tokenizer yet.
    """
    parts = {name: _options(part) for name, part in encoder.named_modules() if name}
    found = {
        "class": _name(type(encoder)),
        "repr": UNSTABLE.sub("", repr(encoder)),
        "options": _options(encoder),
        "parts": digest(parts),
        "state": _state_digest(encoder),
    }
    if isinstance(encoder, TextEncoder):
        found["tokens"] = digest({"probe": encoder.token_ids([PROBE, ""])})
    return found


def digest(description: Mapping[str, Any]) -> str:
    """sha256, in hex, of the description as JSON in one canonical form. Raises TypeError for what JSON cannot hold."""
    return hashlib.sha256(_json(description).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _options(part: nn.Module) -> dict[str, Any]:
    """The attributes of one module that are no parameters and no modules.

    Of a name with an underscore only what cannot be a cache: a number, a text, a tuple.
    """
    found = {"class": _name(type(part)), "compiled": part._compiled_call_impl is not None}
    for name, value in vars(part).items():
        private = name.startswith("_") and not isinstance(value, str | int | float | tuple | Enum | FunctionType)
        if name not in TORCHS_OWN | HARMLESS | {"_compiled_call_impl"} and not private:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:  # noqa: PLR0911  (a table of kinds)
    """A value as JSON holds it; functions, classes and objects by name, a tokenizer and a configuration by content."""
    if value is None or isinstance(value, str | bool | int | float):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in HARMLESS}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=_json)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return _name(value)
    if isinstance(value, Tensor):
        return _tensor_digest(value)
    if isinstance(value, torch.dtype):
        return str(value)
    content: dict[str, Any] = {"class": _name(type(value))}
    if hasattr(value, "to_dict") and hasattr(value, "_attn_implementation"):  # a configuration of transformers
        content |= {"config": _plain(value.to_dict()), "attention": value._attn_implementation}
    if hasattr(value, "get_vocab"):
        content["vocabulary"] = digest(value.get_vocab())
    return content


def _name(of: Any) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _state_digest(encoder: nn.Module) -> str:
    """Of all weights, buffers (those too that no checkpoint holds) and extra states, by name."""
    state: dict[str, Any] = dict(encoder.named_buffers(remove_duplicate=False)) | encoder.state_dict()
    hashed = {
        name: _tensor_digest(value) if isinstance(value, Tensor) else hashlib.sha256(pickle.dumps(value)).hexdigest()
        for name, value in state.items()
    }
    return digest(hashed)


def _tensor_digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw_bytes(tensor)).hexdigest()}"
