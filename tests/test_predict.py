"""One picture, classified by checkpoints of both sides: the same answer, or one sentence."""

from common import checkpoints, predict
from common.data import Images
from common.messages import BadInput, clear_messages
from common.models import Net, Transfer
from common.networks import NETWORKS, TO_ONE, classifies
from common.shapes import CLASSES, draw_grey_shapes

import json
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers import SIDES, count, lessons, some_images, train
from PIL import Image
from test_checkpoints import SETTINGS, equal, trained, write_all

# One network of each lesson. VGG16 has half a gigabyte: mobilenet_v3_small stands for finetune.
OF_LESSON = {network.lesson: network for network in reversed(NETWORKS)} | {
    network.lesson: network for network in NETWORKS if network.choice == "mobilenet_v3_small"
}


@pytest.fixture
def cat(tmp_path):
    """A picture file, wider than high, with something on it."""
    path = tmp_path / "cat.png"
    pixels = np.random.RandomState(0).randint(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(path)
    return path


def answer(capsys, *arguments):
    predict.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(*arguments, expected=()):
    with pytest.raises(BadInput) as caught:
        predict.main([str(argument) for argument in arguments])
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) > 40, sentence
    for text in expected:
        assert str(text) in sentence, sentence
    count("predictions refused")
    return sentence


# The answer.


def test_checkpoints_of_both_sides_answer_alike(tmp_path, cat, capsys):
    paths = write_all(tmp_path)
    _, net = trained()
    with torch.no_grad():
        shares = net(predict.picture(cat, OF_LESSON["cifar"])).softmax(1)[0]
    said = {form: answer(capsys, path, cat) for form, path in paths.items()}
    assert said["plain"] == said["lightning"] and said["bare"] == said["parallel"]
    rows = re.findall(r"│ (\S.*?) +│ +(\S+)% │", said["plain"])
    best = shares.sort(descending=True)
    assert [name for name, _ in rows] == [SETTINGS["classes"][i] for i in best.indices[:5]]
    assert [share for _, share in rows] == [f"{100 * share:.1f}" for share in best.values[:5]]
    verdict = f"Most likely: {rows[0][0]}, {rows[0][1]}%. The network was trained on shapes.\n"
    assert said["plain"].endswith(verdict) and "cifar: cat.png" in said["plain"]
    # Without names the same numbers, and a sentence that says so.
    rows_without = re.findall(r"│ (\S.*?) +│ +(\S+)% │", said["bare"])
    assert [share for _, share in rows_without] == [share for _, share in rows]
    assert rows_without[0][0] == f"class {best.indices[0]}"
    assert "The names of the classes are unknown: " in said["bare"]
    assert "trained on" not in said["bare"] and "unknown" not in said["plain"]
    count("predictions of both sides compared", len(said))


@pytest.mark.parametrize("side", SIDES)
def test_weights_of_a_real_run(side, tmp_path, monkeypatch, capsys):
    """weights.pt knows no names: result.json beside it does."""
    run = train(side, tmp_path, monkeypatch, model=Net)
    capsys.readouterr()
    images = some_images()
    path = tmp_path / "one.png"
    Image.fromarray(images.images[7].permute(1, 2, 0).numpy()).save(path)
    inputs = Images(images.images, images.labels, TO_ONE).__getitems__([7])[0]
    weights = tmp_path / "cifar" / side / "weights.pt"
    net = Net()
    net.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        shares = net(inputs).softmax(1)[0]
    said = answer(capsys, weights, path)
    best = f"{images.classes[shares.argmax()]}, {shares.max():.1%}"
    best += f". The network was trained on {run['data']}."
    assert f"Most likely: {best}\n" in said and "unknown" not in said


@pytest.mark.parametrize("lesson", ["gan", "tokens"])
def test_a_network_that_names_no_class_is_refused(lesson, tmp_path, cat):
    checkpoints.save(tmp_path / "x.ckpt", {"state_dict": OF_LESSON[lesson].make().state_dict()})
    with pytest.raises(BadInput, match=f"is of the lesson {lesson}, whose network names no class"):
        predict.main([str(tmp_path / "x.ckpt"), str(cat)])
    count("networks that name no class")


