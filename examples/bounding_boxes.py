"""Box regression as in Fast R-CNN: SmoothL1 with beta 1/9 over the positive proposals, divided by how many there are.

A detector proposes regions; those that overlap an object enough are positive, and for them it predicts how to move and
stretch the region onto the object. Run it beside a server: `lossgrad-server &`, then `python examples/bounding_boxes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import lossgrad

IMAGES, PROPOSALS = 40, 128
POSITIVE_OVERLAP = 0.5
# How much an error in x, y, width and height counts; a detector's configuration has such numbers.
WEIGHTS = np.array([1.0, 1.0, 0.5, 0.5], np.float32)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Image:
    """An image's proposals: predicted and true (dx, dy, dw, dh), which are positive, and how large their objects are."""

    predicted: Array  # [PROPOSALS, 4], float32
    target: Array
    is_positive: Array  # [PROPOSALS], bool
    size: list[str]  # "small", "medium" or "large", one for each proposal


def offsets(proposal: Array, box: Array) -> Array:
    """Return what moves and stretches proposals onto boxes; both are [n, 4]: centre x and y, width, height."""
    moved = (box[:, :2] - proposal[:, :2]) / proposal[:, 2:]
    return np.concatenate([moved, np.log(box[:, 2:] / proposal[:, 2:])], axis=1).astype(np.float32)


def overlap(first: Array, second: Array) -> Array:
    """Return the intersection over union of boxes, pair by pair."""
    near = np.maximum(first[:, :2] - first[:, 2:] / 2, second[:, :2] - second[:, 2:] / 2)
    far = np.minimum(first[:, :2] + first[:, 2:] / 2, second[:, :2] + second[:, 2:] / 2)
    common = np.prod(np.clip(far - near, 0, None), axis=1)
    union = np.prod(first[:, 2:], axis=1) + np.prod(second[:, 2:], axis=1) - common
    shares: Array = common / union
    return shares


def images() -> list[Image]:
    """Return proposals around objects at random, and the predictions of a detector that is right but for some noise."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(IMAGES):
        box = np.concatenate([rng.uniform(0, 600, (PROPOSALS, 2)), np.exp(rng.normal(4.2, 0.8, (PROPOSALS, 2)))], 1)
        jitter = rng.normal(0, 0.2, (PROPOSALS, 4))
        proposal = np.concatenate([box[:, :2] + jitter[:, :2] * box[:, 2:], box[:, 2:] * np.exp(jitter[:, 2:])], 1)
        target = offsets(proposal, box)
        area = np.prod(box[:, 2:], axis=1)
        made.append(
            Image(
                predicted=(target + rng.standard_t(3, target.shape) * 0.05).astype(np.float32),
                target=target,
                is_positive=overlap(proposal, box) >= POSITIVE_OVERLAP,
                size=["small" if each < 32**2 else "medium" if each < 96**2 else "large" for each in area],
            )
        )
    return made


def main() -> None:
    """Compute one image's loss and gradient, and then the loss over all images, by the objects' size."""
    data = images()
    with lossgrad.LossClient() as client:
        first = data[0]
        positives = int(first.is_positive.sum())
        result = client.smooth_l1(
            first.predicted,
            first.target,
            beta=1 / 9,
            weight=WEIGHTS,  # one for each of the four, over all rows
            mask=first.is_positive[:, None],  # negatives are left out, whatever they hold
            denominator=max(1, positives),  # not the number of coordinates, of which there are four to a proposal
            allow_broadcast=True,
            gradient=True,
        )
        assert result.gradient is not None
        print(f"first image: {positives} of {PROPOSALS} proposals are positive, loss {result.value:.6f}")
        print(f"gradient: {result.gradient.shape}, 0 for negatives: {not result.gradient[~first.is_positive].any()}")

        all_positives = int(sum(image.is_positive.sum() for image in data))
        report = client.evaluate(
            (
                (
                    image.predicted,
                    image.target,
                    {
                        "weight": np.broadcast_to(WEIGHTS, image.target.shape),
                        "mask": np.repeat(image.is_positive[:, None], 4, axis=1),
                        "group": image.size,
                    },
                )
                for image in data
            ),
            lossgrad.SmoothL1(beta=1 / 9, denominator=all_positives),
        )
    print(f"all images: {all_positives} positives, loss {report[0].value:.6f}")
    for size in ("small", "medium", "large"):
        (part,) = report.groups[size]
        print(f"  {size}: {part.element_count // 4} positives, share of the loss {part.value / report[0].value:.1%}")


if __name__ == "__main__":
    main()
