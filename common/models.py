"""The networks that the lessons train: nn.Modules, no training code."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """The CNN of PyTorch's tutorial "Training a Classifier": 62,006 parameters.

    Source: https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 3, 32, 32], into logits, float [batch, 10]."""
        x = self.pool(F.relu(self.conv1(x)))  # [batch, 6, 14, 14]
        x = self.pool(F.relu(self.conv2(x)))  # [batch, 16, 5, 5]
        x = torch.flatten(x, 1)  # all dimensions but the batch: [batch, 400]
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class DropoutNet(Net):
    """`Net` with dropout before its last layer, and log-probabilities for its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.set_submodule("fc3", nn.Sequential(nn.Dropout(0.25), self.fc3, nn.LogSoftmax(1)))


class NormNet(Net):
    """`Net` with BatchNorm after its convolutions: 62,050 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.set_submodule("conv1", nn.Sequential(self.conv1, nn.BatchNorm2d(6)))
        self.set_submodule("conv2", nn.Sequential(self.conv2, nn.BatchNorm2d(16)))


class MLP(nn.Module):
    """The three-layer network of PyTorch's quickstart tutorial: 669,706 parameters.

    Source: https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            # No ReLU here: it would make every negative logit 0, and a class whose logit is never
            # positive gets no gradient. An early version of the tutorial had one.
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 1, 28, 28], into logits, float [batch, 10]."""
        return self.layers(x)


class DeepNet(nn.Module):
    """The deeper CNN of the Weights & Biases tutorial for Lightning: 952,234 parameters.

    Source: https://wandb.ai/site/articles/image-classification-using-pytorch-lightning
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.conv2 = nn.Conv2d(32, 32, 3)
        self.conv3 = nn.Conv2d(32, 64, 3)
        self.conv4 = nn.Conv2d(64, 64, 3)
        self.pool = nn.MaxPool2d(2)
        # The flattened size is found by trying it out, and not worked out by hand. On zeros: random
        # numbers here would change the initial weights of all layers below.
        with torch.no_grad():
            flattened = self._features(torch.zeros(1, 3, 32, 32)).shape[1]
        self.fc1 = nn.Linear(flattened, 512)
        self.fc2 = nn.Linear(512, 128)
        self.fc3 = nn.Linear(128, 10)

    def _features(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))  # [batch, 32, 30, 30]
        x = self.pool(F.relu(self.conv2(x)))  # [batch, 32, 14, 14]
        x = F.relu(self.conv3(x))  # [batch, 64, 12, 12]
        x = self.pool(F.relu(self.conv4(x)))  # [batch, 64, 5, 5]
        return torch.flatten(x, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 3, 32, 32], into log-probabilities, float [batch, 10]."""
        x = F.relu(self.fc1(self._features(x)))
        x = F.relu(self.fc2(x))
        return F.log_softmax(self.fc3(x), dim=1)


class GAN(nn.Module):
    """A generator of images and a discriminator, after DCGAN, with a quarter of its channels.

    Two networks that train against each other: the one makes images of random numbers, the other
    tells them from real ones. Source: https://arxiv.org/abs/1511.06434
    """

    def __init__(self, latent: int = 64) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(latent, 128, 4, 1, 0, bias=False),  # [batch, 128, 4, 4]
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False),  # [batch, 64, 8, 8]
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),  # [batch, 32, 16, 16]
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),  # [batch, 3, 32, 32]
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1),  # [batch, 32, 16, 16]
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, 2, 1, bias=False),  # [batch, 64, 8, 8]
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False),  # [batch, 128, 4, 4]
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, 1, 4),  # [batch, 1, 1, 1]
            nn.Flatten(0),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Turn random numbers, [batch, latent], into images from -1 to 1, [batch, 3, 32, 32]."""
        return self.generator(noise[:, :, None, None])