@pytest.mark.parametrize("lesson", [name for name in OF_LESSON if classifies(name)])
def test_every_lesson(lesson, tmp_path, cat, capsys):
    torch.manual_seed(0)
    net = OF_LESSON[lesson].make().eval()
    settings = {"lesson": lesson, "data": "shapes", "classes": list(CLASSES)}
    checkpoints.save(
        tmp_path / "x.ckpt", {"state_dict": net.state_dict(), "hyper_parameters": settings}
    )
    said = answer(capsys, tmp_path / "x.ckpt", cat)
    assert f"{lesson}: cat.png" in said and len(OF_LESSON) == len(lessons()) >= 13
    with torch.no_grad():
        output = net(predict.picture(cat, OF_LESSON[lesson]))[0]
    # Some give log-probabilities, the others logits.
    shares = output.exp() if lesson in ("callbacks", "resume") else output.softmax(0)
    assert shares.sum().item() == pytest.approx(1)
    assert f"Most likely: {CLASSES[shares.argmax()]}, {shares.max():.1%}." in said


def test_dropout_and_batch_norm_are_off(tmp_path, cat, capsys):
    """MobileNet has both: with them on, one image alone could not even be normalised."""
    net = Transfer("mobilenet_v3_small")
    torch.save(net.state_dict(), tmp_path / "x.pt")
    assert answer(capsys, tmp_path / "x.pt", cat) == answer(capsys, tmp_path / "x.pt", cat)


# What is known of the training.


@pytest.mark.parametrize(
    "known",
    [
        {"classes": ["one"] * 9},
        {"classes": "abcdefghij"},
        {"classes": [1] * 10},
        {"classes": ["\x1b[31mred"] * 10, "data": "\x1b[31m"},
        {"classes": None},
        {"lesson": "fashion", "classes": list("abcdefghij")},
        {"lesson": torch.zeros(3), "classes": torch.zeros(10), "data": 3},
        ["a", "list"],
    ],
)
def test_names_that_cannot_be_right_are_not_used(known, tmp_path, cat, capsys):
    net = trained()[1]
    checkpoints.save(
        tmp_path / "x.ckpt", {"state_dict": net.state_dict(), "hyper_parameters": known}
    )
    said = answer(capsys, tmp_path / "x.ckpt", cat)
    assert "The names of the classes are unknown" in said and "class " in said
    assert "trained on" not in said and "\x1b" not in said
    count("wrong class names")


@pytest.mark.parametrize(
    "result",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"lesson": "cifar", "data": "shapes", "test_accuracy_per_class": 3}',
        b"\xff\xfe",
        {"lesson": "fashion"},  # of another run
    ],
)
def test_a_result_that_cannot_be_right_is_not_used(result, tmp_path, cat, capsys):
    path = tmp_path / "weights.pt"
    torch.save(trained()[1].state_dict(), path)
    good = {"lesson": "cifar", "data": "shapes"}
    good["test_accuracy_per_class"] = dict.fromkeys(CLASSES, 0.5)
    beside = tmp_path / "result.json"
    beside.write_text(json.dumps(good))
    assert "trained on shapes" in answer(capsys, path, cat)
    if isinstance(result, dict):
        result = json.dumps(good | result)
    beside.write_bytes(result if isinstance(result, bytes) else result.encode())
    assert "The names of the classes are unknown" in answer(capsys, path, cat)
    count("wrong class names")


def test_names_are_no_markup(tmp_path, cat, capsys):
    names = [f"[bold]{letter}[/nope]" for letter in "abcdefghij"]
    content = {"state_dict": trained()[1].state_dict(), "hyper_parameters": {"classes": names}}
    checkpoints.save(tmp_path / "x.ckpt", content)
    odd = cat.rename(tmp_path / "[red].png")
    said = answer(capsys, tmp_path / "x.ckpt", odd)
    assert said.count("[bold]") == 6 and "cifar: [red].png" in said


# Pictures.


