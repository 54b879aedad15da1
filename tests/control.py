"""What a negative control of the doctor is: one change to one side, and what must be said of it."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Control:
    """A change, the stage at which it must be found, and how the first cause must begin."""

    side: str
    stage: str
    cause: str
    changes: tuple[tuple[str, str], ...] = ()  # of the lesson's text
    model: type[nn.Module] | None = None  # another network on that side
    own: dict[str, Any] = field(default_factory=dict)  # settings of that side alone
    settings: dict[str, Any] = field(default_factory=dict)  # of both


def replaced(side: str, stage: str, cause: str, old: str, new: str, **settings) -> Control:
    return Control(side, stage, cause, ((old, new),), settings=settings)
