"""Arguments of a Python call become the words of a command line, or one sentence."""

from pathlib import Path

import numpy as np
import pytest

import largebatch
from largebatch.api.wording import as_words
from largebatch.cli.compose import compose


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("k", 8, "k=8"),
        ("lr__base", 0.2, "lr.base=0.2"),
        ("lr__base", 1e-05, "lr.base=1e-05"),
        ("k", np.int64(8), "k=8"),
        ("exact", True, "exact=true"),
        ("processes", None, "processes=null"),
        ("dataset", "digits", "dataset=digits"),
        ("run_dir", Path("runs/k=8, n=32"), "run_dir='runs/k=8, n=32'"),
        ("run_dir", "it's, here", 'run_dir="it\'s, here"'),
        ("schedule__milestones", "[1,2]", "schedule.milestones=[1,2]"),
        ("schedule__milestones", [1, 2.5], "schedule.milestones=[1,2.5]"),
        ("runs", ["a", Path("b c")], "runs=[a,'b c']"),
        ("model__kwargs", {"width": 2, "act": "re lu"}, "model.kwargs={width:2,act:'re lu'}"),
    ],
)
def test_a_value_is_written_as_on_the_command_line(key, value, word):
    assert as_words("train", (), {key: value}) == [word]


def test_a_list_of_a_plain_command_has_no_brackets():
    assert as_words("predict", ("n=32",), {"k": [8, 256]}, lists_in_brackets=False) == ["n=32", "k=8,256"]


def test_hydra_reads_what_was_written():
    words = as_words("train", ("k=4",), {"run_dir": "runs/a b,c", "schedule__milestones": (1, 2), "lr__base": 1e-5})
    values = compose("train", words).values
    assert values["run_dir"] == "runs/a b,c"
    assert values["schedule"]["milestones"] == [1, 2]
    assert (values["k"], values["lr"]["base"]) == (4, 1e-5)


@pytest.mark.parametrize(
    ("words", "keys", "sentence"),
    [
        (("-m", "k=1,2"), {}, "largebatch.train takes words such as 'k=8' and keywords .* not '-m'"),
        (("--help",), {}, "not '--help'"),
        ((8,), {}, "not 8"),
        ((), {"k": object()}, "k=<object .* has no form on the command line"),
        ((), {"k": 3.5}, "k=3.5"),
        ((), {"k": [1, 2]}, "k="),
        ((), {"kk": 3}, "'kk' is not a key. Did you mean 'k'"),
        ((), {"k": 8, "dataset": "digit"}, "dataset=digit is not known"),
        (("k=1",), {"k": 2}, "k was given twice"),
        ((), {"launcher": "slurm"}, "these words describe a sweep"),
    ],
)
def test_a_mistake_is_an_exception_with_one_sentence(words, keys, sentence):
    with pytest.raises(largebatch.UserError, match=sentence):
        largebatch.train(*words, **keys)
