"""`largebatch quantize` on recorded runs, and `largebatch eval quantized=true` of what it makes."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from largebatch.cli import main as cli
from largebatch.inference import quantize as session_of_quantize
from largebatch.quantization.lower import Recipe

REST = {"report": False, "max_drop": None, "min_db": 30.0, "allow_float": False, "export": None, "out": None}


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs ``largebatch``: exit status, output and what was said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["largebatch", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def facts(call):
    """Return a function that runs ``largebatch`` with format=json, and returns what it says."""

    def run(*words):
        status, out, err = call(*words, "format=json")
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def run(digits_runs, tmp_path):
    """Return a copy of a recorded run that a test may spoil."""
    return shutil.copytree(digits_runs / "seed0", tmp_path / "run")


@pytest.fixture(scope="module")
def made(digits_runs, compose, tmp_path_factory):
    """Return a run that has been quantized, for tests that only read it."""
    from largebatch.inference.quantize import quantize_session
    from largebatch.quantization.config import QuantizeConfig

    directory = shutil.copytree(digits_runs / "seed0", tmp_path_factory.mktemp("made") / "run")
    values = {**compose().to_mapping(), "threads": 1, "device": "cpu"}
    asked = QuantizeConfig(str(directory), None, "last", "minmax", 64, "per_channel", 8, "auto", "auto", **REST)
    quantize_session(asked, values, ["device"])
    return directory


def test_a_run_in_integers_and_what_it_costs(run, facts):
    found = facts("quantize", f"run={run}", "report=true", "images=128", "threads=1", "device=cpu")
    assert found["images"] == 360
    assert abs(found["top1_drop"] - (found["error_after"] - found["error_before"])) < 1e-9
    assert abs(found["top1_drop"]) < 2
    low, high = found["top1_drop_interval"]
    assert low < found["top1_drop"] < high
    assert found["agreement"] > 98
    assert (found["float_operators"], found["in_floats"]) == (0, [])
    assert found["integer_operators"] == 12  # 9 convolutions, the mean, the flattening, the product of the logits
    assert set(found["speed"]) == {"int8", "fp32", "bf16", "batch", "gain"}
    worst = min((one for one in found["layers"] if one["operator"] == "conv"), key=lambda one: one["decibels"])
    assert found["worst"][0] == worst["name"]
    assert worst["decibels"] > 25
    # The same integers in eval, resident by the same engine, and exactly where they visit the device as bytes.
    resident = facts("eval", f"run={run}", "quantized=true", "threads=1", "device=cpu")
    assert resident["members"][0]["error"] == pytest.approx(found["error_after"])
    assert resident["quantized"] == found["engine"]
    visiting = facts("eval", f"run={run}", "quantized=true", "offload=submodule", "budget=100kB", "threads=1")
    assert visiting["quantized"] == "reference"
    assert visiting["peak_weight_bytes"] <= 100_000
    assert visiting["weight_bytes"] < 0.3 * found["float_bytes"]
    assert abs(visiting["members"][0]["error"] - found["error_after"]) < 1


def test_the_same_bytes_again(made, run, call):
    assert call("quantize", f"run={run}", "images=64", "threads=1", "device=cpu")[0] == 0
    for name in ("network.json", "network.safetensors"):
        assert (run / "quantized" / name).read_bytes() == (made / "quantized" / name).read_bytes()


def test_a_network_that_integers_change_too_much_is_refused(run, call):
    status, _, said = call("quantize", f"run={run}", "bits=2", "images=64", "threads=1", "device=cpu", "min_db=25")
    assert status == 2
    assert re.search(r"stand only -?\d+\.\d dB above what integers change in them, which is below min_db=25", said)
    assert not (run / "quantized").exists()


def test_layers_are_kept_in_floats_until_the_drop_is_met(run, facts):
    words = ("bits=2", "images=64", "threads=1", "device=cpu", "engine=reference")
    coarse = facts("quantize", f"run={run}", "reduce_range=true", "min_db=-10", *words)
    assert coarse["recipe"]["reduced"]
    assert coarse["decibels"] < 20
    found = facts("quantize", f"run={run}", "max_drop=3", "allow_float=true", *words)
    drops = [step["top1_drop"] for step in found["steps"]]
    assert drops[0] > 3 >= drops[-1] == found["top1_drop"]
    assert found["recipe"]["keep"] == [step["layer"] for step in found["steps"][1:]]
    assert {*found["recipe"]["keep"]} <= {*found["in_floats"]}


def test_a_network_that_stays_in_floats_is_no_network_of_integers(run, call, monkeypatch):
    kept = ["conv1", *(f"layer{stage}.0.conv{number}" for stage in (1, 2, 3) for number in (1, 2))]
    monkeypatch.setattr(session_of_quantize, "Recipe", functools.partial(Recipe, keep=kept))
    words = ("quantize", f"run={run}", "images=64", "threads=1", "device=cpu")
    status, out, said = call(*words)
    assert (status, out) == (1, "")
    assert re.search(
        r"only \d+ % of the multiplications of .* would be in integers, and its tensors would take 0\.\d\d", said
    )
    assert "needs allow_float=true. In floats are: aten.conv2d.default (7)" in said
    assert not (run / "quantized").exists()
    assert call(*words, "allow_float=true")[0] == 0
    assert (run / "quantized").exists()


def refused(call, *words):
    status, out, err = call(*words)
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bits=1"], "bits=1 is not possible: integers have 2 to 8 bits."),
        (["images=0"], "images=0 is too small: it takes 1 or more."),
        (["images=1438"], "images=1438 is more than the 1,437 training images that there are."),
        (["calibration=max"], "calibration=max is not known: it takes minmax, percentile, mse."),
        (["max_drop=-1"], "max_drop=-1.0 is not a number of points"),
        (["engine=tpu"], "engine=tpu is not known: it takes auto, reference, x86, onnxruntime, cuda."),
        (["export=tflite"], "export=tflite is not known: it takes onnx."),
        (["reduce_range=maybe"], "reduce_range=maybe is not known: it takes auto, true, false."),
        (["k=4"], "k= cannot be given with a recorded run"),
        (["state_file=w.safetensors"], "both were given: it takes one of run=DIR"),
    ],
)
def test_mistakes_in_words(digits_runs, call, words, sentence):
    assert sentence in refused(call, "quantize", f"run={digits_runs / 'seed0'}", "device=cpu", "threads=1", *words)
    assert not (digits_runs / "seed0" / "quantized").exists()


def test_nothing_is_named(call):
    assert "nothing was named to quantize" in refused(call, "quantize")
    assert "belongs to no run: give the output directory" in refused(call, "quantize", "state_file=w.safetensors")


def test_a_diverged_run(run, call):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "status": "diverged"}))
    assert "diverged: its last weights predict by chance" in refused(call, "quantize", f"run={run}", "device=cpu")


def test_weights_that_are_not_finite(run, call):
    weights = load_file(run / "model.safetensors")
    weights["conv1.weight"][0] = torch.nan
    save_file(weights, run / "model.safetensors")
    sentence = refused(call, "quantize", f"run={run}", "device=cpu", "threads=1")
    assert "1 tensors of this network, conv1.weight first, hold NaN" in sentence


def test_an_extra_that_is_not_installed(run, call, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    sentence = refused(call, "quantize", f"run={run}", "engine=onnxruntime", "device=cpu", "threads=1")
    assert "engine=onnxruntime needs onnx: " in sentence
    sentence = refused(call, "quantize", f"run={run}", "export=onnx", "device=cpu", "threads=1")
    assert "export=onnx needs onnx: " in sentence
    assert not (run / "quantized").exists()  # it is said before the work is done


def test_integers_that_are_not_there(digits_runs, call):
    sentence = refused(call, "eval", f"run={digits_runs / 'seed1'}", "quantized=true", "device=cpu", "threads=1")
    assert "quantized has no integer network: make it first, with `largebatch quantize run=…`." in sentence


def spoil_tensors(directory):
    path = directory / "quantized" / "network.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def spoil_schema(directory):
    path = directory / "quantized" / "network.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))


def spoil_weights(directory):
    weights = load_file(directory / "model.safetensors")
    weights["fc.bias"] += 1
    save_file(weights, directory / "model.safetensors")


def spoil_target(directory):
    path = directory / "quantized" / "network.json"
    path.write_text(path.read_text().replace("aten.flatten.using_ints", "os.system"))


def spoil_overload(directory):
    path = directory / "quantized" / "network.json"
    path.write_text(path.read_text().replace("aten.flatten.using_ints", "aten.flatten.using_hands"))


def spoil_source(directory):
    path = directory / "quantized" / "network.json"
    path.write_text(path.read_text().replace('"source":', '"sources":'))


def forge(directory, change):
    """Change an artifact, and its hash with it, as who means harm would."""
    path, numbers = (directory / "quantized" / name for name in ("network.json", "network.safetensors"))
    description, tensors = json.loads(path.read_text()), load_file(numbers)
    change(description, tensors)
    save_file(tensors, numbers)
    description["tensors_sha256"] = hashlib.sha256(numbers.read_bytes()).hexdigest()
    path.write_text(json.dumps(description))


def forge_bias(directory):
    forge(directory, lambda description, tensors: tensors.update({"fc:bias": tensors["fc:bias"][:1].clone()}))


def forge_operator(directory):
    forge(directory, lambda description, tensors: description["nodes"][1].update(operator="modules"))


def forge_input(directory):
    forge(directory, lambda description, tensors: description["nodes"][1].update(inputs=["fc"]))


def forge_file(directory):
    forge(directory, lambda description, tensors: description["nodes"][-2]["attributes"].update(target=FROM_FILE))


FROM_FILE = "aten.from_file.default"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_tensors, "network.safetensors is not what network.json was written with: it is damaged."),
        (spoil_schema, "has schema 2, and this version of largebatch reads 1."),
        (spoil_weights, "was made of another weights than the run has (weights_sha256 "),
        (spoil_target, "does not describe a network (ValueError('os.system is no operator'))"),
        (spoil_overload, "has no overload name 'using_hands'"),
        (spoil_source, "was made of another weights than the run has (weights_sha256 None, and here"),
        (forge_bias, "does not describe a network (ValueError('fc has tensors of other shapes or types'))"),
        (forge_operator, "does not describe a network (ValueError('conv1 is modules, or there twice'))"),
        (forge_input, "does not describe a network (KeyError('fc'))"),
        (forge_file, f"does not describe a network (ValueError('{FROM_FILE} is no operator'))"),
    ],
)
def test_integers_of_something_else(made, tmp_path, call, spoil, sentence):
    directory = shutil.copytree(made, tmp_path / "run")
    spoil(directory)
    said = refused(call, "eval", f"run={directory}", "quantized=true", "device=cpu", "threads=1")
    assert sentence in said
    assert "Make it again with `largebatch quantize`." in said


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_place_that_is_a_file(run, call, below):
    words = ("quantize", f"run={run}", f"out={run / 'config.yaml'}{below}", "device=cpu", "threads=1")
    assert f"cannot be written: {run / 'config.yaml'} is a file. Name a directory" in refused(call, *words)


def test_a_place_that_may_only_be_read(run, call, monkeypatch):
    access = os.access
    # A chmod would not do: root writes where nobody may.
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and access(path, mode))
    sentence = refused(call, "quantize", f"run={run}", "device=cpu", "threads=1")
    assert f"{run / 'quantized'} cannot be written: {run} may only be read." in sentence


def test_onnx_and_a_place_of_ones_own(digits_runs, tmp_path, call):
    onnx = pytest.importorskip("onnx")
    words = ("weights=best", "images=16", "export=onnx", f"out={tmp_path / 'there'}", "threads=1", "device=cpu")
    status, out, _ = call("quantize", f"run={digits_runs / 'stopped'}", *words)
    assert status == 0
    assert "12 in integers, 0 in floats: none" in out
    assert onnx.load(tmp_path / "there" / "network.onnx").graph.input[0].name == "images"
    without = [word for word in words if word != "export=onnx"]
    assert call("quantize", f"run={digits_runs / 'stopped'}", *without, "bits=7")[0] == 0
    assert not (tmp_path / "there" / "network.onnx").exists()  # it was of another network


def test_what_cannot_be_written_to_onnx_leaves_nothing_behind(run, call, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr("largebatch.quantization.engines.onnx_export.RESHAPED", ())
    sentence = refused(call, "quantize", f"run={run}", "images=16", "export=onnx", "device=cpu", "threads=1")
    assert "export=onnx is not possible, and nothing was written: flatten is aten.flatten.using_ints" in sentence
    assert not (run / "quantized").exists()


def test_help_teaches(call):
    status, out, _ = call("quantize", "--help")
    assert status == 0
    assert "== Report ==" in out
    assert "calibration=minmax" in out
