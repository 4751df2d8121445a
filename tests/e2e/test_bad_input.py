"""Every mistake that a user can make: what was given, what is allowed, what to do; status 2; nothing written."""

import errno
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
from PIL import Image

from largebatch.cli import main as cli
from largebatch.runtime.placement import Hardware

CPU = Hardware(cores=2, gpus=0, mps=False, bf16=False)


@pytest.fixture
def mistake(monkeypatch, capsys, tmp_path):
    """Return a function that runs the command line and returns its sentence, once it has checked the rest."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("LARGEBATCH_DATA", raising=False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["largebatch", *arguments])
        capsys.readouterr()  # what was said before
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2, err
        assert out == ""
        before = ("── ", "dataset=", "dataset.decoder=")  # an arm, a layout, a decoder
        (line,) = (line for line in err.splitlines() if not line.startswith(before))
        assert line.startswith("largebatch: ")
        assert not list(here.iterdir())
        return line.removeprefix("largebatch: ")

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("epocs=3", "'epocs' is not a key. Did you mean 'epochs'? `--help` lists them all."),
        ("lr.bas=3", "'lr.bas' is not a key. Did you mean 'lr.base'? `--help` lists them all."),
        ("+epocs=3", "'epocs' is not a key of this configuration. Did you mean 'epochs'?"),
        ("+lr.bas=3", "'lr.bas' is not a key of this configuration. Did you mean 'base'?"),
        ("datset=digits", "'datset' is not a key. Did you mean 'dataset'? `--help` lists them all."),
        (
            "dataset=digit",
            "dataset=digit is not known: it takes cifar10, cifar100, digits, … Did you mean 'digits'?",
        ),
        ("warmup=linear", "warmup=linear is not known: it takes constant, gradual, none."),
        ("experiment=imagenet_1hour", "experiment=imagenet_1hour is not known: … Did you mean 'imagenet_1h'?"),
        ("lr.scaling=square", "lr.scaling=square is not known: it takes linear, sqrt, none.…"),
        ("bn.running=worker1", "bn.running=worker1 is not known: it takes worker0, mean. Did you mean 'worker0'?"),
        ("precision=fp16", "precision=fp16 is not known: it takes auto, fp32, bf16, fp64.…"),
        ("k=0", "k=0 is too small: it takes 1 or more."),
        ("k=-8", "k=-8 is too small: it takes 1 or more."),
        ("n=0", "n=0 is too small: it takes 1 or more."),
        ("epochs=0", "epochs=0 is too small: it takes 1 or more."),
        ("processes=0", "processes=0 is too small: it takes 1 or more."),
        ("iterations=0", "iterations=0 is too small: it takes 1 or more."),
        ("k=2.5", "k=2.5 is of the wrong kind: it takes a whole number."),
        ("k=eight", "k=eight is of the wrong kind: it takes a whole number."),
        ("k=null", "k=null is of the wrong kind: it takes a whole number."),
        ("k=true", "k=true is of the wrong kind: it takes a whole number."),
        ("resume=maybe", "resume=maybe is of the wrong kind: it takes true or false."),
        ("lr.base=inf", "lr.base=inf is not a finite number."),
        ("lr.base=0", "lr.base=0.0 is not a rate: it takes a number above 0."),
        ("optimizer=7", "A group such as model=… takes one of its names, not a number or a list: see --help."),
        (
            "k=12 processes=5",
            "processes=5 does not divide k=12: every process owns the same number of workers. "
            "These do: 1, 2, 3, 4, 6, 12.",
        ),
        (
            "k=12 workers_per_pass=8",
            "workers_per_pass=8 does not divide the 12 workers of a process …. These do: 1, 2, 3, 4, 6, 12.",
        ),
        (
            "k=64",
            "kn = 64 × 32 = 2048 is larger than the training set of dataset=digits (1437 images): take k ≤ 44 at "
            "n=32, or a smaller n.",
        ),
        (
            "schedule.milestones=[60,30]",
            "schedule.milestones=[60, 30] are out of order: give epochs that rise, such as [30, 60, 80].",
        ),
        ("schedule.milestones=[30,30]", "schedule.milestones=[30, 30] are out of order: …"),
        (
            "schedule.milestones=[30,60,90]",
            "schedule.milestones=[30, 60, 90] are not within the run: they must be above 0 and below epochs=90. "
            "Null places them at 1/3, 2/3 and 8/9 of the epochs.",
        ),
        ("schedule.milestones=[0,30]", "schedule.milestones=[0, 30] are not within the run: …"),
        ("epochs=4 warmup.epochs=5", "warmup.epochs=5 is longer than the run's epochs=4: null makes it 5/90 of them."),
        ("k=", "k= is of the wrong kind: it takes a whole number."),
        ("lr.base=a=b", "'lr.base=a=b' cannot be read as key=value. Put a value with = … into quotes: …"),
        ("k", "'k' cannot be read as key=value. Put a value with = …"),
    ],
)
def test_mistakes_in_values(mistake, arguments, sentence):
    said = mistake("train", *arguments.split())
    assert re.fullmatch(re.escape(sentence).replace("…", ".*"), said), said


@pytest.mark.parametrize("arguments", [("epocs=3",), ("k=0",), ("k=64",), ("schedule.milestones=[60,30]",)])
def test_the_installed_command_says_the_same(largebatch, tmp_path, arguments):
    for command in ("train", "explain"):
        done = largebatch(command, *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("largebatch: ")
        assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "device=cuda",
            "device=cuda was given, but this machine has no usable CUDA GPU: use device=cpu or auto.",
        ),
        (
            "precision=bf16",
            "precision=bf16 was given, but device=cpu has no bf16 arithmetic on this machine: use precision=fp32.",
        ),
    ],
)
def test_hardware_that_is_not_there(mistake, monkeypatch, override, sentence):
    monkeypatch.setattr("largebatch.runtime.world.hardware", lambda _: CPU)
    assert mistake("train", override) == sentence


@pytest.mark.parametrize("words", [("-m", "k=1,2"), ("launcher=slurm",)])
def test_a_sweep_inside_a_rank(mistake, monkeypatch, words):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    said = mistake("train", *words)
    assert said == "a sweep (-m, launcher=slurm) cannot be started in a rank: start it once, without torchrun."


def test_an_arm_that_is_refused_stops_the_sweep_before_its_first_run(mistake):
    said = mistake("train", "-m", "k=1", "n=8,100000")
    assert said.startswith("nothing was started, because of the arm 'k=1 n=100000': n=100000 is larger than the")


def photographs(root: Path, folders: dict[str, int]) -> Path:
    """Make a tree of folders, ``split/class``, with so many images each."""
    for name, count in folders.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30), (number, 100, 50)).save(root / name / f"{number}.jpg")
    return root


def folder_run(root: Path) -> list[str]:
    return ["train", "dataset=imagefolder", f"dataset.root={root}", "model=resnet18", "k=1", "n=2", "loader.workers=0"]


def test_image_folders_without_a_root(mistake):
    said = mistake("train", "dataset=imagefolder")
    assert said.startswith(
        "dataset=imagefolder needs dataset.root (or $LARGEBATCH_DATA): a directory with class folders"
    )


def test_a_root_that_is_not_there(mistake, tmp_path):
    root = tmp_path / "nowhere"
    said = mistake(*folder_run(root))
    assert f"no images in {root}; {root} does not exist. dataset.root must hold class folders (train/ and val/" in said


def test_a_root_without_val(mistake, tmp_path):
    root = photographs(tmp_path / "set", {"train/cat": 2, "validation/cat": 1})
    assert f"no directory {root}/val." in mistake(*folder_run(root))
    assert mistake(*folder_run(root)).endswith(f"{root} holds train, validation.")


def test_a_class_folder_without_images(mistake, tmp_path):
    root = photographs(tmp_path / "set", {"train/cat": 2, "train/dog": 0, "val/cat": 1, "val/dog": 1})
    said = mistake(*folder_run(root))
    assert "dog" in said
    assert f"{root}/train" in said
    assert said.endswith("Every class folder must hold at least one image.")


def test_validation_classes_that_differ(mistake, tmp_path):
    root = photographs(tmp_path / "set", {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/cow": 1})
    said = mistake(*folder_run(root))
    assert said.endswith("do not have the same class folders: dog only in train, cow only in val.")


def test_imagenet_that_is_something_else(mistake, tmp_path):
    root = photographs(tmp_path / "set", {"train/cat": 2, "val/cat": 1})
    said = mistake("train", "dataset=imagenet", f"dataset.root={root}", "model=resnet18", "k=1", "n=2")
    assert "do not have ImageNet-1k's" in said
    assert said.endswith("For other images use dataset=imagefolder.")


def test_a_folder_that_holds_less_than_a_minibatch(mistake, tmp_path):
    root = photographs(tmp_path / "set", {"train/cat": 2, "train/dog": 1, "val/cat": 1, "val/dog": 1})
    said = mistake(*(word for word in folder_run(root) if word != "k=1"), "k=2")
    assert said.startswith("kn = 2 × 2 = 4 is larger than the training set of dataset=imagefolder (3 images)")


def test_a_small_set_that_cannot_be_downloaded(mistake, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__init__", offline)
    root = tmp_path / "nowhere"
    said = mistake("train", "dataset=fashion_mnist", f"dataset.root={root}")
    assert said.startswith(f"dataset=fashion_mnist was not found in {root}")
    assert "no network" in said
    assert "apt-get install dataset-fashion-mnist" in said


def test_a_directory_that_holds_a_run(mistake, tmp_path):
    directory = tmp_path / "run"
    overrides = ["train", "k=1", "n=8", "device=cpu", "iterations=1", f"run_dir={directory}"]
    assert cli.run(overrides) == 0
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    said = mistake(*overrides)
    assert said == (
        f"run_dir={directory} already holds a run (status stopped): use resume=true to continue it, or another run_dir."
    )
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_run_directory_that_is_a_file(mistake, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = mistake("train", "k=1", "n=8", "device=cpu", "iterations=1", f"run_dir={tmp_path}/file/run")
    assert said.startswith(f"run_dir={tmp_path}/file/run cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


COLOUR = ["dataset=synthetic", "dataset.height=32", "dataset.width=32"]


def test_a_sweeps_directory_that_is_a_file(mistake, tmp_path):
    (tmp_path / "taken").write_text("")
    said = mistake("train", "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}/taken")
    assert re.search(r"^hydra.sweep.dir cannot be written: .*taken'\. Give another directory\.$", said)


def test_a_full_disk_under_a_sweep(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("largebatch.launch.manifest.write", full)
    monkeypatch.setattr(sys, "argv", ["largebatch", "train", "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("largebatch: a disk failed: [Errno 28] No space left on device. Make")


def test_one_sample_a_worker_and_a_map_of_one_pixel(mistake):
    said = mistake("train", *COLOUR, "model=resnet18", "k=1", "n=1", "device=cpu")
    assert said == (
        "n=1 leaves a BatchNorm of model.name=resnet18 a single value for each channel (a 1×1 map): its statistics "
        "would be of one sample. Use n ≥ 2."
    )


def test_images_of_another_number_of_channels(mistake):
    said = mistake("train", "model=resnet18", "device=cpu")
    assert said.startswith("model.name=resnet18 takes images of 3 channels, these have 1: use one of our own")


def test_a_model_that_is_not_known(mistake):
    said = mistake("train", *COLOUR, "model=timm", "model.name=resnet5O", "device=cpu")
    assert re.fullmatch(r"model\.name=resnet5O is not a timm model\. Did you mean 'resnet\w+'\?", said)


@pytest.mark.skipif(sys.platform != "linux", reason="limits this process's memory by Linux's means")
def test_out_of_memory_names_what_to_make_smaller(tmp_path):
    # A real allocation that fails: the process may have 1 GB more than it has, and a pass takes several.
    program = """
import resource, sys
from largebatch.cli import main as cli
from largebatch.training import loop as train
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
cli.main()
"""
    arguments = ["train", "dataset=synthetic", "model=resnet18", "k=4", "n=256", "workers_per_pass=2", "device=cpu"]
    arguments += ["threads=1", "run_dir=run"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "largebatch: cpu ran out of memory: a pass holds workers_per_pass=2 × n=256 = 512 samples. Use a smaller "
        "workers_per_pass (the result stays the same), then a smaller n (it does not)."
    )
    assert '"status": "failed"' in (tmp_path / "run" / "summary.json").read_text()
