"""The commands that read records, as the installed command: they need neither torch nor Hydra."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from unpacked import unpacked

from largebatch.cli import main as cli
from largebatch.config.build import digest

RECORDS = Path(__file__).parents[2] / "results" / "digits-curves"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command line in an empty directory: its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["largebatch", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def records(tmp_path):
    """Return a copy of committed records: kn = 32, and kn = 256 with and without warmup, three seeds each."""
    return unpacked(RECORDS / "runs.jsonl", tmp_path / "records")


def test_a_table_of_real_records(largebatch):
    done = largebatch("table", f"runs={RECORDS}", "format=json", "paper=table1")
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads(done.stdout)
    assert [(row["k"], row["warmup"], row["seeds"]) for row in values["rows"]] == [
        (4, "none", 3),
        (32, "none", 3),
        (32, "gradual", 3),
    ]
    # 0.8333, 0.8333 and 0.2778 % are 3, 3 and 1 of 360 images wrong.
    assert values["rows"][0]["error_mean"] == pytest.approx(100 * 7 / 3 / 360)
    assert values["rows"][0]["verdict"] == "baseline"
    assert {row["error_mean"] for row in values["published"]["rows"]} == {None}


def test_what_takes_long_to_import_is_not():
    program = (
        "import sys; from largebatch.cli.commands.table import TABLE; "
        f"TABLE.run(['runs={RECORDS}', 'paper=table1']); "
        "sys.exit(str({'torch', 'hydra', 'matplotlib', 'scipy.stats', 'sklearn'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"


def test_figures_and_the_page_are_made_without_torch(tmp_path):
    program = (
        "import sys; from largebatch.cli.commands.plot import PLOT; from largebatch.cli.commands.report import REPORT; "
        f"PLOT.run(['curves', 'runs={RECORDS}', 'out={tmp_path / 'curves.pdf'}']); "
        f"REPORT.run(['runs={RECORDS}', 'out={tmp_path / 'report.html'}']); "
        "sys.exit(str({'torch', 'hydra', 'matplotlib.pyplot'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"


def test_published_rows_need_no_run(call):
    status, out, err = call("table", "paper=figure1")
    assert (status, err) == (0, "")
    assert out.startswith("Figure 1: error against minibatch size, as published\n")


def test_help_defines_every_figure(call):
    status, out, _ = call("table", "--help")
    assert status == 0
    for word in ("error", "difference", "verdict", "in band"):
        assert f"\n{word}: " in out


def test_a_corrupt_record_is_named_and_the_rest_is_shown(call, records):
    broken = sorted(path for path in records.iterdir() if path.is_dir())[0]
    (broken / "provenance.json").write_text("{")
    status, out, err = call("table", "runs=records")
    assert status == 1
    name = broken.name
    assert err == f"largebatch: records/{name} was left out, its record is corrupt: provenance.json is not JSON.\n"
    assert len([line for line in out.splitlines() if line.startswith((" 4", "32"))]) == 3


def test_nothing_but_corrupt_records_is_a_fault(call, records):
    for path in records.glob("*/summary.json"):
        path.write_text("")
    status, out, err = call("table", "runs=records")
    assert (status, out) == (1, "")
    assert "summary.json is not JSON" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["runs=elsewhere"], "runs=elsewhere matches no run: this directory holds records (9 runs)."),
        ([], "runs=runs matches no run: this directory holds records (9 runs)."),
        (
            ["runs=records", "baseline=k=32"],
            "baseline=k=32 fits 2 groups of runs: choose one of baseline=k=32,warmup=none, "
            "baseline=k=32,warmup=gradual.",
        ),
        (
            ["runs=records/k32*"],
            "the default, kn = lr.base_minibatch, fits none of these runs: take baseline=warmup=none, "
            "baseline=warmup=gradual, or baseline=none for no comparison.",
        ),
        (["runs=records", "margin=-1"], "margin=-1 is not a number above 0."),
        (["runs=records", "format=tex"], "format=tex is not known: it takes text, markdown, csv, latex, json."),
        (["paper=table3"], "paper=table3 is not known: it takes table1, … Did you mean 'table1'?"),
        (["run=records"], "'run' is not a key of table: it takes runs, … Did you mean 'runs'?"),
    ],
)
def test_mistakes(call, records, words, sentence):
    status, out, err = call("table", *words)
    start, _, end = sentence.partition("…")
    assert (status, out) == (2, "")
    assert err.startswith(f"largebatch: {start}")
    assert err.endswith(f"{end}\n")


def test_other_data_are_refused_unless_insisted_on(call, records):
    for path in records.glob("k4-*/provenance.json"):
        origin = json.loads(path.read_text())
        origin["experiment"]["dataset"]["train_images"] = 1400
        origin["experiment_hash"] = digest(origin["experiment"])
        origin["run_hash"] = digest({**origin["experiment"], "seed": origin["seed"]})
        path.write_text(json.dumps(origin))
    status, out, err = call("table", "runs=records")
    assert (status, out) == (2, "")
    assert "they differ in dataset.train_images (" in err
    assert "allow_mixed=true" in err
    status, out, _ = call("table", "runs=records", "allow_mixed=true")
    assert status == 0
    assert "  dataset.train_images  " in out


def test_compact_records(call, records):
    status, _, err = call("compact", "runs=records/k4-*", "out=kept")
    assert (status, err) == (0, "3 runs written to kept/runs.jsonl\n")
    assert call("table", "runs=kept")[0] == 0
    status, out, err = call("compact", "runs=records")
    assert (status, out) == (2, "")
    assert err.startswith("largebatch: out= is missing: ")


def test_a_prediction_needs_no_torch(largebatch):
    done = largebatch("predict", "k=8,352", "gpus=8,352", "format=json", PYTHONPROFILEIMPORTTIME="1")
    few, _, many = json.loads(done.stdout)["predictions"]
    assert many["iteration"] / few["iteration"] == pytest.approx(1.12, abs=0.002)
    assert not {"torch", "hydra", "matplotlib"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    done = largebatch("predict", "k=256", "deadline=1min")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "largebatch: deadline=1min is met by no number of GPUs: the shortest run takes 62.5 min"
    )
