"""``largebatch predict`` as it is called: answers, and mistakes in one sentence."""

import json
from pathlib import Path

import pytest

from largebatch.base.errors import UserError
from largebatch.cli.commands.plot import run as plot
from largebatch.cli.commands.predict import run
from largebatch.cost_model.profile import SHIPPED

RECORDS = Path(__file__).parents[2] / "results" / "digits-curves"


@pytest.fixture
def answer(capsys):
    """Return a function from words to what is printed as JSON."""

    def ask(*words):
        assert run([*words, "format=json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def profile(tmp_path):
    """Return a function that writes the paper's profile, changed, and returns the word that names it."""

    def write(**changes):
        values = json.loads((SHIPPED / "paper.json").read_text(encoding="utf-8")) | changes
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return f"profile={path}"

    return write


def test_the_papers_machine(answer):
    told = answer("k=8,352", "gpus=8,352")
    assert [(one["k"], one["gpus"]) for one in told["predictions"]] == [(8, 8), (352, 8), (352, 352)]
    few, _, many = told["predictions"]
    assert many["iteration"] / few["iteration"] == pytest.approx(1.12, abs=0.002)
    parts = ("computing", "exchange", "stragglers", "loading")
    assert sum(many[part] for part in parts) == pytest.approx(many["iteration"])


def test_by_default_every_worker_has_a_gpu(answer):
    (only,) = answer()["predictions"]
    assert (only["k"], only["gpus"], only["nodes"], only["minibatch"]) == (256, 256, 32, 8192)


def test_a_table_for_people(capsys):
    assert run(["k=256", "gpus=256"]) == 0
    first, _, _, head, line, *_ = capsys.readouterr().out.splitlines()
    assert first == "resnet50 of 3×224×224, n=32, fp32, on Tesla P100"
    assert head.split()[:5] == ["k", "GPUs", "nodes", "iteration", "computing"]
    assert line.split()[:5] == ["256", "256", "32", "263.6", "210.3"]


def test_gpus_for_a_deadline(answer):
    told = answer("deadline=65min")
    assert (told["predictions"][0]["k"], told["predictions"][0]["gpus"]) == (256, 256)
    assert told["answer"][0].startswith("65min takes k=256 or more (kn = 8192): on 256 GPUs 62.5 min, 266.7 GPU-hours")
    # With what there is: more workers do not help, as each has the same share of a GPU.
    told = answer("deadline=1.5d", "gpus=8", "k=8,256")
    assert [(one["k"], one["gpus"]) for one in told["predictions"]] == [(8, 8), (256, 8)]


def test_links_are_replaced(answer, profile):
    slow = answer("k=16", "network=1", "latency=100", "algorithm=ring")["predictions"][0]
    assert slow["exchange"] > 10 * answer("k=16")["predictions"][0]["exchange"]
    alone = profile(links=[])
    (one,) = answer(alone, "k=8", "network=50", "latency=12", "gpu_link=160", "gpu_latency=10")["predictions"]
    assert one == answer("k=8")["predictions"][0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["k=1", "gpus=2"], "gpus=2 divides no k of 1: a GPU has whole workers. These divide 1: 1."),
        (["k=4,8", "gpus=8"], "k=4 is divided by no gpus of 8. These divide it: 1, 2, 4."),
        (["k=8,x"], "k=8,x is not a list of whole numbers from 1 to 65536, such as k=8,256."),
        (["gpus=0"], "gpus=0 is not a list of whole numbers from 1 to 65536, such as gpus=8,256."),
        (["model=resnet101"], "resnet101 is wanted, but profile=paper is of resnet50 on Tesla P100."),
        (["device=H200"], "H200 is wanted, but profile=paper is of resnet50 on Tesla P100."),
        (["n=64"], "n=64 is wanted, but profile=paper was measured with n=32"),
        (["profile=papers"], "profile=papers is neither a file nor one of .*paper.* Did you mean 'paper'?"),
        (["profile=there.json"], "profile=there.json is neither a file nor one of"),
        (["deadline=soon"], "deadline=soon is no time: give a number above 0 with s, min, h or d"),
        (["deadline=0h"], "deadline=0h is no time"),
        (
            ["deadline=1min", "k=256"],
            r"deadline=1min is met by no number of GPUs: the shortest run takes 62.5 min, k=256 on 256 GPUs\.",
        ),
        (["deadline=1h", "k=256", "gpus=7"], "No k of 256 is shared evenly by gpus=7 on nodes=any"),
        (["k=65536"], "k=65536 workers of n=32 take 2097152 samples in an iteration, more than the 1281167"),
        (
            ["stragglers=none", "algorithm=tree"],
            "algorithm=tree is not known: it takes ring, halving_doubling, fastest",
        ),
        (["network=0"], "network=0 is not a number above 0."),
        (["gpu=8"], r"'gpu' is not a key of predict: .* Did you mean 'gpus'\?"),
    ],
)
def test_mistakes(words, sentence):
    with pytest.raises(UserError, match=sentence):
        run(words)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema": 2}, "mine.json: schema=2 is not known: this version reads 1"),
        ({"overlap": 1.5}, "overlap=1.5 is no share: it takes 0 to 1"),
        ({"messages_": 8}, r"'messages_' is not a key of this configuration\. Did you mean 'messages'\?"),
        ({"links": [{"between": "racks", "latency_us": 1, "gbit_per_second": 1}]}, "links.between=racks is not known"),
        ({"links": [{"between": "gpus", "latency_us": 1, "gbit_per_second": 1}] * 2}, "links has gpus, gpus twice"),
        ({"passes": []}, "passes has none of one worker"),
        (
            {"passes": [{"workers": 1, "mean_ms": 5, "std_ms": 0, "backward_ms": 6, "steps_ms": []}]},
            "passes.backward_ms=6 is not a part of passes.mean_ms=5",
        ),
    ],
)
def test_a_profile_that_is_none(profile, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run([profile(**changes)])


def test_a_file_that_is_no_profile(tmp_path):
    for text, sentence in (("{", "cannot be read as JSON"), ("[]", "is not a profile")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            run([f"profile={tmp_path / 'x.json'}"])


def test_one_link_alone_needs_both_its_numbers(profile):
    with pytest.raises(UserError, match="does not describe that link: give both network= and latency="):
        run([profile(links=[]), "network=50"])


def test_the_papers_run_time_is_drawn_without_runs(tmp_path, capsys):
    assert plot(["throughput", "paper=true", f"out={tmp_path / 'run-time.svg'}"]) == 0
    assert "predicted, without stragglers" in (tmp_path / "run-time.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["profile=paper"], "resnet8 is wanted, but profile=paper is of resnet50"),
        (["paper=true"], "paper=true draws only the paper's machine: leave runs= out."),
    ],
)
def test_a_figure_of_other_runs(tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence):
        plot(["throughput", f"runs={RECORDS}", f"out={tmp_path / 'a.svg'}", *words])


def test_predictions_are_drawn_beside_runs(tmp_path, profile):
    own = profile(model="resnet8", n=8, train_images=1437)
    assert plot(["throughput", f"runs={RECORDS}", own, "nodes=1", f"out={tmp_path / 'a.svg'}"]) == 0
    assert "<!-- predicted -->" in (tmp_path / "a.svg").read_text(encoding="utf-8")
