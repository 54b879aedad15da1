"""Say what is on a picture, by the checkpoint of a lesson, of either side.

`python -m common.predict CHECKPOINT IMAGE`, or `make predict CHECKPOINT=... IMAGE=...`.
"""

from common.checkpoints import fill, read, weights
from common.data import Images
from common.files import open_regular, read_bytes
from common.messages import BadInput, Parser, clear_messages, printable
from common.networks import NETWORKS, Network, identify
from common.run import check_onnx

import contextlib
import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

# PIL knows more, but for some of them it starts other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What the images of each data set are: PIL's mode, and pixels from side to side.
FORMS = {"cifar10": ("RGB", 32), "fashionmnist": ("L", 28)}
SHOWN = 5  # classes in the table
EXAMPLE = "make predict CHECKPOINT=runs/cifar/plain/weights.pt IMAGE=photo.jpg"


def picture(path: Path, network: Network) -> Tensor:
    """Return a picture file as a network takes it: float32 [1, channels, size, size].

    The middle square of it, turned as the camera says, on white where it is transparent. One of the
    data set's own images, saved as PNG, gives what `Images` hands out, bit for bit.

    Raises BadInput where the file is missing, unreadable, no picture, cut short, or too large.
    """
    mode, size = FORMS[network.data]
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            square = _square(Image.open(file, formats=FORMATS), mode, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        _refuse(path, f"has more than {limit} million pixels; make it smaller first.")
    except UnidentifiedImageError:
        _refuse(path, f"is no picture; name a file of one of these formats: {', '.join(FORMATS)}.")
    except Unclear as reason:
        _refuse(path, f"{reason}; save it as PNG with 8 bits for each colour.")
    except Exception as error:  # a damaged picture can raise anything
        if isinstance(error, OSError) and error.strerror:
            _refuse(path, f"cannot be read ({error.strerror}); name another file.")
        _refuse(path, "is cut short or damaged; name another file, or save it again.")
    pixels = torch.from_numpy(np.array(square)).reshape(1, size, size, -1)  # channels last
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    images = Images(pixels, torch.zeros(1), network.normalize)
    return images.__getitems__([0])[0]


class Unclear(Exception):
    """It is not known which of a picture's numbers stands for white."""


def _square(image: Image.Image, mode: str, size: int) -> Image.Image:
    """Return the middle square of an opened picture in a mode, L or RGB, and a size in pixels."""
    long, short = max(image.size), min(image.size)
    if long > 2 * short:  # what is far from the middle square would take memory alone
        cut = (long - 2 * short) // 2
        sideways = image.width > image.height
        left, top = (cut, 0) if sideways else (0, cut)
        image = image.crop((left, top, image.width - left, image.height - top))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # PIL itself would make all above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Unclear("has 32 bits for each pixel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Not every mode can be made L directly. Shrinking, BICUBIC averages: each pixel has its part.
    image = image.convert("RGB").convert(mode)
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _refuse(path: Path, fault: str) -> NoReturn:
    raise BadInput(f"the picture '{path}' {fault}")


def about(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what is known of the training: any of lesson, data, and classes, a list of names.

    From the checkpoint's hyper_parameters, and for what they lack from the result.json beside it.
    """
    known: dict[str, Any] = {}
    # None is there, or not one that a run wrote; of one that is, three parts are enough.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        result = json.loads(read_bytes(path.parent / "result.json").decode())
        found = {name: result[name] for name in ("lesson", "data")}
        known = found | {"classes": list(result["test_accuracy_per_class"])}
    settings = content.get("hyper_parameters")
    return known | settings if isinstance(settings, dict) else known


def answer_of_onnx(path: Path, inputs: Tensor) -> Tensor:
    """Return the logits of an exported network, [1, classes], by onnxruntime.

    Raises BadInput where the package is missing, or the file is no network for these inputs.
    """
    check_onnx(f"'{path}'")
    with open_regular(path):  # refuses what is missing, no file, or not to be read
        pass
    runtime: Any = importlib.import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path))
        name = session.get_inputs()[0].name
        (answer,) = session.run(None, {name: inputs.numpy()})
    except Exception as error:  # onnxruntime has a dozen kinds, and none that all share
        said = str(error).splitlines()[0][:200]
        raise BadInput(
            f"'{path}' is no network that classifies such pictures ({said}); name a model.onnx "
            "that the lesson predict wrote with --onnx."
        ) from None
    logits = torch.from_numpy(np.asarray(answer))
    if logits.ndim != 2 or len(logits) != 1 or not logits.is_floating_point():
        raise BadInput(f"'{path}' answers with {tuple(logits.shape)}, expected one row of logits.")
    return logits


def main(argv: list[str]) -> None:
    """Print a table of the likeliest classes of a picture, and the verdict."""
    parser = Parser(prog="common.predict", description="Say what is on a picture.")
    parser.add_argument("checkpoint", help="weights.pt, a .ckpt or an .onnx file of a lesson")
    parser.add_argument("image", help="a picture file")
    arguments = parser.parse_args(argv)
    for name in ("checkpoint", "image"):
        if not getattr(arguments, name):
            raise BadInput(f"no {name} was named; name both files, as in: {EXAMPLE}")
    path, image = Path(arguments.checkpoint), Path(arguments.image)
    if path.suffix == ".onnx":
        network = next(network for network in NETWORKS if network.lesson == "predict")
        shares = answer_of_onnx(path, picture(image, network)).softmax(1)[0]
        show(finite(shares, path), network, about({}, path), image)
        return
    content = read(path)
    known = about(content, path)
    network = identify(weights(content, path), known.get("lesson"))
    if not network.classifies:
        raise BadInput(
            f"'{path}' is of the lesson {network.lesson}, whose network names no class for a "
            "picture; name a checkpoint of another lesson."
        )
    if known.get("lesson", network.lesson) != network.lesson:
        known = {}  # of a run of another lesson, whose files lie in the same folder
    model = network.make()
    fill(model, content, path)
    inputs = picture(image, network)
    model.eval()
    with torch.no_grad():
        # Right for log-probabilities too, which some networks give: softmax of the logarithms of
        # numbers that add up to 1 gives these numbers again.
        shares = model(inputs).softmax(1)[0]
    show(finite(shares, path), network, known, image)


def finite(shares: Tensor, path: Path) -> Tensor:
    """Return probabilities; raise BadInput where they are no numbers."""
    if not shares.isfinite().all():
        raise BadInput(
            f"the network in '{path}' answers with what is not a number: its training failed; "
            "train it again with a smaller --lr."
        )
    return shares


def show(shares: Tensor, network: Network, known: dict[str, Any], image: Path) -> None:
    """Print the classes with the largest of the probabilities, [classes], and the verdict."""
    classes: Any = known.get("classes")
    # What a file says is not trusted: it must be as many names, and printable ones.
    named = (
        isinstance(classes, list | tuple)
        and len(classes) == len(shares)
        and all(isinstance(name, str) and name.isprintable() for name in classes)
    )
    names = classes if named else [f"class {number}" for number in range(len(shares))]
    table = Table(title=Text(printable(f"{network.lesson}: {image.name}")), title_justify="left")
    table.add_column("class")
    table.add_column("probability", justify="right")
    order = shares.argsort(descending=True).tolist()
    for place in order[:SHOWN]:
        table.add_row(Text(names[place]), f"{shares[place]:.1%}")
    Console().print(table)
    data = known.get("data")
    trained = (
        f" The network was trained on {data}."
        if isinstance(data, str) and data.isprintable()
        else ""
    )
    print(f"Most likely: {names[order[0]]}, {shares[order[0]]:.1%}.{trained}")
    if not named:
        print(
            "The names of the classes are unknown: they stand neither in the "
            "checkpoint nor in a result.json beside it."
        )


if __name__ == "__main__":
    with clear_messages():
        main(sys.argv[1:])
