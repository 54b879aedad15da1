"""Recognize a loss by its gradient at the output: which function, which targets, which weights.

The output z and the gradient g of the loss with respect to it are all that a trace has of a loss.
For the usual functions that is enough: cross entropy gives softmax(z) - target, and so on.
"""

from dataclasses import dataclass

import numpy as np

WITHIN = 2e-3  # of the largest gradient: how exactly a formula must fit

Rows = np.ndarray  # [rows, columns]: a row is a sample, a token or a pixel


@dataclass(frozen=True)
class Loss:
    """A loss that was recognized.

    `labels` are the class of each row, or 0 and 1 of each value, -1 where a row does not count;
    `scales` what each row, or each value, is multiplied by: 1 / n where a loss is a mean of n.
    """

    name: str
    labels: np.ndarray
    scales: np.ndarray
    smoothing: float = 0.0


def recognize(z: Rows, g: Rows) -> Loss | None:
    """Return the loss that gives the gradients g at the outputs z, None where none is known."""
    if z.shape != g.shape or not g.size or not np.isfinite(z).all() or not np.isfinite(g).all():
        return None
    if not g.any():
        return None
    if z.shape[1] > 1:
        for attempt in (_cross_entropy, _smoothed, _nll):
            if found := attempt(z, g):
                return found
    return _bce(z, g) or _absolute(z, g)


def softmax(z: Rows) -> Rows:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _cross_entropy(z: Rows, g: Rows) -> Loss | None:
    """g = scale * (softmax(z) - one-hot), with a scale for each row."""
    p, labels = softmax(z), g.argmin(1)
    counts = g.any(1)
    pull = p.copy()
    pull[np.arange(len(z)), labels] -= 1
    scales = (g * pull).sum(1) / np.maximum((pull * pull).sum(1), 1e-30)
    off = np.abs(g - scales[:, None] * pull)[counts]
    if (scales[counts] <= 0).any() or off.max() > WITHIN * np.abs(g).max():
        return None
    if z.shape[1] == 2:  # of two values that add up to 0, any is a multiple of the formula
        for label in (0, 1):
            alike = scales[counts & (labels == label)]
            if len(alike) and np.ptp(alike) > WITHIN * alike.max():
                return None
    return Loss("cross entropy", np.where(counts, labels, -1), np.where(counts, scales, 0))


def _smoothed(z: Rows, g: Rows) -> Loss | None:
    """g = scale * (softmax(z) - (1 - e) * one-hot - e / classes), with one scale for all rows."""
    p, counts = softmax(z), g.any(1)
    labels = g.argmin(1)
    others = np.ones(g.shape, bool)
    others[np.arange(len(z)), labels] = False
    others[~counts] = False
    x, y = p[others], g[others]
    if len(x) < 4 or np.ptp(x) == 0:
        return None
    scale, offset = np.polyfit(x, y, 1)
    if scale <= 0:
        return None
    smoothing = -offset * z.shape[1] / scale
    target = np.full(g.shape, smoothing / z.shape[1])
    target[np.arange(len(z)), labels] += 1 - smoothing
    off = np.abs(g - scale * (p - target))[counts]
    if not 1e-3 < smoothing < 1 or off.max() > WITHIN * np.abs(g).max():
        return None
    scales = np.where(counts, scale, 0)
    return Loss("cross entropy", np.where(counts, labels, -1), scales, round(float(smoothing), 4))


def _nll(z: Rows, g: Rows) -> Loss | None:
    """Log probabilities, of which one in each row counts: g = -scale * one-hot."""
    counts = g.any(1)
    if (np.count_nonzero(g[counts], axis=1) != 1).any() or (g > 0).any():
        return None
    if np.abs(np.log(np.exp(z).sum(1))).max() > 1e-3:
        return None
    return Loss("negative log-likelihood", np.where(counts, g.argmin(1), -1), -g.sum(1))


