"""``largebatch predict run=…`` says which k accuracy bears, by the answer of a probed run."""

import json

import pytest
from test_answer import BASELINE, line

from largebatch.base.errors import UserError
from largebatch.cli.commands.predict import run as predict
from largebatch.records.write import write_probes
from largebatch.reports.answer import answer, open_probed


@pytest.fixture
def probed(record):
    """Return a function that records a probed run of the model, whose answer is safe up to 3 and unsafe beyond 5."""

    def make(model="resnet50"):
        directory = record([10.0] * 90, k=1, settings={**BASELINE, "model.name": model})
        write_probes(directory, [line(epoch, largest=3) for epoch in (6, 7)])
        return directory

    return make


def test_every_k_is_held_against_the_answer(probed, capsys):
    directory = probed()
    said = answer(open_probed(directory))
    assert (said.safe, said.unsafe) == (3, 5)  # tr Σ / |G|² = 160 samples are 5 workers of 32
    assert predict(["k=2,4,8", f"run={directory}", "format=json"]) == 0
    (sentence,) = json.loads(capsys.readouterr().out)["answer"]
    assert sentence == (
        f"Accuracy, by the probe of {directory}: k=2 should match the baseline (up to k=3); k=4 in doubt (up to k=5); "
        "k=8 should not match it."
    )


def test_a_deadline_and_what_accuracy_says_of_it(probed, capsys):
    assert predict(["deadline=65min", "k=128,256", f"run={probed()}"]) == 0
    least, accuracy = capsys.readouterr().out.splitlines()[-2:]
    assert least.startswith("65min takes k=256 or more")
    assert accuracy.endswith(": k=256 should not match it.")


def test_without_a_probed_run_nothing_is_said_of_accuracy(capsys):
    assert predict(["k=8"]) == 0
    assert (
        "nothing about accuracy: give run=… of a run that `largebatch probe` measured"
        in capsys.readouterr().out.splitlines()[-1]
    )


def test_a_probe_of_another_network_is_refused(probed):
    with pytest.raises(UserError, match="resnet8 is wanted, but profile=paper is of resnet50"):
        predict([f"run={probed('resnet8')}"])
