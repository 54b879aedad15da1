"""The weights of torchvision's pretrained networks: found, downloaded, or done without."""

from common.download import Unreachable, giving_up, probe
from common.files import open_regular
from common.messages import BadInput, notice
from common.models import Transfer

import contextlib
import hashlib
from pathlib import Path

import torch


def load_pretrained(net: Transfer, backbone: str, choice: str) -> str:
    """Load ImageNet's weights into a network's backbone; return "imagenet" or "random".

    `choice` is "imagenet", "random", which leaves the weights as they are, or "auto": the former
    where they are here or can be downloaded, else the latter, with a notice. They lie where
    torchvision keeps them, under $TORCH_HOME.

    Raises BadInput where "imagenet" cannot be had, and where the file is damaged.
    """
    if choice == "random":
        return "random"
    url, path = _place(backbone)
    digest = path.stem.rsplit("-", 1)[-1]  # the name ends with the first digits of its sha256
    try:
        _download(url, path, digest)
    except Unreachable as reason:
        if choice == "imagenet":
            raise BadInput(
                f"the weights of {backbone} are not in '{path.parent}' and could not be downloaded "
                f"({reason}); put {path.name} there, or use --weights random."
            ) from None
        _print_notice(backbone, path, reason)
        return "random"
    found = ""
    with contextlib.suppress(OSError), open_regular(path) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digest):
        raise BadInput(
            f"the file '{path}' is cut short or altered (its sha256 does not begin with "
            f"{digest}); remove it to have it downloaded again, or use --weights random."
        )
    weights = torch.load(path, map_location="cpu", weights_only=True)
    # All but the last layer, which chose among ImageNet's thousand classes.
    for name in ("weight", "bias"):
        del weights[f"{net.last_name}.{name}"]
    net.backbone.load_state_dict(weights)
    return "imagenet"


def came_after(backbone: str, file: Path) -> bool:
    """Tell whether a network's pretrained weights came to this machine after a file was written."""
    path = _place(backbone)[1]
    return path.exists() and file.exists() and path.stat().st_ctime > file.stat().st_mtime


def _place(backbone: str) -> tuple[str, Path]:
    """Return the address of the pretrained weights, and the file that they are downloaded to."""
    from torchvision.models import get_model_weights

    url = get_model_weights(backbone).IMAGENET1K_V1.url
    return url, Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def _download(url: str, path: Path, digest: str) -> None:
    if not path.exists():
        probe(url)
        with giving_up():  # into a temporary file, renamed when its sum is right
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest)


def _print_notice(backbone: str, path: Path, reason: Exception) -> None:
    notice(
        f"THIS {backbone.upper()} IS NOT PRETRAINED. Its weights were not found, and could",
        "not be downloaded, so it begins with random ones. The numbers below say nothing",
        "about fine-tuning.",
        f"Looked for: {path}",
        f"Download: {reason}",
    )