def test_a_picture_of_the_data_set_is_seen_as_in_training(tmp_path):
    grey = Images(*draw_grey_shapes(20, seed=3))
    for lesson, images in (("cifar", some_images()), ("fashion", grey), ("finetune", None)):
        images, network = images or some_images(), OF_LESSON[lesson]
        seen = Images(images.images, images.labels, network.normalize)
        for number in range(20):
            pixels = images.images[number].permute(1, 2, 0).squeeze().numpy()
            Image.fromarray(pixels).save(tmp_path / "one.png")
            wanted = seen.__getitems__([number])[0]
            assert equal(predict.picture(tmp_path / "one.png", network), wanted)
            count("pictures seen as in training")


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (33, 500), (640, 480), (28, 28)])
@pytest.mark.parametrize("lesson", ["cifar", "fashion"])
def test_every_size(size, lesson, tmp_path):
    Image.new("RGB", size, (200, 200, 200)).save(tmp_path / "one.png")
    seen = predict.picture(tmp_path / "one.png", OF_LESSON[lesson])
    shape, grey = {"cifar": ((1, 3, 32, 32), 0.568627), "fashion": ((1, 1, 28, 28), 0.784314)}[
        lesson
    ]
    assert seen.shape == shape and seen.dtype == torch.float32
    assert torch.allclose(seen, torch.tensor(grey), atol=1e-5)


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA CMYK YCbCr LAB I;16".split())
@pytest.mark.parametrize("lesson", ["cifar", "fashion"])
def test_every_mode(mode, lesson, tmp_path):
    """Left half black, right half white, in every mode that PIL can keep in a file."""
    picture = Image.new("L", (64, 64))
    picture.paste(255, (32, 0, 64, 64))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    elif mode == "LAB":
        bands = picture, Image.new("L", picture.size, 128), Image.new("L", picture.size, 128)
        picture = Image.merge("LAB", bands)
    elif mode == "PA":
        picture = picture.convert("P").convert("PA")
    else:
        picture = picture.convert("RGB").convert(mode)
    assert picture.mode == mode
    path = tmp_path / "one"
    with path.open("wb") as file:
        try:
            picture.save(file, "PNG")
        except OSError:  # which does not know every mode
            picture.save(file, "TIFF")
    seen = predict.picture(path, OF_LESSON[lesson])
    middle = seen.shape[3] // 2
    low, high = {"cifar": (-1, 1), "fashion": (0, 1)}[lesson]
    assert (seen[..., : middle - 2] - low).abs().max() < 0.03
    assert (seen[..., middle + 2 :] - high).abs().max() < 0.03
    count("picture modes")


