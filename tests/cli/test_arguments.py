import pytest

from largebatch.base.errors import UserError
from largebatch.cli.arguments import Vocabulary, Word

WORDS = Vocabulary(
    "table",
    "Print a table.",
    (
        Word("runs", "runs", "Where the runs are.", many=True, path=True),
        Word("baseline", None, "What the others are compared with."),
        Word("margin", "0.5", "How far apart."),
        Word("format", "text", "How it is written.", ("text", "csv")),
        Word("allow_mixed", "false", "Whether to insist."),
    ),
    (("table runs=a", "what is in a"),),
    ("A closing word.",),
)


def test_values_are_split_at_the_first_sign_and_stand_as_they_are():
    given = WORDS.read(["baseline=k=8,warmup=none", "runs=a,b", "runs=runs/k*[0-9]", "margin=1e-1"])
    assert given.text("baseline") == "k=8,warmup=none"
    assert given.all("runs") == ["a", "b", "runs/k*[0-9]"]
    assert given.number("margin") == 0.1
    assert (given.text("format"), given.flag("allow_mixed")) == ("text", False)


def test_defaults():
    given = WORDS.read([])
    assert given.all("runs") == ["runs"]
    assert given.text("baseline") is None
    assert given.all("baseline") == []
    assert given.number("margin", above=0) == 0.5


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            ["basline=k=8"],
            "'basline' is not a key of table: it takes runs, baseline, margin, format, allow_mixed. "
            "Did you mean 'baseline'?",
        ),
        (["here"], "'here' is not key=value of table: it takes runs, baseline, margin, format, allow_mixed."),
        (
            ["--format"],
            "'--format' is not key=value of table: it takes runs, baseline, margin, format, allow_mixed. "
            "Did you mean 'format'?",
        ),
        (["format=cvs"], "format=cvs is not known: it takes text, csv. Did you mean 'csv'?"),
        (["margin=1", "margin=2"], "margin was given twice, as margin=1 and as margin=2: give it once."),
    ],
)
def test_a_word_that_is_not_one(argument, sentence):
    with pytest.raises(UserError) as error:
        WORDS.read(argument)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("half", "margin=half is not a number above 0."),
        ("0", "margin=0 is not a number above 0."),
        ("inf", "margin=inf is not a number above 0."),
        ("", "margin= is not a number above 0."),
    ],
)
def test_a_number_that_is_not_one(text, sentence):
    with pytest.raises(UserError) as error:
        WORDS.read([f"margin={text}"]).number("margin", above=0)
    assert str(error.value) == sentence


def test_a_flag_that_is_not_one():
    with pytest.raises(UserError, match=r"^allow_mixed=yes is not known: it takes true, false\.$"):
        WORDS.read(["allow_mixed=yes"]).flag("allow_mixed")


@pytest.mark.parametrize("asking", ["--help", "-h"])
def test_help_teaches(asking, capsys):
    assert WORDS.read(["margin=1", asking]) is None
    shown = capsys.readouterr().out
    assert shown == WORDS.help() + "\n"
    assert shown.startswith("largebatch table [key=value …]\n\nPrint a table.\n")
    assert "  format=       How it is written. One of text, csv. By default text.\n" in shown
    assert "\nA closing word.\n" in shown
    assert shown.endswith("Examples:\n  largebatch table runs=a\n      what is in a\n")
