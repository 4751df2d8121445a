import pytest

from largebatch.base.errors import UserError
from largebatch.base.numbers import byte_count
from largebatch.inference.config import EvalConfig

ASKED = {
    "run": "a",
    "runs": (),
    "state_file": None,
    "weights": "last",
    "offload": "none",
    "budget": None,
    "groups": "bytes",
    "prefetch": True,
    "batches_per_load": 1,
    "fold_bn": False,
    "batch": None,
    "combine": "logits",
    "compare": False,
    "plan": False,
}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("200MB", 200_000_000),
        ("200 mb", 200_000_000),
        ("1.5GiB", 3 * 2**29),
        ("0.5kB", 500),
        ("2KiB", 2048),
        ("7B", 7),
        ("200000.0", 200_000),  # what a number on the command line may have become
    ],
)
def test_sizes(text, size):
    assert byte_count("budget", text) == size


@pytest.mark.parametrize("text", ["", "0", "0.3B", "-1MB", "200XB", "MB", "1e3", "nan", "1,5GB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match=f"^budget={text} is not a size: it takes such as 200MB"):
        byte_count("budget", text)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"run": None}, "nothing was named to evaluate: it takes one of run=DIR"),
        ({"runs": ("b",)}, "run and runs were given together: it takes one of run=DIR"),
        ({"run": None, "state_file": "w", "weights": "best"}, "state_file= has its own: leave weights= out."),
        ({"budget": "1MB"}, "it takes offload=submodule, offload=model, or plan=true"),
        ({"compare": True}, "add offload=submodule or model"),
        ({"quantized": True, "fold_bn": True}, "cannot be given with fold_bn=true: in integers BatchNorm is folded"),
        ({"quantized": True, "run": None, "state_file": "w"}, "of recorded runs, and cannot be given with state_file="),
        ({"engine": "x86"}, "engine=x86 computes integers: it goes with quantized=true."),
        ({"engine": "x86", "quantized": True, "offload": "model"}, "with offload=model take engine=reference."),
        ({"offload": "sub"}, "offload=sub is not known: it takes none, submodule, model."),
        ({"groups": "layer"}, "groups=layer is not known: it takes bytes, leaf, blocks."),
        ({"combine": "votes"}, "combine=votes is not known: it takes probabilities, logits."),
        ({"batch": 0}, "batch=0 is too small: it takes 1 or more."),
    ],
)
def test_what_does_not_go_together(words, sentence):
    with pytest.raises(UserError) as error:
        EvalConfig(**{**ASKED, **words})
    assert sentence in str(error.value)


def test_a_budget_may_be_planned_for():
    assert EvalConfig(**{**ASKED, "budget": "1MB", "plan": True}).budget_bytes == 10**6