def test_sixteen_bits_keep_their_greys(tmp_path):
    pixels = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    seen = predict.picture(tmp_path / "one.png", OF_LESSON["fashion"])[0, 0]
    assert torch.equal(seen * 255, torch.from_numpy((pixels // 256).astype(np.float32)))


def test_what_is_transparent_is_white(tmp_path):
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 16, 32))
    picture.save(tmp_path / "one.png")
    seen = predict.picture(tmp_path / "one.png", OF_LESSON["cifar"])[0]
    assert seen[:, 5, 5].tolist() == [1, -1, -1] and seen[:, 5, 25].tolist() == [1, 1, 1]


def test_a_photo_is_turned_as_the_camera_says(tmp_path):
    picture = Image.new("L", (32, 32))
    picture.paste(255, (0, 0, 32, 16))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # taken with the camera upside down
    picture.save(tmp_path / "one.png", exif=exif)
    seen = predict.picture(tmp_path / "one.png", OF_LESSON["cifar"])[0, 0]
    assert (seen[:15] == -1).all() and (seen[17:] == 1).all()


def test_what_the_camera_wrote_wrongly_is_not_complained_of(tmp_path, cat, recwarn):
    Image.open(cat).save(tmp_path / "one.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with Image.open(tmp_path / "one.jpg") as picture:
        picture.getexif()
    assert "Corrupt EXIF data" in str(recwarn.pop().message)
    predict.picture(tmp_path / "one.jpg", OF_LESSON["cifar"])
    assert not recwarn.list


def test_the_middle_square_is_what_counts(tmp_path):
    picture = Image.new("L", (96, 32))
    picture.paste(255, (32, 0, 64, 32))
    picture.save(tmp_path / "one.png")
    assert (predict.picture(tmp_path / "one.png", OF_LESSON["cifar"]) == 1).all()


def test_shrinking_averages(tmp_path):
    """Every second column white: taken without averaging, the picture would be black or white."""
    pixels = np.zeros((320, 320), np.uint8)
    pixels[:, ::2] = 255
    Image.fromarray(pixels).save(tmp_path / "one.png")
    seen = predict.picture(tmp_path / "one.png", OF_LESSON["cifar"])
    assert seen.abs().max() < 0.1


# What is refused.


def huge_png(side):
    """A PNG of few bytes that says that it is `side` pixels wide and high."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts
    )


def test_pictures_that_are_refused(tmp_path, cat, recwarn):
    path = tmp_path / "weights.pt"
    torch.save(trained()[1].state_dict(), path)
    bad = tmp_path / "bad.png"
    expected = ["cannot be read (No such file or directory)"]
    refused(path, bad, expected=[f"the picture '{bad}'", *expected])
    refused(path, tmp_path, expected=["cannot be read (Is a directory)"])
    whole = cat.read_bytes()
    for content, text in {
        b"": "is no picture; name a file",
        b"cat, dog\n": "is no picture; name a file",
        path.read_bytes(): "is no picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n": "is no picture",
        whole[: len(whole) // 2]: "is cut short or damaged",
        whole[:10]: "is no picture",
        huge_png(10_000): "has more than 89 million pixels",
        huge_png(30_000): "has more than 89 million pixels",
        huge_png(50): "is cut short or damaged",
    }.items():
        bad.write_bytes(content)
        refused(path, bad, expected=[f"the picture '{bad}' {text}"])
    Image.fromarray(np.zeros((9, 9), np.float32)).save(bad, "TIFF")
    refused(path, bad, expected=["has 32 bits for each pixel; save it as PNG"])
    for format_ in ("JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        Image.open(cat).save(bad, format_)
        assert predict.picture(bad, OF_LESSON["cifar"]).shape == (1, 3, 32, 32)
        whole = bad.read_bytes()
        for part in (0.2, 0.6, 0.9):
            bad.write_bytes(whole[: int(part * len(whole))])
            refused(path, bad)
    assert not recwarn.list


def test_checkpoints_that_are_refused(tmp_path, cat):
    path = tmp_path / "x.ckpt"
    refused(path, cat, expected=[f"the checkpoint '{path}' cannot be read (No such file"])
    refused(cat, cat, expected=["cat.png' is not a checkpoint at all"])
    state = Net().state_dict()
    state["conv1.weight"] = torch.zeros(6, 1, 5, 5)
    torch.save(state, path)
    refused(path, cat, expected=["fit no network of the lessons", "'conv1.weight'"])
    state = {name: tensor.half() for name, tensor in Net().state_dict().items()}
    torch.save(state, path)
    refused(path, cat, expected=["does not fit Net: 10 of another shape or type"])
    state = Net().state_dict()
    state["fc3.bias"] *= float("nan")
    torch.save(state, path)
    refused(path, cat, expected=["its training failed; train it again with a smaller --lr"])


@pytest.mark.parametrize("arguments", [["", ""], ["weights.pt", ""], ["", "cat.png"], [], ["a"]])
def test_files_that_were_not_named(arguments, capsys):
    """As make hands them on where CHECKPOINT or IMAGE was forgotten."""
    with pytest.raises(SystemExit) as exit_, clear_messages():
        predict.main(arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    if len(arguments) == 2:
        missing = "checkpoint" if not arguments[0] else "image"
        assert f"no {missing} was named" in said and "CHECKPOINT=runs/" in said


@pytest.mark.slow
def test_from_the_shell(tmp_path, cat):
    checkpoints.save(tmp_path / "x.ckpt", {"state_dict": trained()[1].state_dict()})
    command = [sys.executable, "-m", "common.predict", str(tmp_path / "x.ckpt"), str(cat)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == "" and "Most likely: class" in ended.stdout
