"""What a sweep's directory says it is made of, and what is refused before anything runs."""

import json
from pathlib import Path

import pytest

from largebatch.base.errors import UserError
from largebatch.launch import manifest
from largebatch.launch.manifest import Arm, Resources, Task, plan, read

SWEEP = Path("runs/sweeps/first")


def lines() -> list[dict]:
    return [json.loads(line) for line in (SWEEP / "manifest.jsonl").read_text().splitlines()]


def edit(place: int, **values: object) -> None:
    edited = lines()
    edited[place] |= values
    (SWEEP / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))


def names(tasks: list[Task]) -> list[tuple[int, str]]:
    return [(task.number, task.words) for task in tasks]


def test_what_was_planned_is_what_is_read(arm):
    planned = plan(SWEEP, [arm("k=1"), arm("k=2", "dataset.root=scans")], lambda config: Resources(gpus=config.k))
    assert read(SWEEP) == planned
    assert names(planned) == [(0, "k=1"), (1, "k=2 dataset.root=scans")]
    assert [task.resources.gpus for task in planned] == [1, 2]
    for task in planned:
        assert task.directory.parent == SWEEP
        assert task.directory.name.endswith(task.hash[:8])
        assert task.config.resume
        assert manifest.log_of(SWEEP, task.number).parent.is_dir()
    assert planned[1].config.dataset.root == str(Path("scans").absolute())
    assert [Path(line["config"]["run_dir"]).parts for line in lines()] == [(task.directory.name,) for task in planned]


def test_a_sweep_can_be_moved(arm):
    plan(SWEEP, [arm("k=1")])
    moved = SWEEP.rename("elsewhere")
    (task,) = read(moved)
    assert task.directory.parent == moved


def test_arms_that_are_known_keep_their_number_and_new_ones_are_appended(arm):
    plan(SWEEP, [arm("k=1"), arm("k=2")])
    later = plan(SWEEP, [arm("k=4"), arm("k=2", "threads=1", "sweep.force=true")])
    assert names(later) == [(2, "k=4"), (1, "k=2 threads=1 sweep.force=true")]
    assert names(read(SWEEP)) == [(0, "k=1"), (1, "k=2 threads=1 sweep.force=true"), (2, "k=4")]
    assert later[1].config.threads == 1
    assert not later[1].config.sweep.force  # that call's wish, not of every start to come


def test_a_refused_arm_is_named_and_nothing_is_written(arm, tmp_path):
    broken = arm("k=8")
    broken = Arm("k=8 processes=3", {**broken.values, "processes": 3})
    with pytest.raises(
        UserError, match=r"^nothing was started, because of the arm 'k=8 processes=3': processes=3 does"
    ):
        plan(SWEEP, [arm("k=1"), broken])
    assert list(tmp_path.iterdir()) == []


def test_two_arms_of_one_run_directory_are_refused(arm):
    sentence = r"the arms 'threads=1' and 'threads=2' would both be recorded in runs/sweeps/first/k8-.* own run_dir"
    with pytest.raises(UserError, match=sentence):
        plan(SWEEP, [arm("threads=1"), arm("threads=2")])
    assert len(plan(SWEEP, [arm("threads=1", "run_dir=a"), arm("threads=2", "run_dir=b")])) == 2


def test_a_run_directory_of_another_task_is_refused(arm):
    plan(SWEEP, [arm("k=1", "run_dir=here")])
    with pytest.raises(UserError, match=r"because here belongs to task 0 of this sweep, 'k=1 run_dir=here', which is"):
        plan(SWEEP, [arm("k=2", "run_dir=here")])


def test_a_run_directory_outside_was_given_by_the_arms_own_words(arm, tmp_path):
    (task,) = plan(SWEEP, [arm("k=1", "run_dir=elsewhere/k1")])
    assert task.directory == Path("elsewhere/k1")
    assert read(SWEEP)[0].directory == tmp_path / "elsewhere" / "k1"
    with pytest.raises(UserError, match="would be recorded in elsewhere/k2, outside of its sweep's runs/sweeps/first"):
        plan(SWEEP, [Arm("k=2", {**arm("k=2").values, "run_dir": "elsewhere/k2"})])


