import json

import pytest

from largebatch.base.errors import Fault, UserError
from largebatch.records.read import read_provenance
from largebatch.reports.rows import remarks
from largebatch.reports.selection import folded, select


def sentences(selection):
    return tuple(note.text for note in selection.notes)


def chosen(tmp_path, baseline=None, **more):
    return select([str(tmp_path / "runs")], baseline, **more)


def test_seeds_of_one_experiment_are_one_group_wherever_they_lie(record, tmp_path):
    record(10.0, k=8, seed=1), record(12.0, k=8, seed=0), record(20.0, k=16, seed=0)
    record(11.0, k=8, seed=2, parent="runs/another/place", device="NVIDIA H200")
    selection = chosen(tmp_path)
    assert [(group.k, group.errors) for group in selection.groups] == [(8, (12.0, 10.0, 11.0)), (16, (20.0,))]
    assert selection.baseline is selection.groups[0]  # kn = 256 = lr.base_minibatch
    assert selection.differing == ("k",)
    assert selection.notes == selection.corrupt == ()
    assert len(selection.runs) == 4


def test_the_baseline_comes_first_then_the_minibatch(record, tmp_path):
    for k in (4, 32, 8, 16):
        record(k=k)
    record(k=8, n=16)
    shown = [(group.k, group.n) for group in chosen(tmp_path, "k=16").groups]
    assert shown == [(16, 32), (8, 16), (4, 32), (8, 32), (32, 32)]


def test_unfinished_diverged_and_resumed_runs_are_said_and_have_no_error(record, tmp_path):
    record(10.0, seed=0)
    going = record([50.0, 40.0], seed=1, status="running")
    lost = record([80.0, 90.0, 95.0], seed=2, status="diverged")
    again = record(11.0, seed=3, starts=3)
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "iter')
    (group,) = chosen(tmp_path).groups
    assert group.errors == (10.0, 11.0)
    assert [[run.seed for run in runs] for runs in (group.finished, group.unfinished, group.diverged)] == [
        [0, 3],
        [1],
        [2],
    ]
    assert sentences(chosen(tmp_path)) == (
        f"{going} is unfinished (running, 2 of 6 epochs): it counts in no figure.",
        f"{lost} diverged after 3 epochs: it has no final error.",
        f"{going}: the last line of metrics.jsonl is cut short, and was left out.",
        f"{again} was resumed 2 times.",
    )


def test_a_pitfall_is_an_experiment_of_its_own(record, tmp_path):
    record(10.0), record(12.0, settings={"pitfall.name": "decay_bn"})
    selection = chosen(tmp_path)
    assert [group.label for group in selection.groups] == [
        "kn = 256, η = 0.1, no warmup",
        "kn = 256, η = 0.1, no warmup, pitfall decay_bn",
    ]
    assert selection.baseline is selection.groups[0]


def test_two_records_of_one_run_count_once(record, tmp_path):
    first = record(10.0, seed=0, parent="runs/a")
    equal = record(10.0, seed=0, parent="runs/b")
    other = record(11.0, seed=0, parent="runs/c")
    unfinished = record([50.0], seed=0, parent="runs/0", status="running")
    selection = chosen(tmp_path)
    (group,) = selection.groups
    assert group.errors == (10.0,)
    assert [run.directory for run in group.duplicates] == [equal, other, unfinished]
    assert sentences(selection) == (
        f"{equal} is a record of the same run as {first}, with the same numbers: it is counted once.",
        f"{other} is a record of the same run as {first}, with other numbers: it is counted once.",
        f"{unfinished} is a record of the same run as {first}, with other numbers: it is counted once.",
    )


def test_a_warmup_without_effect_makes_no_other_experiment(record, tmp_path):
    none = record(10.0, seed=0)
    gradual = record(10.0, seed=0, settings={"warmup.name": "gradual"})  # kη = η: nothing to warm up to
    record(11.0, seed=1, settings={"warmup.name": "gradual"})
    record(20.0, k=16, settings={"warmup.name": "gradual"})
    record(21.0, k=16)
    selection = chosen(tmp_path)
    assert [(group.minibatch, group.warmup, group.errors) for group in selection.groups] == [
        (256, "none", (10.0, 11.0)),
        (512, "none", (21.0,)),
        (512, "gradual", (20.0,)),
    ]
    counted, other = sorted([gradual, none])  # which of the two counts does not matter
    assert sentences(selection) == (
        f"{other} is the same experiment and seed (the same rate at every iteration, and equal in all else) as "
        f"{counted}, with the same numbers: it is counted once.",
    )
    assert chosen(tmp_path, "k=8,warmup=gradual").baseline.k == 8  # by either name


