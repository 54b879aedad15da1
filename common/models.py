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