@pytest.mark.parametrize("place", [SWEEP, SWEEP.parent])
def test_a_run_directory_that_holds_the_sweep_is_refused(arm, place):
    with pytest.raises(UserError, match=rf"would be recorded in {place}, which contains the sweep {SWEEP}: give"):
        plan(SWEEP, [arm("k=1", f"run_dir={place}")])
    assert not SWEEP.exists()


@pytest.mark.parametrize("place", ["../../etc", "/etc", "inside/../../out"])
def test_a_manifest_edited_to_write_elsewhere_is_refused(arm, place):
    plan(SWEEP, [arm("k=1"), arm("k=2")])
    edit(1, config={**lines()[1]["config"], "run_dir": place})
    with pytest.raises(
        UserError, match=r"^line 2 of runs/sweeps/first/manifest.jsonl cannot be used: the arm 'k=2' .*"
    ):
        read(SWEEP)


def test_a_link_that_leads_out_of_the_sweep_is_refused(arm, tmp_path):
    (task,) = plan(SWEEP, [arm("k=1")])
    task.directory.symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside of its sweep's"):
        read(SWEEP)


@pytest.mark.parametrize(
    ("edited", "sentence"),
    [
        ({"number": 0}, "line 2 of .* cannot be used: task 0 stands in the place of task 1"),
        ({"hash": "0" * 64}, "does not have its hash"),
        ({"config": {}}, "'config.k', .* are missing from the configuration"),
        ({"resources": {"gpu": 1}}, r"'resources.gpu' is not a key of this configuration. Did you mean 'gpus'\?"),
        ({"words": None}, "words=null is of the wrong kind: it takes a word"),
    ],
)
def test_an_edited_line_is_refused(arm, edited, sentence):
    plan(SWEEP, [arm("k=1"), arm("k=2")])
    edit(1, **edited)
    with pytest.raises(UserError, match=sentence):
        read(SWEEP)


def test_two_lines_of_one_run_directory_are_refused(arm):
    plan(SWEEP, [arm("k=1"), arm("k=2")])
    edit(1, config={**lines()[1]["config"], "run_dir": lines()[0]["config"]["run_dir"]})
    with pytest.raises(UserError, match="another task is recorded in the same place"):
        read(SWEEP)


@pytest.mark.parametrize("text", ["{", "3", '"task"', "[]", "", "NaN"])
def test_a_line_that_is_no_task(arm, text):
    plan(SWEEP, [arm("k=1")])
    (SWEEP / "manifest.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match=r"^line 1 of .*manifest.jsonl cannot be used: "):
        read(SWEEP)


def test_where_there_is_no_sweep(arm):
    with pytest.raises(UserError, match=r"^there is no directory runs/sweeps/first: give a sweep's, such as one in"):
        read(SWEEP)
    plan(SWEEP, [arm("k=1")])
    with pytest.raises(UserError, match=r"no directory runs/sweeps/frist: .* Sweeps there: runs/sweeps/first\.$"):
        read(SWEEP.with_name("frist"))
    with pytest.raises(UserError, match=r"runs/sweeps holds no manifest.jsonl, .* Sweeps there: runs/sweeps/first\.$"):
        read(SWEEP.parent)


@pytest.mark.parametrize("word", ["2", "-1", "one", "1.0", "", "٣", "../1"])
def test_a_task_is_a_number_in_range(arm, word):
    tasks = plan(SWEEP, [arm("k=1"), arm("k=2")])
    assert manifest.task_of(SWEEP, tasks, "1") == tasks[1]
    with pytest.raises(UserError, match="is not one of runs/sweeps/first: it takes a whole number from 0 to 1"):
        manifest.task_of(SWEEP, tasks, word)


def test_a_sweep_goes_on_that_was_planned_before_a_key_existed(arm):
    plan(SWEEP, [arm("k=1")])
    (line,) = lines()
    del line["config"]["cuda_graphs"], line["config"]["probe"]
    edit(0, config=line["config"])
    (task,) = read(SWEEP)
    assert not task.config.cuda_graphs
    assert task.config.probe.every is None