def test_runs_whose_rates_are_equal_are_one_row_however_the_rates_are_described(record, tmp_path):
    """A warmup that rounds to no iteration, milestones that fall on one iteration, a scaling without effect."""
    record(10.0, k=44, seed=0)  # ten iterations an epoch
    record(10.0, k=44, seed=1, settings={"warmup.name": "gradual", "warmup.epochs": 0.04})
    record(10.0, k=44, seed=2, settings={"warmup.name": "constant", "warmup.epochs": 0.04})
    record(10.0, k=44, seed=3, settings={"lr.scaling": "none", "lr.base": 0.1 * 44 / 8})
    record(30.0, k=44, settings={"warmup.name": "gradual", "warmup.epochs": 0.06})
    record(40.0, k=44, settings={"schedule.milestones": (2.02, 2.04)})
    record(40.0, k=44, seed=1, settings={"schedule.milestones": (1.98, 2.0)})
    selection = chosen(tmp_path, "none")
    found = sorted((len(group.runs), group.warmup, group.errors[0]) for group in selection.groups)
    assert found == [(1, "gradual", 30.0), (2, "none", 40.0), (4, "none", 10.0)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("k=16,warmup=none,lr.base=0.1", (16, "none", 0.1)),
        ("k=16,warmup.name=gradual,lr.base=0.1", (16, "gradual", 0.1)),
        ("kn=256", (8, "none", 0.1)),
        ("rate=0.6000000000000001", (16, "none", 0.3)),
        ("rate=0.6", (16, "none", 0.3)),
        ("lr.base=0.3", (16, "none", 0.3)),
        ("lr.base=0.1,dataset=digits,model.zero_gamma=true,k=8", (8, "none", 0.1)),
        ("schedule.milestones=[2.0,4.0,5.333333333333333],kn=256", (8, "none", 0.1)),
    ],
)
def test_a_filter_names_one_group(record, tmp_path, text, found):
    record(10.0, k=8), record(11.0, k=16), record(12.0, k=16, settings={"warmup.name": "gradual"})
    record(13.0, k=16, settings={"lr.base": 0.3})
    baseline = chosen(tmp_path, text).baseline
    assert (baseline.k, baseline.warmup, baseline.settings["lr.base"]) == found


def test_a_directory_names_the_baseline(record, tmp_path):
    record(10.0, k=8, seed=0), record(10.0, k=8, seed=1)
    own = record(11.0, k=16, seed=0)
    record(k=16, seed=1)
    outside = record(k=32, seed=0, parent="elsewhere")
    group = chosen(tmp_path, str(own)).baseline
    assert (group.k, len(group.runs)) == (16, 2)  # with its other seeds
    selection = chosen(tmp_path, str(tmp_path / "elsewhere"))
    assert [run.directory for run in selection.baseline.runs] == [outside]
    assert len(selection.groups) == 3
    with pytest.raises(UserError, match=r"runs fits 2 groups of runs: choose one of baseline=k=8, baseline=k=16\.$"):
        select([str(tmp_path / "runs"), str(outside)], str(tmp_path / "runs"))


def test_no_comparison_needs_no_baseline(record, tmp_path):
    record(k=16), record(k=32)
    selection = chosen(tmp_path, "none")
    assert selection.baseline is None
    assert [group.k for group in selection.groups] == [16, 32]


@pytest.mark.parametrize(
    ("baseline", "sentence"),
    [
        (
            None,
            "the default, kn = lr.base_minibatch, fits none of these runs: take baseline=k=16,warmup=none, "
            "baseline=k=16,warmup=gradual, baseline=k=32, or baseline=none for no comparison.",
        ),
        (
            "k=16",
            "baseline=k=16 fits 2 groups of runs: choose one of baseline=k=16,warmup=none, "
            "baseline=k=16,warmup=gradual.",
        ),
        (
            "k=64",
            "baseline=k=64 fits none of these runs: take baseline=k=16,warmup=none, baseline=k=16,warmup=gradual, "
            "baseline=k=32, or baseline=none for no comparison.",
        ),
        (
            "kk=8",
            "baseline=kk=8: 'kk' is not a setting of these runs. Did you mean 'k'? It takes the keys that "
            "`largebatch train --help` lists, and kn and rate.",
        ),
        ("k=16,k=32", "baseline=k=16,k=32 gives k twice: give it once."),
        (
            "k8",
            "baseline=k8 is neither a directory nor settings: it takes some such as k=8 or k=8,warmup=none, the "
            "directory of a run, or none for no comparison.",
        ),
    ],
)
def test_a_baseline_that_is_not_one(record, tmp_path, baseline, sentence):
    record(20.0, k=16), record(21.0, k=16, settings={"warmup.name": "gradual"}), record(22.0, k=32)
    with pytest.raises(UserError) as error:
        chosen(tmp_path, baseline)
    assert str(error.value) == sentence


def test_candidates_with_equal_numbers_are_as_good_as_one(record, tmp_path):
    record(10.0, seed=0), record(11.0, seed=1)
    other = {"optimizer.trust_coefficient": 0.5}  # SGD has no use for it
    record(10.0, seed=0, settings=other), record(11.0, seed=1, settings=other)
    selection = chosen(tmp_path)
    assert selection.baseline is selection.groups[0]
    assert len(selection.groups) == 2
    record(12.0, seed=2, settings=other)
    with pytest.raises(UserError, match=r"fits 2 groups of runs: choose one of baseline=optimizer.trust_coefficient="):
        chosen(tmp_path)


