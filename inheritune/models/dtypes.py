"""The float dtypes of checkpoints, for code that need not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """A float dtype."""

    code: str
    """Its name in safetensors headers."""
    name: str
    """Its name in torch and in config.json."""
    itemsize: int
    infinity: int
    """The bits of inf."""

    def __str__(self) -> str:
        return f"torch.{self.name}"

    @property
    def torch(self) -> "torch.dtype":
        """The dtype itself."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


FP64 = Dtype("F64", "float64", 8, 0x7FF0 << 48)
FP32 = Dtype("F32", "float32", 4, 0x7F80 << 16)
FP16 = Dtype("F16", "float16", 2, 0x7C00)
BF16 = Dtype("BF16", "bfloat16", 2, 0x7F80)
DTYPES = {dtype.code: dtype for dtype in (FP64, FP32, FP16, BF16)}
"""The float dtypes, by their names in safetensors headers."""
STORED_AS = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
"""Dtypes that a target can be stored in, by their names on the command line."""


def find_dtype(dtype: "torch.dtype") -> Dtype | None:
    """Return the `Dtype` that torch calls `dtype`, or None if that is none of floats."""
    return next((known for known in DTYPES.values() if str(known) == str(dtype)), None)
