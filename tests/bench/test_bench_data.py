"""bench data: every side makes normalised crops of the same photographs."""

import json
from dataclasses import replace

import pytest

from largebatch.base.errors import UserError
from largebatch.bench import data, loader
from largebatch.bench.results import as_text
from largebatch.cli import main as cli
from largebatch.data.layouts import open_splits

FEW = ("bench.photographs=40", "bench.files.height=32", "bench.files.width=32")


@pytest.fixture(scope="module")
def files(compose, tmp_path_factory):
    config = compose("dataset=imagefolder", "dataset.height=32", "dataset.width=32").dataset
    return loader.make_photographs(tmp_path_factory.mktemp("photographs"), config, 40)


def test_shards_hold_the_images_of_the_folders(files, tmp_path):
    packed = open_splits(replace(files, root=str(data.as_shards(files, tmp_path)))).train
    folders = open_splits(files).train
    assert packed.labels.tolist() == folders.labels.tolist()
    assert [packed.read(row) for row in range(40)] == [folders.read(row) for row in range(40)]


def test_the_command_prints_its_ratios(capfd):
    assert cli.run(["bench", "data", *FEW, "bench.repeats=1", "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert set(facts["ratios"]) == {"pillow", "tar_vs_folders"}
    assert all(0 < one["low"] <= one["median"] <= one["high"] for one in facts["ratios"].values())
    assert 90_000 < facts["file_bytes"] < 130_000  # as ImageNet's
    assert "crops ÷ ours with decoder=pillow" in as_text(facts)


def test_pillow_is_not_measured_against_itself(files, tmp_path):
    with pytest.raises(UserError, match=r"bench\.files.decoder=pillow: bench data measures the native decoder"):
        data.time_data(replace(files, decoder="pillow"), 1, tmp_path)


def test_a_set_that_would_take_days_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST", 39)
    with pytest.raises(UserError, match=r"reads all training images in every turn, and .* has 40: name a directory"):
        data.time_data(files, 1, tmp_path)
    assert not list(tmp_path.iterdir())
