"""Which layer of an encoder a parameter is of, for learning rates that fall from the top layer to the embeddings."""

from typing import Any

from torch import nn


def below_top(encoder: nn.Module) -> dict[str, int]:
    """By parameter of the encoder, how many layers are above its own: 0 in the top one, most in the embeddings.

    A timm network says itself where its layers are (`group_matcher`: blocks, finer than stages). Elsewhere layers are
    the longest list of modules of one class (a transformer's blocks); what is registered before that, and embeddings
    anywhere, lie one below the first; what comes after goes with the last (final norms, poolers, projections).

    Raises ValueError where the encoder has parameters and no such list.
    """
    for prefix, part in encoder.named_modules():
        if hasattr(part, "group_matcher"):
            return _by_timm(encoder, part, f"{prefix}." if prefix else "")
    return _by_list(encoder)


def _by_timm(encoder: nn.Module, network: Any, prefix: str) -> dict[str, int]:
    from timm.models import group_parameters  # noqa: PLC0415  (importing timm takes seconds)

    layer = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    top = max(layer.values(), default=0)
    names = [name for name, _ in encoder.named_parameters()]
    return {name: top - layer.get(name.removeprefix(prefix), top) for name in names}


def _by_list(encoder: nn.Module) -> dict[str, int]:
    names = [name for name, _ in encoder.named_parameters()]
    where, layers = max(_lists(encoder).items(), key=lambda item: len(item[1]), default=("", []))
    if names and not layers:
        raise ValueError(
            f"model.optim.layer_decay: {type(encoder).__name__} has no list of layers to tell lower from higher ones "
            "by; set it to 1.0, or give the encoder the rate frozen"
        )
    layer = {f"{where}.{name}.": number for number, name in enumerate(layers, start=1)}
    embeddings = tuple(f"{name}." for name, part in encoder.named_modules() if isinstance(part, nn.Embedding))
    found, reached = {}, 0
    for name in names:
        inside = next((number for prefix, number in layer.items() if name.startswith(prefix)), None)
        reached = reached or (inside is not None) * len(layers)
        outside = 0 if name.startswith(embeddings) else reached
        found[name] = len(layers) - (outside if inside is None else inside)
    return found


def _lists(encoder: nn.Module) -> dict[str, list[str]]:
    """By name, the lists of modules with parameters that are all of one class: the names in each."""
    found = {}
    for name, part in encoder.named_modules():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            children = [key for key, child in part.named_children() if any(True for _ in child.parameters())]
            least = 1 if isinstance(part, nn.ModuleList) else 2
            if len(children) >= least and len({type(part.get_submodule(key)) for key in children}) == 1:
                found[name] = children
    return found
