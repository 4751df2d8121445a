"""A data set of your own: any callable that returns a training set and a validation set."""

import torch
from torch import Generator, Tensor


class Shapes:
    """Noisy pictures of a filled square, a frame, or a cross, somewhere in 12×12 pixels."""

    classes = ("square", "frame", "cross")

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a picture, uint8 (1, 12, 12), and its label: the same ones each time."""
        random, label = torch.Generator().manual_seed(self.first + index), index % 3
        picture = torch.randint(0, 120, (12, 12), generator=random, dtype=torch.uint8)
        top, left = torch.randint(0, 7, (2,), generator=random).tolist()
        window = picture[top : top + 6, left : left + 6]
        window[slice(2, 4) if label == 2 else slice(None)] += 100
        window[1:5, 1:5] -= 100 if label == 1 else 0
        window[:, 2:4] += 100 if label == 2 else 0
        return picture[None], label

    def get(self, index: int, generator: Generator) -> tuple[Tensor, int]:
        """Return a picture for training: half of them mirrored, by the generator alone."""
        picture, label = self[index]
        return picture.flip(2) if torch.rand((), generator=generator) < 0.5 else picture, label


def make(size: int = 768) -> tuple[Shapes, Shapes]:
    """Return the training and the validation set."""
    return Shapes(0, size), Shapes(size, 300)