def test_many_candidates_are_not_all_listed(record, tmp_path):
    for k in range(16, 25):
        record(k=k)
    with pytest.raises(UserError, match=r"take baseline=k=16, .*, baseline=k=21 and 3 more, or baseline=none"):
        chosen(tmp_path)


def test_what_cannot_be_compared_is_refused(record, tmp_path):
    record(k=8), record(k=16, settings={"model.zero_gamma": False})
    chosen(tmp_path)  # another start of the same network is what Table 2b compares
    record(k=16, settings={"epochs": 7, "dataset.train_images": 1000}, status="running")
    with pytest.raises(UserError) as error:
        chosen(tmp_path)
    assert str(error.value) == (
        "These runs are not comparable, they differ in epochs (6, 7), dataset.train_images (1437, 1000): choose fewer "
        "with runs=…, or insist with allow_mixed=true."
    )
    assert len(chosen(tmp_path, allow_mixed=True).groups) == 3
    assert len(chosen(tmp_path, "none").groups) == 3


def test_a_corrupt_record_is_left_out_by_name(record, tmp_path):
    record(seed=0)
    broken = record(seed=1)
    (broken / "provenance.json").write_text("{")
    selection = chosen(tmp_path)
    assert [run.seed for run in selection.runs] == [0]
    assert selection.corrupt == ((broken, "provenance.json is not JSON"),)


def test_nothing_but_corrupt_records_is_a_fault(record, tmp_path):
    broken = record()
    (broken / "summary.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(Fault) as error:
        chosen(tmp_path)
    assert str(error.value) == f"{broken} cannot be read: summary.json has no status."


def test_only_keeps_the_baseline_and_what_has_one_of_each_value(record):
    for k in (1, 2, 4):
        record(k=k, settings={"warmup.name": "gradual"})
    record(k=4, settings={"lr.base": 0.2})
    record(k=8, settings={"lr.base": 0.2, "dataset.flip": True})
    place = str(record(k=2, settings={"optimizer.nesterov": False}).parent)

    def kept(only):
        chosen = select([place], "k=1", allow_mixed=True, only=only)
        return [(group.k, group.settings["lr.base"], group.settings["optimizer.nesterov"]) for group in chosen.groups]

    assert kept("k=4,8,lr.base=0.2") == [(1, 0.1, True), (4, 0.2, True), (8, 0.2, True)]
    assert kept("optimizer.nesterov=true,k=2") == [(1, 0.1, True), (2, 0.1, True)]
    for only, sentence in (
        ("k=16", r"^only=k=16 fits none of these runs\.$"),
        ("k8", r"^only=k8 is not settings: it takes some such as k=8 or k=8,warmup=none\.$"),
        ("kk=8", r"^only=kk=8: 'kk' is not a setting of these runs\."),
    ):
        with pytest.raises(UserError, match=sentence):
            kept(only)


def test_many_notes_of_a_kind_are_one_with_their_count(record, tmp_path):
    first = record(10.0, seed=0, parent="runs/a")
    again = [record(10.0, seed=0, parent=f"runs/b{number}") for number in range(5)]
    lost = [record([50.0], seed=seed, status="diverged") for seed in (1, 2, 3)]
    selection = chosen(tmp_path)
    assert folded(selection.notes) == [
        *(f"{one} diverged after 1 epochs: it has no final error." for one in lost),
        f"5 records are of the same run as another one, with the same numbers, and are counted once: {again[0]}, "
        f"{again[1]} and 3 more (notes=all lists them).",
    ]
    every = remarks(selection, every=True)
    assert [f"{one} is a record of the same run as {first}, with the same numbers: it is counted once." in every
            for one in again] == [True] * 5  # fmt: skip


def test_image_folders_are_told_apart_by_digest_and_without_one_by_root(record, tmp_path):
    folder = {"dataset.name": "imagefolder", "dataset.crop": "resized", "dataset.train_images": None}

    def add(seed, root, digest=None, parent="runs"):
        directory = record(settings={**folder, "dataset.digest": digest}, seed=seed, parent=f"{parent}/{root}")
        (directory / "config.yaml").write_text(f'dataset:\n  root: "/{root}"\n')
        return directory

    old = {(root, seed): add(seed, root) for root in ("one", "two") for seed in (0, 1)}
    new = {(root, seed): add(seed, root, "abc") for root in ("one", "three") for seed in (2, 3)}
    add(4, "one", "def")
    groups = select([str(tmp_path / "runs")], "none").groups
    members = [{run.directory for run in group.runs} | {run.directory for run in group.duplicates} for group in groups]
    assert {old["one", 0], old["one", 1]} in members
    assert {old["two", 0], old["two", 1]} in members
    assert set(new.values()) in members
    assert len(groups) == 4
    assert len({group.hash for group in groups}) == 4
    assert read_provenance(old["one", 0])["experiment_hash"] == read_provenance(old["two", 0])["experiment_hash"]
