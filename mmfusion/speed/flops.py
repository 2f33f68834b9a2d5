"""Floating point operations of a step, and how many a device could have done in its time."""

import re
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# 10^12 dense (not sparse) operations a second, from NVIDIA's datasheets: 16 bits with sums in 32, and TF32. First match
# of a device's name wins. Lightning's own table counts some devices with sparsity and does not know their names.
PEAKS = (
    (r"\bB200\b", 2250, 1125),  # HGX B200 datasheet
    (r"\bH[12]00 NVL\b", 835.5, 417.7),  # H100 and H200 datasheets, columns NVL
    (r"\bH100 PCIe\b", 756, 378),  # H100 datasheet
    (r"\b(H100|H200|GH200)\b", 989.4, 494.7),  # H100, H200 and GH200 datasheets, SXM
    (r"\bA100\b", 312, 156),  # A100 datasheet, SXM and PCIe alike
    (r"\bL40S\b", 362, 183),  # L40S datasheet
    (r"\bL40\b", 181, 90.5),  # L40 datasheet
    (r"\bL4\b", 121, 60),  # L4 datasheet (242 and 120 with sparsity)
    (r"\bA10\b", 125, 62.5),  # A10 datasheet
    (r"\bRTX 4090\b", 165.2, 82.6),  # Ada whitepaper, 16 bits with sums in FP32
    (r"\bRTX 3090\b(?! Ti)", 71, 35.6),  # GA102 whitepaper, 16 bits with sums in FP32
)


def peak(device: str, precision: str) -> float | None:
    """Operations a second of a device by its name under a precision of the trainer; None where that is not known.

    Products of 32 bits count as TF32, unless torch.set_float32_matmul_precision is `highest`.
    """
    half = precision.startswith(("bf16", "16"))
    if "MIG" in device or not (half or precision.startswith("32")):
        return None
    if not half and torch.get_float32_matmul_precision() == "highest":
        return None
    found = next((row for row in PEAKS if re.search(row[0], device)), None)
    return None if found is None else 1e12 * (found[1] if half else found[2])


def compiled(module: nn.Module) -> bool:
    """Whether parts of it run compiled: their operations are not seen, and would run otherwise while one looks."""
    return any(part._compiled_call_impl is not None for part in module.modules())


class Flops(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention, by torch's formulas for them.

    What a backward pass computes a second time (micro-batches, checkpointed activations) counts once: it runs with
    gradients enabled, and a backward pass does not.

    Args:
        backward: whether what comes now is a backward pass
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None and not (self.backward and torch.is_grad_enabled()):
            self.total += formula(*args, **kwargs, out_val=result)
        return result
