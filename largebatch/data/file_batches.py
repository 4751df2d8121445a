"""Batches of images from files: decoded, cropped and flipped, in loader processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from largebatch.base.errors import UserError
from largebatch.config.groups import DatasetConfig
from largebatch.data import native
from largebatch.data.augment import transform_of
from largebatch.data.decode import DAMAGE, check_resized, decode
from largebatch.data.files import Split
from largebatch.data.loading import Loaded
from largebatch.data.transforms import draw_resized_crop

_Problem = str | UserError | None  # a corrupt image, or what ends the run, as UserError cannot leave a loader process

UNREADABLE = -100  # the label of a validation image that cannot be read: cross-entropy leaves it out


class FileBatches(Dataset[Loaded]):
    """Decode the images of a batch, given as (epoch, index); runs in loader processes.

    In training a corrupt image gives way to the next one that can be read, with that one's label and crop: the
    same one whoever decodes it. In validation it stays in its place, black and labelled ``UNREADABLE``.
    """

    def __init__(
        self, files: Split, config: DatasetConfig, seed: int, train: bool, native: bool, channels_last: bool
    ) -> None:
        self._files, self._config, self._seed, self._train = files, config, seed, train
        self._cropped = train and config.crop == "resized"
        self._native, self._channels_last = native and self._cropped, channels_last
        self._transform = transform_of(config.transform) if train else None

    def __getitems__(self, places: list[tuple[int, int]]) -> Loaded:
        """Return a batch: pixels are uint8 (batch, 3, H, W), in the memory format that is wanted on the device."""
        pixels = self._room(len(places))
        found = [self._fill(slot, *place) for slot, place in zip(pixels, places, strict=True)]
        return pixels, torch.tensor([label for label, _ in found]), [problem for _, problem in found if problem]

    def _room(self, images: int) -> Tensor:
        """Return a batch to be filled: in a loader process in shared memory, so that it is handed over as it is."""
        height, width = self._config.height, self._config.width
        size = images * 3 * height * width
        flat = torch.empty(0 if get_worker_info() else size, dtype=torch.uint8)
        if get_worker_info():  # what torch's own collate function does
            flat = flat.set_(flat.untyped_storage()._new_shared(size))  # type: ignore[no-untyped-call]
        if self._channels_last:
            return flat.view(images, height, width, 3).permute(0, 3, 1, 2)
        return flat.view(images, 3, height, width)

    def _fill(self, slot: Tensor, epoch: int, index: int) -> tuple[int, _Problem]:
        """Write an image to ``slot``, (3, H, W), and return its label and what was wrong."""
        problem = self._decode(slot, epoch, index)
        if problem is None:
            return int(self._files.labels[index]), None
        if self._train and self._config.on_error == "skip" and isinstance(problem, str):
            for step in range(1, len(self._files)):
                following = (index + step) % len(self._files)
                another = self._decode(slot, epoch, following)
                if another is None:
                    return int(self._files.labels[following]), problem
                if isinstance(another, UserError):
                    break
            else:
                another = UserError(f"no image of this split can be read; the first problem: {problem}")
            problem = another
        slot.zero_()
        return UNREADABLE, problem

    def _decode(self, slot: Tensor, epoch: int, index: int) -> _Problem:
        """Write an image to ``slot``, or say what is wrong with the file."""
        try:
            data = self._files.read(index)
            if not (self._native and self._crop_natively(slot, data, epoch, index)):
                slot.copy_(self._pixels(data, epoch, index))
            if self._transform:
                slot.copy_(self._transform(slot, self._seed, epoch, index))
        except UserError as error:
            return error
        except DAMAGE as error:
            return f"corrupt image {self._files.where(index)}: {error}"
        return None

    def _crop_natively(self, slot: Tensor, data: bytes, epoch: int, index: int) -> bool:
        size = native.size(data)
        if size is None:
            return False
        box, mirrored = draw_resized_crop(self._seed, epoch, index, *size, self._config.flip)
        return native.crop_into(slot, data, box, mirrored)

    def _pixels(self, data: bytes, epoch: int, index: int) -> Tensor:
        """Return pixels as Pillow and torchvision make them."""
        from torchvision.transforms import functional

        image = decode(data)
        config, size = self._config, [self._config.height, self._config.width]
        if self._cropped:
            box, mirrored = draw_resized_crop(self._seed, epoch, index, image.width, image.height, config.flip)
            image = functional.resized_crop(image, *box, size)
            image = functional.hflip(image) if mirrored else image
        else:
            shorter = config.resize or max(size)
            check_resized(image.width, image.height, shorter)
            image = functional.resize(image, [shorter])
            image = functional.center_crop(image, size)
        pixels: Tensor = functional.pil_to_tensor(image)
        return pixels