def _bce(z: Rows, g: Rows) -> Loss | None:
    """g = scale * (sigmoid(z) - target), the target 0 or 1; or its like for probabilities."""
    one = g < 0
    for name, positive, negative in (
        ("binary cross entropy of logits", 1 - _sigmoid(z), _sigmoid(z)),
        ("binary cross entropy of probabilities", 1 / np.maximum(z, 1e-12),
         1 / np.maximum(1 - z, 1e-12)),
    ):  # fmt: skip
        if "prob" in name and (z.min() < 0 or z.max() > 1):
            continue
        unit = np.where(one, positive, negative)
        scales = np.abs(g) / np.maximum(unit, 1e-12)
        kinds = [scales[one], scales[~one & (g != 0)]]
        # Each class may have a weight of its own, where there are samples enough to tell.
        columns = [scales[:, n][kind[:, n]] for n in range(g.shape[1])
                   for kind in (one, ~one & (g != 0))]  # fmt: skip
        is_one = [all(not len(k) or np.ptp(k) <= WITHIN * k.max() for k in groups)
                  for groups in (kinds, columns)]  # fmt: skip
        if (is_one[0] or (is_one[1] and len(z) > 7)) and g.size > 3:
            return Loss(name, np.where(g == 0, -1, one), scales)
    return None


def _sigmoid(z: Rows) -> Rows:
    return 1 / (1 + np.exp(-np.clip(z, -50, 50)))


def _absolute(z: Rows, g: Rows) -> Loss | None:
    """All gradients of one magnitude: the sign of the error."""
    size = np.abs(g[g != 0])
    if len(size) < 4 or np.ptp(size) > 1e-6 * size.max():
        return None
    return Loss("mean absolute error", np.zeros(len(z)), np.full(len(z), size.max()))


def is_softmax_twice(z: Rows, g: Rows, labels: np.ndarray) -> bool:
    """Tell whether g is the gradient of a cross entropy of softmax(z)."""
    if labels.shape != (len(z),) or z.shape[1] < 2:
        return False
    p = softmax(z)
    inner = softmax(p)
    counts = labels >= 0
    inner[np.arange(len(z))[counts], labels[counts].astype(int)] -= 1
    inner[~counts] = 0
    return _proportional(p * (inner - (p * inner).sum(1, keepdims=True)), g)


def is_likelihood_of_probabilities(z: Rows, g: Rows, labels: np.ndarray) -> bool:
    """Tell whether g is that of nll_loss(softmax(z)): probabilities without their logarithm."""
    if labels.shape != (len(z),) or z.shape[1] < 2 or (labels < 0).any():
        return False
    p = softmax(z)
    target = np.zeros(z.shape)
    target[np.arange(len(z)), labels.astype(int)] = 1
    return _proportional(-p * (target - (p * target).sum(1, keepdims=True)), g)


def is_sigmoid_twice(z: Rows, g: Rows, labels: np.ndarray) -> bool:
    """Tell whether g is the gradient of a binary cross entropy whose logits are sigmoid(z)."""
    if labels.shape != z.shape:
        return False
    p = _sigmoid(z)
    return _proportional((_sigmoid(p) - labels) * p * (1 - p), g)


def _proportional(x: np.ndarray, y: np.ndarray) -> bool:
    scale = float((x * y).sum() / max((x * x).sum(), 1e-300))
    return scale > 0 and bool(np.abs(y - scale * x).max() <= WITHIN * np.abs(y).max())


def is_broadcast(z: Rows, g: Rows, other: Rows) -> bool:
    """Tell whether g looks as if each sample had all samples' targets, and `other` does not.

    Where (n, 1) meets (n), the loss has n * n terms: the gradient of a sample no longer depends on
    its own target, only on its output, and grows with it.
    """
    z, g, other = z.ravel(), g.ravel(), other.ravel()
    if len(z) < 6 or np.ptp(z) == 0 or np.ptp(g) == 0:
        return False
    order = np.argsort(z, kind="stable")
    slack = 1e-6 * np.abs(g).max()
    return bool((np.diff(g[order]) >= -slack).all() and (np.diff(other[order]) < -slack).any())


