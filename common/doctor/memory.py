"""Read the memory of a tensor, of whatever kind it is."""

import ctypes
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

PLAIN = (Tensor, torch.nn.Parameter)
LARGE = 1 << 24  # a sparse tensor of more values is not made dense

# The C library's: for the small tensors of a network, NumPy takes ten times as long to begin.
memcmp = ctypes.CDLL(None if os.name == "posix" else "msvcrt").memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU with all values in a row, as numbers that NumPy can read."""
    if is_plain(tensor):
        return tensor.detach().reshape(-1)
    tensor = tensor.detach()
    if tensor.is_meta:
        return torch.zeros(0)
    if hasattr(tensor, "to_local"):  # spread over processes: this one's part
        tensor = tensor.to_local()
    if tensor.is_nested:
        tensor = torch.cat([part.flatten() for part in tensor.unbind()])
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.numel() > LARGE else tensor.to_dense()
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory holds its values as they are, as nearly all do."""
    return (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_complex()
        and not tensor.is_nested
        and not tensor.is_neg()
    )


class _Memory:
    """A tensor's memory for NumPy. PyTorch's own __dlpack__ takes five times as long to begin."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **wanted: Any) -> Any:
        return to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's memory as NumPy sees it.

    Not by tensor.numpy(): from then on PyTorch would refuse to resize that memory, as FSDP does.
    """
    return np.from_dlpack(_Memory(tensor))
