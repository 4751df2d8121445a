"""``largebatch data``: index, verify or measure images on disk, before a run needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from largebatch.base.errors import Fault, UserError, nearest
from largebatch.base.outcome import FAULT
from largebatch.cli.arguments import BOOLEAN, Given, Vocabulary, Word, verb_first
from largebatch.cli.command import PlainCommand
from largebatch.config.groups import DatasetConfig

if TYPE_CHECKING:
    from largebatch.data.layouts import Opened

_ROOT = Word("dataset.root", None, "The directory of the images. By default $LARGEBATCH_DATA.", path=True, alias="root")
_DATASET = Word(
    "dataset",
    "imagefolder",
    "imagenet: it must be ImageNet-1k, with its 1000 synsets; imagefolder: any classes.",
    ("imagefolder", "imagenet"),
)
_LAYOUT = Word(
    "layout",
    "auto",
    "Layout that is read if root has several: folders, official archives, shards or parquet files.",
    ("auto", "folders", "archives", "shards", "parquet"),
)
_PROCESSES = Word("processes", None, "Processes that read images. By default one per core.")
_LAYOUTS = (
    "Layouts of a root; nothing is unpacked. Class folders: train/ and val/ with one folder of images per class; or "
    "Kaggle's ILSVRC/Data/CLS-LOC, whose validation images are in one folder, with LOC_val_solution.csv. The official "
    "archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz "
    "(or its contents). WebDataset shards: .tar with a .jpg and a .cls per image. Hugging Face's parquet files. "
    "Shards and parquet files are in root, data/, train/ or val/; train or val (validation) in their names or their "
    "directory's distinguishes them. If a root has archives and class folders, as torchvision's does, the folders are "
    "read; layout= chooses another.",
    "Hidden files and system folders (._x.jpg, .DS_Store, lost+found, @eaDir, Thumbs.db) are neither images nor "
    "classes. These, and files without the extension of an image, are left out and counted on the first line.",
    "Archives and parquet files are indexed once, and images are read from them in place. The index is written to the "
    "same directory as largebatch-index.safetensors, or to $LARGEBATCH_CACHE (default ~/.cache/largebatch) if that "
    "directory is read-only. It is made again when the size or modification time of a file changes. train makes it if "
    "it is missing.",
    "Archives and class folders give single images. Parquet gives a row group of about a hundred images at a time, so "
    "training from it reads a hundred times as much: for many epochs use shards.",
    "Images are numbered by class, then file name, then archive and place in it, classes by their sorted synsets: the "
    "samples of a run are the same in every layout.",
)


@dataclass(frozen=True)
class _Verb:
    words: Vocabulary
    run: Callable[[Given], int]


def _opened(given: Given, anew: bool = False, tolerant: bool = False) -> Opened:
    from largebatch.data.layouts import open_splits

    config = DatasetConfig(
        name=str(given.text("dataset")),
        root=given.text("dataset.root"),
        train_images=None,
        val_images=None,
        classes=None,
        channels=3,
        height=1,
        width=1,
        crop="none",
        pad=0,
        flip=False,
        resize=None,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        decoder="pillow",
        on_error="stop",
        holdout=None,
        holdout_seed=0,
        layout=str(given.text("layout")),
    )
    return open_splits(config, anew, tolerant)


def _processes(given: Given) -> int:
    from largebatch.base.cores import allowed_cores

    return allowed_cores() if given.text("processes") is None else given.whole("processes", least=1)


def _index(given: Given) -> int:
    opened = _opened(given, anew=given.flag("anew"))
    print(opened.line)
    if opened.problem:
        raise Fault(f"the index could not be kept: {opened.problem}. What was there before is as it was.")
    return 0


def _verify(given: Given) -> int:
    from largebatch.data.check import verify

    processes = _processes(given)
    opened = _opened(given, tolerant=True)
    print(opened.line)
    verdict = verify(opened, given.text("dataset") == "imagenet", processes)
    for title, lines in (
        ("corrupt, cannot be decoded", verdict.corrupt),
        ("suspect, libjpeg warns of damage or the name is not text", verdict.suspect),
        ("of the wrong number", verdict.counts),
        ("not the archives that were published", verdict.archives),
        ("there several times", verdict.duplicates),
    ):
        if lines:
            print(f"These are {title}:", *lines, sep="\n  ")
    print(
        f"{verdict.images:,} images: {len(verdict.corrupt):,} corrupt, {len(verdict.suspect):,} suspect, "
        f"{len(verdict.counts):,} wrong counts, {len(verdict.duplicates):,} that repeat another."
    )
    return FAULT if verdict.corrupt or verdict.suspect or verdict.counts or verdict.archives else 0


def _stats(given: Given) -> int:
    import numpy as np

    from largebatch.data.check import look, most_common

    images, processes = given.whole("images", least=1), _processes(given)
    opened = _opened(given)
    print(opened.line)
    for name, split in (("train", opened.train), ("val", opened.val)):
        counts = np.bincount(split.labels, minlength=len(split.classes))
        print(
            f"{name}: {len(split):,} images of {len(split.classes):,} classes, {counts.min():,} to {counts.max():,} a "
            "class"
        )
        looks = look(split, images, processes)
        if not looks:
            print("  none of the sampled images can be read: largebatch data verify reports the causes")
            continue
        sizes, widths, heights = (np.array([getattr(one, key) for one in looks]) for key in ("size", "width", "height"))
        kinds = ", ".join(f"{kind} {100 * count / len(looks):.3g} %" for kind, count in most_common(looks))
        print(f"  of {len(looks):,} of them:")
        print(f"  bytes   mean {sizes.mean():,.0f}, {sizes.min():,} to {sizes.max():,}")
        print(f"  width   mean {widths.mean():,.0f}, {widths.min():,} to {widths.max():,} pixels")
        print(f"  height  mean {heights.mean():,.0f}, {heights.min():,} to {heights.max():,} pixels")
        print(f"  {kinds}")
    return 0


VERBS = {
    "index": _Verb(
        Vocabulary(
            "data index",
            "Index archives or parquet files before a run, for example on a node that can write to their directory.",
            (
                _ROOT,
                _DATASET,
                _LAYOUT,
                Word("anew", "false", "Make it again even if it is valid.", BOOLEAN),
            ),
            (("data index dataset.root=/data/imagenet dataset=imagenet", "before the first run"),),
            _LAYOUTS,
        ),
        _index,
    ),
    "verify": _Verb(
        Vocabulary(
            "data verify",
            "Read and decode every image, and list with archive and offset those that are corrupt (they cannot be "
            "decoded) "
            "or suspect (libjpeg warns of missing, zeroed or superfluous data, which training does not detect). "
            "Duplicates are found by a hash of their bytes. With dataset=imagenet the images of each class are "
            "counted, and the official archives are compared with their published MD5 sums.",
            (_ROOT, _DATASET, _LAYOUT, _PROCESSES),
            (("data verify dataset.root=/data/imagenet dataset=imagenet", "every image of ImageNet"),),
            (
                "JPEGs are decoded by simplejpeg, which uses the same libjpeg-turbo as Pillow and reports its "
                "warnings; "
                "others by Pillow. Unreadable directories, FIFOs and names that are not text are also reported.",
                "Exit status: 0 no problem; 1 corrupt or suspect images, or a wrong number or MD5 sum; 2 the layout "
                "cannot be "
                "read. ImageNet itself contains duplicates: they are listed, and are not an error.",
            ),
        ),
        _verify,
    ),
    "stats": _Verb(
        Vocabulary(
            "data stats",
            "Print the numbers of images and classes, and bytes, sizes and formats of some.",
            (_ROOT, _DATASET, _LAYOUT, _PROCESSES, Word("images", "2000", "Images of each split that are read.")),
            (("data stats dataset.root=/data/imagenet", "what is there"),),
        ),
        _stats,
    ),
}


def run(arguments: list[str]) -> int:
    """Do what the first word says, and return the exit status."""
    verb, *words = verb_first(arguments) or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(_help())
        return 0
    if verb not in VERBS:
        raise UserError(f"data {verb} is not known: it takes {', '.join(VERBS)}.{nearest(verb, VERBS)}")
    given = VERBS[verb].words.read(words)
    return 0 if given is None else VERBS[verb].run(given)


def _help() -> str:
    import textwrap

    from largebatch.cli.arguments import WIDTH

    lines = ["largebatch data index|verify|stats dataset.root=… [key=value …]", ""]
    for name, verb in VERBS.items():
        lines += textwrap.wrap(verb.words.summary, WIDTH, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10)
    for paragraph in _LAYOUTS:
        lines += ["", *textwrap.wrap(paragraph, WIDTH)]
    lines += ["", "Examples:"]
    for verb in VERBS.values():
        lines += [f"  largebatch {line}\n      {what}" for line, what in verb.words.examples]
    return "\n".join([*lines, "", "largebatch data verify --help lists the keys of each."])


DATA = PlainCommand("index, verify or measure images on disk: class folders, archives, shards, parquet", run)
