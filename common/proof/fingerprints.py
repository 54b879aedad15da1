"""Digests that are equal only where every bit is, and what made a result: versions and code."""

from common import ROOT

import hashlib
import importlib.metadata
import platform
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")


def sha256(data: bytes) -> str:
    """Return the SHA-256 digest, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Return what identifies a tensor to the bit, and its norm, so that a difference has a size."""
    tensor = tensor.detach().cpu().contiguous()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "norm": tensor.double().norm().item() if tensor.is_floating_point() else None,
        "sha256": sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()),
    }


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, dict]:
    """Fingerprint each tensor of a state_dict."""
    return {name: fingerprint(tensor) for name, tensor in tensors.items()}


def optimizer_fingerprints(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Flatten an optimizer's state_dict: fingerprints for tensors, the values of all else."""
    flat: dict[str, Any] = {}
    for index, state in state_dict["state"].items():
        for name, value in state.items():
            is_tensor = isinstance(value, Tensor)
            flat[f"parameter {index}: {name}"] = fingerprint(value) if is_tensor else value
    for index, group in enumerate(state_dict["param_groups"]):
        for name, value in group.items():
            flat[f"group {index}: {name}"] = value
    return flat


def random_state() -> dict[str, str]:
    """Fingerprint the random-number generators: Python's, NumPy's and PyTorch's."""
    of_numpy: Any = np.random.get_state()
    states = {
        "python": repr(random.getstate()).encode(),
        "numpy": repr((of_numpy[0], of_numpy[1].tolist(), *of_numpy[2:])).encode(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda {device}"] = state.numpy().tobytes()
    return {name: sha256(state) for name, state in states.items()}


def versions() -> dict[str, str]:
    """Return the versions of Python, the packages and the system that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "system": platform.platform()}


def code_sha256(side: str) -> dict[str, str]:
    """Return a digest of each file of code that a run of this side may execute.

    The side's own files come first: they are what a learner edits.
    """
    folder = "lightning" if side == "trainer" else side
    files = [*sorted((ROOT / folder).glob("*.py")), *sorted((ROOT / "common").rglob("*.py"))]
    return {str(path.relative_to(ROOT)): sha256(path.read_bytes()) for path in files}