class Transfer(nn.Module):
    """A network of torchvision's, the backbone, with a new last layer, the head, for ten classes.

    With VGG16: 134,301,514 parameters, of which 40,970 in the head.
    """

    def __init__(self, backbone: str = "vgg16") -> None:
        from torchvision import models  # takes seconds, and no other network needs it

        super().__init__()
        self.backbone = models.get_model(backbone, weights=None)
        # The last layer is a Linear in all of them, under another name in each.
        linear = [(n, m) for n, m in self.backbone.named_modules() if isinstance(m, nn.Linear)]
        self.last_name, last = linear[-1]
        self.backbone.set_submodule(self.last_name, nn.Identity())
        self.head = nn.Linear(last.in_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 3, 32, 32] or larger, into logits, float [batch, 10]."""
        return self.head(self.backbone(x))


class Convolve(nn.Sequential):
    """Convolution, pooling if asked for, BatchNorm, and what makes it nonlinear."""

    def __init__(self, inputs: int, outputs: int, act: nn.Module, pool: bool = True) -> None:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        # Before BatchNorm and ReLU, which then have a quarter of the work.
        layers += [nn.MaxPool2d(2)] if pool else []
        super().__init__(*layers, nn.BatchNorm2d(outputs), act)


class SmallNet(nn.Module):
    """A network for a processor: 136,288 parameters, and a first layer that halves the image."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = 16, 32, 64, 128
        stem = nn.Conv2d(3, a, 4, stride=2, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(a), nn.ReLU())
        self.down = nn.Sequential(Convolve(a, b, nn.ReLU()), Convolve(b, c, nn.ReLU()))
        self.residual = Convolve(c, c, nn.ReLU(), pool=False)
        self.last = Convolve(c, d, nn.ReLU())
        self.head = nn.Linear(d, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 3, 32, 32], into logits, float [batch, 10]."""
        x = self.down(self.stem(x))  # [batch, c, 4, 4]
        x = self.last(x + self.residual(x))  # [batch, d, 2, 2]
        return self.head(x.amax((2, 3)) / 2)


class Airbench(nn.Module):
    """The network of Keller Jordan's airbench94, which reaches 94 % on CIFAR-10 within seconds.

    Source: https://arxiv.org/abs/2404.00498, section 3. `whiten` gives its first layer, which is
    not trained but for its bias, the principal components of the images' patches of 2 by 2 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 256, 256)
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad_(False)
        blocks: list[nn.Module] = []
        for inputs, outputs in zip((24, *widths), widths, strict=False):
            blocks += [Convolve(inputs, outputs, nn.GELU()),
                       Convolve(outputs, outputs, nn.GELU(), pool=False)]  # fmt: skip
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 10, bias=False)
        for block in blocks:
            convolution, norm = block[0], block[-2]  # type: ignore[index]
            # Each begins by handing its first channels on as they are.
            nn.init.dirac_(convolution.weight[: convolution.in_channels])
            norm.momentum = 0.4  # of few steps, the last ones count
            norm.weight.requires_grad_(False)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer by some images, float [count, 3, height, width], normalized."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 3, 32, 32], into logits, float [batch, 10]."""
        x = self.blocks(F.gelu(self.whitening(x)))  # [batch, widths[-1], 3, 3]
        return self.head(F.max_pool2d(x, 3).flatten(1)) / 9


# What the lesson speed can train.
NETWORKS: dict[str, type[nn.Module]] = {"net": Net, "small": SmallNet, "airbench": Airbench}


class Averaged(nn.Module):
    """The mean of a network's answers for an image, mirrored and not, moved by a pixel and not."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Turn images, float [batch, 3, height, width], into logits, float [batch, 10]."""
        padded = F.pad(x, (1, 1, 1, 1), "reflect")
        moved = [padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
        both = [(self.net(image) + self.net(image.flip(3))) / 2 for image in (x, *moved)]
        return both[0] / 2 + (both[1] + both[2]) / 4
