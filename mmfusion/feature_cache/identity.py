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
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from mmfusion.encoders import TextEncoder
from mmfusion.feature_cache.plain import HARMLESS, NoIdentityError, Plain, class_name, code_of_class, tensor_digest

TORCHS_OWN = set(vars(nn.Module()))  # parameters, hooks: the former are hashed, the latter nobody's option
UNSTABLE = re.compile(r" at 0x[0-9a-fA-F]+| \(GPU \d+\)")  # in a repr: addresses, and the device of a listed parameter
# Other tokens under another prompt, limit, case, normalisation or vocabulary; longer than any limit on titles.
PROBE = " ".join(
    f"{word}{number}" for number in range(64) for word in ("Women's ", "CAFÉ-crème/", "size=42½ ", "navy_blue; ", "靴 ")
)


def described(encoder: nn.Module) -> dict[str, Any]:
    """JSON-able; equal for equal weights loaded in another process, on another device; computed anew at each call.

    Code counts where an encoder's classes and functions are written, but for plain.LIBRARIES, whose versions belong
    into the key; who changes other code that decides outputs raises store.VERSION. Hooks are nobody's options.
    Raises NoIdentityError for an attribute of which it cannot be told what it does: such outputs cannot be stored.
    Raises what a text encoder's `token_ids` raises, such as where it has no tokenizer yet.
    """
    plain = Plain(encoder)
    try:
        parts = {name: _options(part, plain, f"its part {name!r}") for name, part in encoder.named_modules() if name}
        options = _options(encoder, plain, "the encoder")
    except RecursionError:
        raise NoIdentityError("an attribute of the encoder holds itself") from None
    found = {
        "class": class_name(type(encoder)),
        "repr": UNSTABLE.sub("", repr(encoder)),
        "options": options,
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


def _options(part: nn.Module, plain: Plain, where: str) -> dict[str, Any]:
    """The attributes of one module that are no parameters and no modules.

    In a library's module, of a name with an underscore only what cannot be a cache: a number, a text, a tuple.
    """
    code = code_of_class(type(part))
    found = {"class": class_name(type(part)), "code": code, "compiled": part._compiled_call_impl is not None}
    for name, value in vars(part).items():
        private = name.startswith("_") and not code
        cache = private and not isinstance(value, str | int | float | tuple | Enum | FunctionType)
        if name not in TORCHS_OWN | HARMLESS | {"_compiled_call_impl"} and not cache:
            found[f"its {name}"] = plain(value, f"{where}: {name}")
    return found


def _state_digest(encoder: nn.Module) -> str:
    """Of all weights, buffers (those too that no checkpoint holds) and extra states, by name."""
    state: dict[str, Any] = dict(encoder.named_buffers(remove_duplicate=False)) | encoder.state_dict()
    hashed = {
        name: tensor_digest(value) if isinstance(value, Tensor) else hashlib.sha256(pickle.dumps(value)).hexdigest()
        for name, value in state.items()
    }
    return digest(hashed)
