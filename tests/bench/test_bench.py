import contextlib
import json

import pytest
import torch
from torchvision.transforms import ToTensor

from largebatch.base.errors import UserError
from largebatch.bench import exchange, limits, loader, offload, step, variants
from largebatch.bench.compare import Side, Spread, Timings, spread, take_turns
from largebatch.bench.config import SIDES, BenchConfig
from largebatch.bench.results import as_text
from largebatch.cli import main as cli
from largebatch.models import SmallResNet
from largebatch.runtime.placement import Hardware, place

CPU = Hardware(cores=1, gpus=0, mps=False, bf16=False)
TINY = [
    "dataset=synthetic_small",
    "dataset.height=8",
    "dataset.width=8",
    "dataset.pad=1",
    "model=resnet8",
    "n=4",
    "threads=1",
    "device=cpu",
]


@pytest.fixture
def threads():
    """Give the tests that follow the threads back: a benchmark sets its own number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([3.0], 3.0, 3.0),
        ([5.0, 1.0, 3.0], 1.0, 5.0),
        # P(Binomial(8, 1/2) < 1) = 1/256 and P(… < 2) = 9/256: 2 · 9/256 is above 0.05.
        ([float(i) for i in range(8)], 0.0, 7.0),
        # P(Binomial(9, 1/2) < 2) = 10/512: 2 · 10/512 = 0.039.
        ([float(i) for i in range(9)], 1.0, 7.0),
        # The usual table for N = 20: the 6th and the 15th.
        ([float(i) for i in range(1, 21)], 6.0, 15.0),
    ],
)
def test_the_interval_is_that_of_the_binomial_tables(values, low, high):
    measured = spread(list(reversed(values)))
    assert (measured.low, measured.high) == (low, high)
    assert measured.median == sum(sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]) / (2 - len(values) % 2)


def test_ratios_are_of_images_a_second_over_neighbouring_turns():
    timings = Timings({"ours": [1.0, 2.0, 4.0], "peer": [2.0, 1.0, 4.0]}, {"ours": 64, "peer": 32})
    # Twice the images in 2/1, 1/2 and 4/4 of the time: 4, 1 and 2 times as fast.
    assert timings.ratio("ours", "peer") == Spread(median=2.0, low=1.0, high=4.0)
    assert timings.speed("ours") == 32.0


def test_the_cost_is_in_seconds_over_neighbouring_turns():
    timings = Timings({"tree": [2.0, 3.0, 8.0], "ddp": [1.0, 1.0, 2.0]}, {"tree": 8, "ddp": 8})
    assert timings.cost("tree", "ddp") == Spread(median=3.0, low=2.0, high=4.0)


def test_overlap_is_the_hidden_share_of_the_shorter_one():
    seconds = {
        "backward": [4.0, 4.0, 1.0],
        "exchange_ddp": [2.0, 2.0, 2.0],
        # As long as the longer one; one after the other, 4 + 2; and half of the 1 s hidden behind the 2 s.
        "both_ddp": [4.0, 6.0, 2.5],
    }
    assert exchange.overlap(seconds, "ddp") == Spread(median=0.5, low=0.0, high=1.0)


def test_without_images_every_gradient_comes_of_a_sum_of_parameters():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    either = exchange.Either(model)
    either(None).backward()
    assert all(parameter.grad.eq(1).all() for parameter in model.parameters())
    images = torch.randn(4, 1, 5, 5)
    assert either(images).item() == pytest.approx(model(images).sum().item())


def test_sides_take_turns_and_change_who_goes_first():
    calls = []
    sides = {name: Side(lambda name=name: calls.append(name), 1) for name in "ab"}
    timings = take_turns(sides, repeats=3, what="test")
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba"
    assert [len(seconds) for seconds in timings.seconds.values()] == [3, 3]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(mine, other):
    """Return ‖a − b‖ / ‖a‖ over all parameters."""
    apart = sum((mine[name] - other[name]).square().sum() for name in mine)
    return float((apart / sum(value.square().sum() for value in mine.values())).sqrt())


def test_gradient_accumulation_computes_what_our_step_computes(compose, threads):
    config = compose(*TINY, "k=4", "precision=fp64", "workers_per_pass=2", "model.zero_gamma=false")
    ours = step.make_ours(config, place(config, CPU))
    accumulation, one_group = step.make_plain(ours, 4), step.make_plain(ours, 16)
    for side in (ours, accumulation, one_group):
        side.step()
    mine = gradients(ours.learner.model)
    assert difference(mine, gradients(accumulation.model)) < 1e-12
    # One BN over all 16 samples is another function.
    assert difference(mine, gradients(one_group.model)) > 1e-3


def test_every_step_is_of_the_same_images_and_weights(compose, threads):
    config = compose(*TINY, "k=2", "precision=fp64")
    ours = step.make_ours(config, place(config, CPU))
    images = [batch.images for batch in ours.batches()]
    ours.step()
    before = {name: value.clone() for name, value in gradients(ours.learner.model).items()}
    ours.step()
    assert all(torch.equal(value, before[name]) for name, value in gradients(ours.learner.model).items())
    assert all(torch.equal(a, b.images) for a, b in zip(images, ours.batches(), strict=True))


def test_folders_lend_the_step_their_shape(compose):
    config = compose("dataset=imagenet")
    images = step.step_data(config.dataset)
    assert (images.name, images.crop, images.height, images.classes) == ("synthetic", "none", 224, 1000)
    assert step.step_data(compose(*TINY).dataset) == compose(*TINY).dataset


@pytest.mark.parametrize("installed", [True, False])
def test_both_loaders_read_every_photograph(compose, monkeypatch, tmp_path, installed):
    if not installed:
        monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    config = compose("dataset=imagefolder", "dataset.height=32", "dataset.width=32", "loader.workers=0")
    files = loader.make_photographs(tmp_path, config.dataset, 32)
    both = loader.loading(files, config.loader, batch=12, cores=1)
    shapes = [(12, 3, 32, 32), (12, 3, 32, 32), (8, 3, 32, 32)]
    assert [tuple(images.shape) for images in both.ours()] == shapes
    assert [tuple(images.shape) for images in both.torchvision()] == shapes
    # Normalised alike: about standard normal, where unnormalised pixels would be about 0.4.
    means = [torch.cat(list(side())).mean() for side in (both.ours, both.torchvision)]
    assert abs(means[0] - means[1]) < 0.3


def test_archives_cannot_be_held_against_a_loader_of_class_folders(compose, tmp_path):
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    config = compose("dataset=imagenet", f"dataset.root={tmp_path}")
    with pytest.raises(UserError, match="reads class folders alone, and there are the official archives in"):
        loader.loading(config.dataset, config.loader, batch=1, cores=1)


def test_photographs_have_imagenets_size_and_are_no_noise(compose, tmp_path):
    from PIL import Image

    loader.make_photographs(tmp_path, compose("dataset=imagefolder").dataset, 32)
    sizes = set()
    for path in (tmp_path / "train").rglob("*.jpg"):
        with Image.open(path) as image:
            sizes.add(image.size)
            pixels = ToTensor()(image.convert("L"))
        neighbours = (pixels[:, 1:] - pixels[:, :-1]).abs().mean()
        assert neighbours < pixels.std() / 2
    assert sizes == {(500, 375), (375, 500)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"what": "stp"}, "Did you mean 'step'?"),
        ({"k": ()}, "such as [8,64]"),
        ({"k": (8, 8)}, "names a number twice"),
        ({"k": (0,)}, "bench.k=0 is too small"),
        ({"repeats": 0}, "bench.repeats=0 is too small"),
        ({"photographs": 1}, "it takes 32 or more"),
        ({"batches": ()}, "such as [8,32,256]"),
        ({"batches": (0,)}, "bench.batches=0 is too small"),
        ({"sides": ("graph",)}, "bench.sides=graph is not known: .* Did you mean 'graphs'?"),
    ],
)
def test_mistakes_are_refused(compose, values, words):
    good = {
        "what": "all",
        "k": (8, 64),
        "repeats": 1,
        "iterations": 1,
        "photographs": 32,
        "batches": (8,),
        "sides": None,
    }
    with pytest.raises(UserError, match=words.replace("[", r"\[").replace("?", r"\?")):
        BenchConfig(**{**good, **values}, files=compose("dataset=imagefolder").dataset)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["processes=2"], "one process"),
        (["exchange", "processes=1", *TINY], "an exchange takes two or more"),
        (["exchange", "processes=3", "k=3", *TINY], "takes a power of two"),
        (
            ["exchnge"],
            "bench exchnge is not known: it measures step, loader, exchange, checkpoint, offload, quantize, profile, "
            "data, all. Did you mean 'exchange'",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        cli.run(["bench", *words])


def test_an_exchange_inside_a_rank_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        cli.run(["bench", "exchange", *TINY])


ONE = ["model=resnet8", "bench.batches=[1]"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], []),
        (["n=4"], ["n=4"]),
        (["--help"], ["--help"]),
        (["loader", "n=4"], ["bench.what=loader", "n=4"]),
        (["exchange"], ["bench.what=exchange", "model=resnet50"]),
        (["step", "model=resnet50"], ["bench.what=step", "dataset=synthetic", "model=resnet50"]),
        (["step", "model=resnet20"], ["bench.what=step", "model=resnet20"]),
        (["exchange", "model=resnet8"], ["bench.what=exchange", "model=resnet8"]),
        (["offload"], ["bench.what=offload", "model=resnet50", "dataset=synthetic"]),
        (["quantize", *ONE], ["bench.what=quantize", "model.zero_gamma=false", *ONE]),
        (["offload", "dataset=digits"], ["bench.what=offload", "model=resnet50", "dataset=digits"]),
    ],
)
def test_a_word_after_bench_says_what_is_measured(words, values):
    assert cli._named_part(words) == values


@pytest.mark.slow
def test_an_exchange_between_two_processes_has_stable_keys(capfd):
    assert cli.run(["bench", "exchange", *TINY, "bench.repeats=2", "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert set(facts["seconds"]) == {"backward", "exchange_ddp", "exchange_tree", "both_ddp", "both_tree"}
    assert all(seconds > 0 for seconds in facts["seconds"].values())
    assert set(facts["ratios"]) == {"tree_vs_ddp", "tree_vs_ddp_with_backward"}
    assert set(facts["overlap"]) == {"ddp", "tree"}
    for one in (*facts["ratios"].values(), *facts["overlap"].values()):
        assert one["low"] <= one["median"] <= one["high"]
    assert facts["setting"]["processes"] == 2
    assert facts["gradient_bytes"] == 4 * sum(p.numel() for p in SmallResNet(8, 10).parameters())
    page = as_text(facts)
    assert all(words in page for words in ("of gradients (resnet8) between 2 processes", "fixed tree", "overlap"))


def test_the_hidden_share_of_offloading():
    timings = Timings({"resident": [4.0, 1.0], "copies_leaf": [2.0, 3.0], "leaf": [4.0, 4.0]}, {})
    # All copies hidden behind 4 s of computing; and 3 s of copies and 1 s of computing one after the other.
    assert offload.overlap(timings, "leaf") == Spread(median=0.875, low=0.75, high=1.0)


def test_offloading_is_compared_with_resident_weights(capfd, threads):
    assert cli.run(["bench", "offload", *TINY, "bench.batches=[2,4]", "bench.repeats=2", "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    parameters = sum(tensor.nbytes for tensor in SmallResNet(8, 10).state_dict().values())
    assert facts["weight_bytes"] == parameters
    assert set(facts["batches"]) == {"2", "4"}
    for one in facts["batches"].values():
        assert {"resident", "leaf", "bytes"} <= set(one["seconds"])
        assert {"leaf_vs_resident", "bytes_vs_resident"} <= set(one["ratios"])
        assert set(one["overlap"]) == {"leaf", "bytes"}
        assert one["difference"]["leaf"] == one["difference"]["bytes"] == 0.0
    assert 0 < facts["memory"]["leaf"]["planned_weight_bytes"] < parameters
    assert facts["ensemble"]["members"] == facts["ensemble"]["uploads"] == 6
    assert facts["ensemble"]["models_on_the_device"] == 2
    page = as_text(facts)
    assert all(words in page for words in ("offload: resnet8", "ours, groups=leaf", "batch of 4", "6 uploads"))


def test_integers_are_exact_and_compared_with_floats(capfd, threads):
    small = ["bench.photographs=32", "bench.files.height=32", "bench.files.width=32", "bench.repeats=1"]
    assert cli.run(["bench", "quantize", *TINY, *small, "bench.batches=[2]", "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["exactness"]["x86"]["wrong_accumulators"] == 0
    assert facts["weights"]["share"] < 0.27
    for engine in ("x86", "onnxruntime"):
        assert facts["exactness"][engine]["nodes"] == facts["operators"][engine]["integer"] == 10
        assert facts["operators"][engine]["floating"] == 0
        assert facts["exactness"][engine]["largest"] <= 1
        assert facts["decibels"][engine] > 40
    assert {"x86", "onnxruntime", "float32"} <= set(facts["batches"]["2"]["seconds"])
    assert {"x86_vs_onnxruntime", "x86_vs_float32"} <= set(facts["batches"]["2"]["ratios"])
    assert facts["calibration"]["ratio"]["median"] > 0
    page = as_text(facts)
    assert all(words in page for words in ("quantize: resnet8", "batch of 2", "ours, engine=onnxruntime", "channels"))


def test_the_command_prints_stable_keys_and_nothing_else(capfd, threads):
    small = [
        "bench.k=[2,4]",
        "bench.sides=[plain,ours]",
        "bench.repeats=2",
        "bench.photographs=32",
        "bench.files.height=32",
        "bench.files.width=32",
    ]
    assert cli.run(["bench", *TINY, *small, "loader.workers=0", "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert set(facts["ratios"]) == {"step_vs_accumulation", "step_vs_one_group", "k4_vs_k2", "loader_vs_torchvision"}
    for ratio in facts["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert set(facts["images_per_second"]) == {
        "step",
        "plain_accumulation",
        "plain_one_group",
        "step_k2",
        "step_k4",
        "loader",
        "loader_torchvision",
    }
    assert all(speed > 0 for speed in facts["images_per_second"].values())
    assert set(facts["variants"]["ratios"]) == {"k2_vs_plain", "k4_vs_plain"}
    assert set(facts["memory_bytes"]) == {"k2", "k4"}
    assert {"processor", "cores", "threads", "torch"} <= set(facts["machine"])
    page = as_text(facts)
    assert all(
        line in page
        for line in (
            "micro-batches of n",
            "k4 ÷ k2",
            "k4 ÷ plain",
            "of product",
            "torchvision's usual transforms",
            "memory that steps",
        )
    )


def test_a_layers_work_is_counted_by_hand():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Flatten(), torch.nn.Linear(128, 2)
    )
    images = torch.zeros(5, 3, 4, 4)
    work = limits.work_of(model, images, torch.zeros(5, dtype=torch.long), contextlib.nullcontext)
    convolution, linear = 2 * 16 * 8 * 27, 2 * 128 * 2
    # Forward once, back twice; nobody asks for the gradient of the images.
    assert work.operations == 2 * convolution + 3 * linear
    assert work.bytes == 4 * (3 * 48 + 2 * 128 + 3 * 128 + 2 * 2)
    assert work.weight_bytes == 4 * (8 * 27 + 128 * 2 + 2)
    assert work.step_bytes(10) == 10 * work.bytes + 7 * work.weight_bytes


def test_the_ways_to_make_a_step_take_turns(compose, threads):
    config = compose(*TINY, "loader.workers=0")
    sides = ("plain", "dataloader", "ours", "separate", "micro")
    measured = variants.as_facts(variants.time_variants(config, (2, 4), sides, repeats=2, steps=1), (2, 4))
    assert set(measured["images_per_second"]) == {"plain", "dataloader", "k2", "k4", "k2_separate", "k2_micro"}
    assert set(measured["ratios"]) == {
        f"{ours}_vs_{peer}" for ours in ("k2", "k4", "k2_separate", "k2_micro") for peer in ("plain", "dataloader")
    }
    limit = measured["limits"]
    for name, share in measured["shares"].items():
        operations = limit["operations_per_image"] * measured["images_per_second"][name]
        assert share["of_matmul"] == pytest.approx(operations / limit["matmul_operations_per_second"])
        assert share["of_copy"] > 0
    page = "\n".join(variants.as_lines(measured))
    assert all(words in page for words in ("a plain matrix product makes", "k2_micro", "GFLOP"))


def test_on_a_gpu_all_sides_are_measured_that_the_data_allow(compose):
    small, large = compose(*TINY).dataset, compose("dataset=synthetic").dataset
    assert variants.sides_here(small, "cpu", None) == ()
    assert variants.sides_here(small, "cuda", None) == SIDES
    assert set(SIDES) - set(variants.sides_here(large, "cuda", None)) == {"dataloader"}
    assert variants.sides_here(large, "cpu", ("plain",)) == ("plain",)


def test_a_checkpoint_costs_what_it_adds_to_the_steps_beside_it(capfd):
    words = ["bench", "checkpoint", *TINY, "bench.k=[2]", "bench.repeats=2", "checkpoint.minutes=5"]
    assert cli.run([*words, "format=json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["checkpoint_bytes"] > 1e5
    assert facts["seconds"]["copy"]["low"] > 0
    assert facts["share"] == pytest.approx(facts["seconds"]["checkpoint"]["high"] / 300)
    assert cli.run(words) == 0
    assert "of a run with checkpoint.minutes=5, at most: " in capfd.readouterr().out