def clamped(g: Rows, h: Rows) -> float | None:
    """Return the largest |g| where g is a factor times h, cut off there; None where it is not.

    The Huber loss and smooth L1 have such a gradient where the squared error has h.
    """
    size, other = np.abs(g).ravel(), np.abs(h).ravel()
    limit = size.max()
    cut = size > limit * (1 - 1e-5)
    inside = ~cut & (other > 0)
    if cut.sum() < 2 or inside.sum() < 2 or not np.array_equal(np.sign(g), np.sign(h)):
        return None
    factors = size[inside] / other[inside]
    if np.ptp(factors) > WITHIN * factors.max():
        return None
    is_beyond = (factors.mean() * other[cut] > limit * (1 - WITHIN)).all()
    return float(limit) if is_beyond and np.ptp(other[cut]) > WITHIN * other.max() else None


def is_sign(g: Rows, h: Rows) -> bool:
    """Tell whether g has one magnitude and the signs of h, whose magnitudes differ."""
    size = np.abs(g[g != 0])
    is_one = len(size) > 3 and np.ptp(size) <= 1e-5 * size.max()
    is_other = np.ptp(np.abs(h)) > WITHIN * np.abs(h).max()
    return bool(is_one and is_other and np.array_equal(np.sign(g), np.sign(h)))


def focal(z: Rows, loss: Loss) -> float:
    """Return the gamma of a focal loss; 0 where it is none (Lin et al., arXiv 1708.02002).

    Its gradient is that of the cross entropy, times (1 - p) ** gamma - gamma * (1 - p) ** (gamma -
    1) * p * log(p) for each row, where p is the probability of the label.
    """
    counts = loss.labels >= 0
    if loss.name != "cross entropy" or counts.sum() < 4:
        return 0.0
    p = softmax(z)[counts, loss.labels[counts].astype(int)]
    scales = loss.scales[counts]
    for gamma in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0):
        wanted = (1 - p) ** gamma - gamma * (1 - p) ** (gamma - 1) * p * np.log(p)
        ratio = scales / wanted
        if np.ptp(wanted) > 0.05 * wanted.max() and np.ptp(ratio) <= 1e-2 * ratio.max():
            return gamma
    return 0.0


def temperature(z: Rows, g: Rows, labels: np.ndarray) -> float | None:
    """Return T where g is the gradient of a cross entropy of z / T, with T other than 1.

    Of the classes that are not the label, the logarithms of g differ as z / T does.
    """
    if labels.shape != (len(z),) or (labels < 0).any() or z.shape[1] < 3:
        return None
    others = np.ones(z.shape, bool)
    others[np.arange(len(z)), labels.astype(int)] = False
    x = z[others].reshape(len(z), -1)
    y = g[others].reshape(len(z), -1)
    if (y <= 0).any():
        return None
    x, y = x - x.mean(1, keepdims=True), np.log(y)
    y -= y.mean(1, keepdims=True)
    slope = float((x * y).sum() / max((x * x).sum(), 1e-300))
    if slope <= 0 or abs(slope - 1) < 1e-2 or np.abs(y - slope * x).max() > 1e-2 * np.abs(y).max():
        return None
    return 1 / slope


def row_factors(ours: Rows, theirs: Rows) -> np.ndarray | None:
    """Return f [rows] where each row of the second is f times that of the first; None if not.

    A row that is 0 in the first and not in the second has an infinite factor; where both are 0, it
    is 1. A row with one value alone is always a multiple of another, and tells nothing.
    """
    if (np.count_nonzero(ours, axis=1) == 1).any() or (np.count_nonzero(theirs, axis=1) == 1).any():
        return None
    square = (ours * ours).sum(1)
    factors = (ours * theirs).sum(1) / np.where(square > 0, square, 1)
    off = np.abs(theirs - factors[:, None] * ours).max(1)
    size = np.abs(theirs).max(1)
    fits = (off <= WITHIN * size) | (square == 0)
    if not fits.all():
        return None
    return np.where(square > 0, factors, np.where(size > 0, np.inf, 1.0))
