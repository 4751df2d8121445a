"""What cannot be evaluated: what was given, what is allowed, what to do; status 2, and nothing recorded."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from largebatch.inference import measure
from largebatch.runtime.placement import Hardware


@pytest.fixture
def sentence(call, runs):
    """Return a function that runs ``largebatch eval`` and returns its sentence."""

    def run(*words):
        status, out, err = call(*words)
        assert (status, out) == (2, ""), err
        assert err.startswith("largebatch: ")
        assert err.count("\n") == 1
        assert not list(runs.glob("*/evaluations.jsonl"))
        return err.removeprefix("largebatch: ").rstrip()

    return run


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_named_is_no_run(runs, sentence):
    assert sentence("run=runs/seed9") == (
        "run=runs/seed9 matches no run: runs holds seed0 (1 run), seed1 (1 run), seed2 (1 run), seed3 (1 run), seed4 "
        "(1 run), seed5 (1 run), stopped (1 run)."
    )
    assert sentence("runs=runs/k8-*").startswith("runs=runs/k8-* matches no run: runs holds seed0 (1 run), ")
    assert sentence("run=runs") == (
        "run=runs is not a run, but contains 7: name one of them, such as run=runs/seed0, or evaluate them all as an "
        "ensemble with runs=runs."
    )
    (runs / "seed0" / "provenance.json").write_text("{")
    assert sentence("run=runs/seed0") == "run=runs/seed0 cannot be read: provenance.json is not JSON."


def test_a_run_without_weights(runs, sentence):
    (runs / "stopped" / "model.safetensors").unlink()
    newest = next((runs / "stopped" / "checkpoints").glob("0*"))
    assert sentence("run=runs/stopped") == (
        "run=runs/stopped (status stopped) does not hold the weights of its end (model.safetensors): it has "
        f"weights={newest} and weights=best."
    )
    shutil.rmtree(runs / "stopped" / "checkpoints")
    assert sentence("run=runs/stopped", "weights=best") == (
        "run=runs/stopped (status stopped) does not hold a checkpoint of its best epoch: it has no weights at all, as "
        "a compact record."
    )
    assert sentence("run=runs/seed0", "weights=nowhere.safetensors") == (
        "weights=nowhere.safetensors is not a file: it takes one of safetensors."
    )


def test_weights_that_are_not_whole_or_not_safe(runs, sentence):
    (best,) = (runs / "seed0" / "checkpoints").glob("best-*")
    damaged = bytearray(best.read_bytes())
    damaged[-1] ^= 1
    best.write_bytes(damaged)
    assert sentence("run=runs/seed0", "weights=best") == (
        f"{best} is damaged: its content does not match its name. Use other weights."
    )
    torch.save({"weight": torch.zeros(1)}, "w.pt")
    assert sentence("run=runs/seed0", "weights=w.pt").startswith("w.pt cannot be read as safetensors (")
    (runs / "seed0" / "model.safetensors").write_bytes(b"torn")
    assert sentence("run=runs/seed0").startswith("runs/seed0/model.safetensors cannot be read as safetensors (")


def test_weights_of_another_network(runs, sentence):
    state = load_file(runs / "seed0" / "model.safetensors")
    state["fc.weight"], state["head.weight"] = state["fc.weight"][:4], state.pop("conv1.weight")
    save_file(state, "w.safetensors")
    assert sentence("run=runs/seed0", "weights=w.safetensors") == (
        "w.safetensors does not hold the weights of model.name=resnet8 with 10 classes (lacking: conv1.weight; "
        "unknown: head.weight; of another shape: fc.weight): give the network that they are of."
    )


@pytest.mark.parametrize("word", ["lr.base=1", "k=4", "model=resnet20", "++dataset.pad=2", "dataset=synthetic"])
def test_beside_a_run_its_experiment_cannot_be_changed(sentence, word):
    key = word.split("=")[0].lstrip("+")
    assert sentence("run=runs/seed0", word).startswith(
        f"{key}= cannot be given with a recorded run, which is evaluated as it was trained: leave it out. These can: "
        "device, precision, tf32, threads, channels_last, loader.workers, loader.prefetch, dataset.root"
    )


@pytest.mark.parametrize("mode", ["submodule", "model"])
def test_a_budget_below_the_least_names_the_least(facts, sentence, mode):
    said = sentence("run=runs/seed0", f"offload={mode}", "budget=1kB")
    least = int(re.search(r"^budget=1,000 bytes is too small: .* is ([\d,]+)", said)[1].replace(",", ""))
    assert facts("run=runs/seed0", f"offload={mode}", f"budget={least}")["peak_weight_bytes"] == least


def test_a_device_that_is_not_here(monkeypatch, sentence):
    monkeypatch.setattr("largebatch.inference.session.hardware", lambda _: Hardware(2, gpus=0, mps=False, bf16=False))
    assert sentence("run=runs/seed0", "device=cuda") == (
        "device=cuda was given, but this machine has no usable CUDA GPU: use device=cpu or auto."
    )
    assert "has no bf16 arithmetic on this machine: use precision=fp32." in sentence("run=runs/seed0", "precision=bf16")


def test_other_images_than_the_record_knows(runs, sentence):
    change(runs / "seed0" / "summary.json", val_images=361)
    assert sentence("run=runs/seed0") == (
        "runs/seed0 was validated on 361 images, and there are 360 now: other data, and another error. Restore them, "
        "or say where they are with dataset.root."
    )


def test_runs_that_are_no_ensemble(runs, sentence):
    path = runs / "seed1" / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("mean: [0.305]", "mean: [0.5]"))
    assert sentence("runs=runs/seed0,runs/seed1") == (
        "these runs are no ensemble, they differ in dataset.mean ((0.305,), (0.5,)): choose runs of the same images "
        "and arithmetic (precision=… sets one for all)."
    )
    path.write_text(text.replace('name: "none"', 'name: "padded_eval"').replace("k: 2", "k: 7"))
    assert sentence("runs=runs/seed0,runs/seed1").startswith("these runs are no ensemble: pitfall=padded_eval counts")
    assert sentence("runs=runs/seed0,runs/seed1", "weights=runs/seed0/model.safetensors") == (
        "weights=runs/seed0/model.safetensors is of one run: with runs= it takes last or best."
    )


def test_a_batch_larger_than_in_training(sentence):
    assert sentence("run=runs/seed0", "batch=512") == (
        "batch=512 is above 256, the batches in which training validates: take 256 or less."
    )


def test_more_than_one_process(monkeypatch, sentence):
    monkeypatch.setenv("RANK", "0")
    assert sentence("run=runs/seed0") == "eval is one process on one device: run it without torchrun."


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ([], "out of memory with offload=none: use offload=model or submodule, or a smaller batch."),
        (["offload=model"], "out of memory with offload=model: use offload=submodule, or a smaller batch."),
        (["offload=submodule"], "out of memory with offload=submodule: use a smaller batch."),
        (["offload=model", "compare=true"], "with offload=none: use no compare=true, which keeps all weights there."),
    ],
)
def test_too_little_memory(monkeypatch, sentence, words, advice):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measure, "evaluate", fail)
    assert sentence("run=runs/seed0", *words).endswith(advice)


def test_a_lost_loader(monkeypatch, call, runs):
    def fail(*arguments, **options):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(measure, "evaluate", fail)
    status, out, err = call("run=runs/seed0")
    assert (status, out) == (1, "")
    assert "largebatch: a loader process is gone: DataLoader worker (pid 7)" in err
    assert "loader.workers" in err
    assert "Traceback" not in err


def test_the_model_can_be_offloaded_again_after_a_failure(monkeypatch, sentence, facts):
    with monkeypatch.context() as patch:
        patch.setattr(measure, "evaluate", lambda *arguments, **options: {}["nothing"])
        with pytest.raises(KeyError):
            facts("run=runs/seed0", "offload=submodule")
    assert facts("run=runs/seed0", "offload=submodule")["uploads"]


def test_interrupted(monkeypatch, call, runs):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "evaluate", interrupt)
    assert call("run=runs/seed0", "offload=model")[0] == 130
    assert not (runs / "seed0" / "evaluations.jsonl").exists()
