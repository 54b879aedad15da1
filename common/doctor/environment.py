"""The surroundings of a run: what can change the last bit of a sum, and the random generators."""

import os
import platform
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fingerprints import digest

PACKAGES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "numpy")


def environment(parameter: Tensor) -> dict[str, Any]:
    """Return versions, threads, types and settings; each that can be read."""
    loaded = {name: sys.modules.get(name) for name in PACKAGES}
    versions = {n: str(getattr(m, "__version__", "?")) for n, m in loaded.items() if m is not None}
    device = parameter.device
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "device": device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.enabled,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
    }
    if device.type == "cuda":
        found["processor"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def random_states() -> dict[str, str]:
    """Return digests of the states of the global random generators."""
    state: Any = np.random.get_state()
    states = {
        "torch": torch_state(),
        "numpy": digest(state[1].tobytes() + bytes([state[2] % 256])),
        "random": digest(np.array(random.getstate()[1]).tobytes()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = digest(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def torch_state() -> str:
    return digest(torch.get_rng_state().numpy().tobytes())


def process() -> tuple[int, int]:
    """Return the rank of this process, and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))  # by torchrun
    return (int(rank), int(ranks)) if rank.isdigit() and ranks.isdigit() else (0, 1)
