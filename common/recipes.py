"""What each lesson trains. Both sides of a pair read the same recipe."""

from common.models import MLP, DeepNet, DropoutNet, Net, NormNet, Transfer

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One lesson's training, in full.

    The command line can replace optimizer, lr, batch_size, max_epochs and seed. `lr` is the
    learning rate, `batch_size` the number of images in one batch over all devices
    together, `momentum` belongs to SGD alone, `seed` draws the validation set, the initial weights
    and the order of the batches. `pixels` names an entry of `common.data.PIXELS`. `defaults` are
    those of other options that this lesson changes.
    """

    lesson: str
    data: str
    pixels: str
    model: type[nn.Module]
    optimizer: str
    lr: float
    momentum: float
    batch_size: int
    max_epochs: int
    seed: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)


def option(default: Any, text: str, **rule: Any) -> Any:
    """Make a recipe's field an option of its lesson's command line.

    `rule` is choices=(...), or at_least=number and perhaps at_most=number, or metavar="..." and
    perhaps pattern="..." for a text; a bool needs none. With same_result=True, two runs that differ
    in this option alone must end with the same numbers.
    """
    return field(default=default, metadata={"help": text, **rule})


@dataclass(frozen=True, kw_only=True)
class FashionRecipe(Recipe):
    one_hot: bool = option(False, "train on one-hot targets, made by a target_transform")


@dataclass(frozen=True, kw_only=True)
class CallbacksRecipe(Recipe):
    patience: int = option(3, "epochs without improvement after which it stops", at_least=1)
    min_delta: float = option(0.0, "what counts as improvement: more than this", at_least=0.0)
    logger: str = option(
        "csv", "where the values and pictures go", choices=("csv", "tensorboard", "wandb")
    )


@dataclass(frozen=True, kw_only=True)
class ResumeRecipe(Recipe):
    min_delta: float = 0.0
    patience: int = option(3, "epochs without improvement after which it stops", at_least=1)
    checkpoint_every_n_steps: int = option(
        500, "steps from one checkpoint within an epoch to the next", at_least=1, same_result=True
    )
    ckpt_path: str = option(
        "",
        "the checkpoint to carry on from: the last one, the best one, or a file of either side",
        metavar="last|best|FILE",
        same_result=True,
    )
    precision: str = option(
        "32-true", "16-mixed needs CUDA", choices=("32-true", "bf16-mixed", "16-mixed")
    )
    max_time: str = option(
        "",
        "save and end after this time, such as 00:01:30:00 for an hour and a half",
        metavar="DD:HH:MM:SS",
        pattern="([0-9]{2}:[0-9]{2}:[0-9]{2}:[0-9]{2})?",
        same_result=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizeRecipe(Recipe):
    schedule: str = option(
        "cosine",
        "of the learning rate: cosine after a warm-up, OneCycle, or a tenth where the validation "
        "loss stays on a plateau",
        choices=("none", "cosine", "onecycle", "plateau"),
    )
    interval: str = option(
        "step",
        "how often the schedule moves on; plateau does so after each validation",
        choices=("step", "epoch"),
    )
    accumulate_grad_batches: int = option(
        2, "batches whose gradients add up to one optimizer step", at_least=1
    )
    exact_accumulation: bool = option(
        False,
        "let each image of a group of batches count the same, also where the last group is "
        "incomplete; the Trainer does not",
    )
    gradient_clip_val: float = option(1.5, "what gradients are clipped to; 0: not", at_least=0.0)
    gradient_clip_algorithm: str = option(
        "norm", "clip the norm of all gradients, or the value of each", choices=("norm", "value")
    )
    precision: str = option(
        "32-true", "16-mixed needs CUDA", choices=("32-true", "bf16-mixed", "16-mixed")
    )
    weight_decay: float = option(5e-4, "of weights, not of biases and norms", at_least=0.0)
    label_smoothing: float = option(
        0.1, "share of a label that is spread over all classes", at_least=0.0, at_most=1.0
    )
    ema_decay: float = option(
        0.99, "of the moving average of the weights; 0: none", at_least=0.0, at_most=1.0
    )

    @property
    def moves_on(self) -> str:
        """When the schedule moves on: never, or after each step, epoch or validation."""
        return {"none": "never", "plateau": "validation"}.get(self.schedule, self.interval)


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe(Recipe):
    strategy: str = option(
        "ddp",
        "ddp: one process for each device, with all weights; fsdp: with its share of them; dp: one "
        "process for all GPUs (DataParallel), which the Trainer has no more",
        choices=("ddp", "fsdp", "dp"),
    )
    num_nodes: int = option(1, "machines; type the same command on each", at_least=1)
    rdzv_endpoint: str = option(
        "",
        "where the machines meet: the first one's name or address, and a free port",
        metavar="HOST:PORT",
        pattern=r"([^:\s]+:[0-9]{1,5})?",
        same_result=True,
    )
    max_restarts: int = option(
        0,
        "how often all processes are started again, from the last checkpoint, when one ends",
        at_least=0,
        same_result=True,
    )
    timeout: int = option(
        300, "seconds for which processes wait for each other", at_least=1, same_result=True
    )
    ckpt_path: str = option(
        "",
        "the checkpoint to carry on from: the last one, or a file of the same side, also if other "
        "devices wrote it",
        metavar="last|FILE",
        same_result=True,
    )
    accumulate_grad_batches: int = option(
        1, "batches whose gradients add up to one optimizer step", at_least=1
    )
    batch_norm: bool = option(False, "train the network of the lesson optimize, with BatchNorm")
    sync_batchnorm: bool = option(
        False, "let BatchNorm average over all devices; only GPUs can do that"
    )
    precision: str = option(
        "32-true",
        "64-true: with double precision, where rounding is 500 million times smaller",
        choices=("32-true", "64-true"),
    )

    def __post_init__(self) -> None:
        if self.batch_norm:
            object.__setattr__(self, "model", NormNet)


@dataclass(frozen=True, kw_only=True)
class SpeedRecipe(Recipe):
    network: str = option(
        "net", "net: the tutorial's; small: for a processor; airbench: for a GPU",
        choices=("net", "small", "airbench"),
    )  # fmt: skip
    weight_decay: float = option(0.0, "pulls all parameters towards 0", at_least=0.0)
    label_smoothing: float = option(
        0.0, "of the training's targets; validation and test have none", at_least=0.0, at_most=1.0
    )
    flip: str = option(
        "none",
        "mirrored images: random, or in each epoch those that were not in the one before",
        choices=("none", "random", "alternate"),
    )
    translate: int = option(0, "pixels by which an image is moved, at most", at_least=0)
    channels_last: bool = option(True, "keep a pixel's channels next to each other in memory")
    precision: str = option(
        "32-true", "bf16-mixed: bfloat16 under autocast", choices=("32-true", "bf16-mixed")
    )
    freeze_at: float = option(
        0.5, "share of the steps after which the first layer rests", at_least=0.0, at_most=1.0
    )
    tta: bool = option(False, "test each image six times, mirrored and moved by a pixel")
    compile: bool = option(False, "compile the network (torch.compile), which takes a while")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    backbone: str = option(
        "vgg16",
        "torchvision's network; the other two take a tenth of the time",
        choices=("vgg16", "resnet18", "mobilenet_v3_small"),
    )
    weights: str = option(
        "auto",
        "imagenet: the pretrained ones or an error; random: train from nothing; auto: imagenet "
        "if they are here or can be downloaded, else random",
        choices=("auto", "imagenet", "random"),
    )
    unfreeze_at_epoch: int = option(
        1, "the first epoch, counted from 0, in which the backbone is trained too", at_least=0
    )
    start_from: str = option(
        "", "a checkpoint or weights.pt of either side to start from", metavar="FILE"
    )


RECIPES: dict[str, Any] = {
    # https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
    "cifar": Recipe(
        lesson="cifar",
        data="cifar10",
        pixels="signed",
        model=Net,
        optimizer="sgd",
        lr=1e-3,
        momentum=0.9,
        batch_size=4,
        max_epochs=2,
        defaults={"log_every_n_steps": 2000},
    ),
    # https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html
    "fashion": FashionRecipe(
        lesson="fashion",
        data="fashionmnist",
        pixels="unit",
        model=MLP,
        optimizer="sgd",
        lr=1e-3,
        momentum=0.0,
        batch_size=64,
        max_epochs=5,
        defaults={"log_every_n_steps": 100},
    ),
    # https://wandb.ai/site/articles/image-classification-using-pytorch-lightning
    "callbacks": CallbacksRecipe(
        lesson="callbacks",
        data="cifar10",
        pixels="signed",
        model=DeepNet,
        optimizer="adam",
        lr=2e-4,
        momentum=0.9,
        batch_size=32,
        max_epochs=50,
    ),
    # Dropout draws random numbers in every step, and the learning rate follows a cosine down to 0.
    "resume": ResumeRecipe(
        lesson="resume",
        data="cifar10",
        pixels="signed",
        model=DropoutNet,
        optimizer="sgd",
        lr=1e-2,
        momentum=0.9,
        batch_size=32,
        max_epochs=5,
    ),
    # Everything on at once, but for mixed precision, which most processors make slower.
    "optimize": OptimizeRecipe(
        lesson="optimize",
        data="cifar10",
        pixels="signed",
        model=NormNet,
        optimizer="sgd",
        lr=0.05,
        momentum=0.9,
        batch_size=32,
        max_epochs=5,
    ),
    # No dropout and no BatchNorm: then several processes compute what one does, but for rounding.
    "parallel": ParallelRecipe(
        lesson="parallel",
        data="cifar10",
        pixels="signed",
        model=Net,
        optimizer="sgd",
        lr=1e-2,
        momentum=0.9,
        batch_size=32,
        max_epochs=2,
        defaults={"devices": 2},
    ),
    # 190 batches are some half of the training images, each seen once.
    "speed": SpeedRecipe(
        lesson="speed",
        data="cifar10",
        pixels="standard",
        model=Net,
        optimizer="muon",
        lr=0.05,
        momentum=0.9,
        batch_size=128,
        max_epochs=1,
        defaults={"limit_train_batches": 190, "log_every_n_steps": 50, "threads": 1},
    ),
    # The backbone's learning rate is a tenth of `lr`, which is that of the new layer. A few images
    # are what one fine-tunes with, and what a processor manages with VGG16.
    "finetune": FinetuneRecipe(
        lesson="finetune",
        data="cifar10",
        pixels="imagenet",
        model=Transfer,
        optimizer="sgd",
        lr=1e-2,
        momentum=0.9,
        batch_size=32,
        max_epochs=2,
        defaults={
            "limit_train_batches": 50,
            "limit_val_batches": 1,
            "limit_test_batches": 2,
            "log_every_n_steps": 10,
        },
    ),
}
