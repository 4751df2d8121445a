"""The layouts in which people have ImageNet, made from class folders."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from scipy.io import savemat

LAYOUTS = ("folders", "official", "shards", "parquet")


def classes_of(tree: Path) -> list[str]:
    return sorted(folder.name for folder in (tree / "train").iterdir())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def tar_of(files: dict[str, bytes], path: Path | None = None, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """Make an archive, and write it where a path is given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in files.items():
            add(archive, name, data)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def images(tree: Path, split: str) -> list[tuple[int, Path]]:
    return [
        (label, path) for label, name in enumerate(classes_of(tree)) for path in sorted((tree / split / name).iterdir())
    ]


def make_official(tree: Path, root: Path) -> Path:
    """Write the two archives, members in another order than that of their names, and the devkit unpacked."""
    names = classes_of(tree)
    inner = {
        f"{name}.tar": tar_of(
            {f"{name}_{path.name}": path.read_bytes() for path in [*(tree / "train" / name).iterdir()]}
        )
        for name in reversed(names)
    }
    tar_of(inner, root / "ILSVRC2012_img_train.tar")
    number_of = {name: len(names) - label for label, name in enumerate(names)}  # ImageNet's numbers follow no alphabet
    within = {name: sorted((tree / "val" / name).iterdir()) for name in names}
    val, truth = {}, []
    for place in range(len(within[names[0]])):
        for name in names:
            truth.append(number_of[name])
            val[f"ILSVRC2012_val_{len(truth):08d}.JPEG"] = within[name][place].read_bytes()
    tar_of(dict(reversed(val.items())), root / "ILSVRC2012_img_val.tar")
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, truth)) + "\n")
    rows = [(number, name, 0) for name, number in number_of.items()] + [(len(names) + 1, "everything", 4)]
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    return root


def pack_devkit(root: Path) -> Path:
    """Put an unpacked devkit back into its archive."""
    packed = root / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    shutil.rmtree(root / "ILSVRC2012_devkit_t12")
    return packed


def make_shards(tree: Path, root: Path) -> Path:
    """Write two WebDataset shards a split, whose images lie in no order."""
    for split, prefix in (("train", "imagenet1k-train"), ("val", "imagenet1k-validation")):
        shards: list[dict[str, bytes]] = [{}, {}]
        for number, (label, path) in enumerate(reversed(images(tree, split))):
            key = f"{classes_of(tree)[label]}_{path.stem}"
            shards[number % 2] |= {
                f"{key}.cls": str(label).encode(),
                f"{key}.jpg": path.read_bytes(),
                f"{key}.json": b"{}",
            }
        for number, files in enumerate(shards):
            tar_of(files, root / f"{prefix}-{number:04d}.tar")
    return root


def make_parquet(tree: Path, root: Path) -> Path:
    """Write a parquet file a split, as Hugging Face's, in row groups of five images that lie in no order."""
    (root / "data").mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": classes_of(tree), "_type": "ClassLabel"}}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], metadata)
    for split, prefix in (("train", "train"), ("val", "validation")):
        rows = [
            {"image": {"bytes": path.read_bytes(), "path": f"{path.stem}_n{label:08d}.JPEG"}, "label": label}
            for label, path in reversed(images(tree, split))
        ]
        table = pyarrow.Table.from_pylist(rows, schema)
        pyarrow.parquet.write_table(table, root / "data" / f"{prefix}-00000-of-00001.parquet", row_group_size=5)
    return root


def make(layout: str, tree: Path, root: Path) -> Path:
    """Make a layout from class folders; these are the folders themselves."""
    makers = {"official": make_official, "shards": make_shards, "parquet": make_parquet}
    return makers[layout](tree, root) if layout in makers else tree
