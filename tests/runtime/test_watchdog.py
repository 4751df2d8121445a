"""Who keeps the others waiting: found by looks at all processes, told by one of them."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore

from largebatch.runtime.watchdog import LOADING, Beat, Watchdog, verdict
from largebatch.runtime.world import World

TRAINING = Beat(looks=10, batches=40, iteration=9, doing="training")


def later(beat: Beat, **changes) -> Beat:
    return replace(beat, looks=beat.looks + 3, **changes)


@pytest.mark.parametrize(
    ("before", "now", "words", "speaker"),
    [
        (
            [TRAINING] * 3,
            [later(TRAINING), TRAINING, later(TRAINING)],
            "rank 1 of 3 has stopped responding in iteration 10, and the others wait.",
            0,
        ),
        ([TRAINING] * 2, [TRAINING, later(TRAINING)], "rank 0 of 2 has stopped responding in iteration 10, and", 1),
        (
            [TRAINING] * 3,
            [TRAINING, TRAINING, later(TRAINING)],
            "ranks 0, 1 of 3 have stopped responding in iteration 10, and the others wait.",
            2,
        ),
        (
            [TRAINING] * 2,
            [later(TRAINING), later(TRAINING, doing=LOADING)],
            "rank 1 of 2 is still loading images in iteration 10, and the others wait.",
            0,
        ),
        (
            [TRAINING] * 2,
            [later(TRAINING, iteration=10), later(TRAINING, iteration=11)],
            "rank 0 of 2 is still training in iteration 11, and the others wait.",
            0,
        ),
        ([TRAINING] * 2, [later(TRAINING)] * 2, "ranks 0, 1 of 2 are still training in iteration 10.", 0),
        ([TRAINING], [later(TRAINING)], "rank 0 of 1 is still training in iteration 10.", 0),
    ],
)
def test_the_guilty_are_named_by_the_lowest_rank_that_can(before, now, words, speaker):
    text, said_by = verdict(before, now, 600)
    assert text.startswith("no progress for 600 s (launcher.timeout): ")
    assert words in text
    assert said_by == speaker


def watch(rank: int, size: int, store, seconds: float = 0.4):
    """Return a watchdog, what it will have found, and an event for when it has."""
    found, done = [], threading.Event()

    def give_up(hang, speaks):
        found.append((str(hang), speaks))
        done.set()

    world = World(rank=rank, size=size, device=torch.device("cpu"), store=store)
    return Watchdog(world, seconds, give_up), found, done


def test_a_lone_process_that_loads_for_ever_is_found():
    dog, found, done = watch(0, 1, None)
    batches = dog.watched(iter("ab"), "training")
    next(batches)
    dog.iteration = 7
    with dog:
        assert done.wait(60)
    assert found == [("no progress for 0.4 s (launcher.timeout): rank 0 of 1 is still training in iteration 8.", True)]


def test_a_process_that_goes_on_keeps_the_others_from_giving_up():
    """Rank 0 waits for a slow rank 1, which is written into the store by hand."""
    store = HashStore()
    dog, found, done = watch(0, 2, store, seconds=2)
    with dog:
        for batches in range(60):  # three times as long
            store.set(
                "largebatch/beat/1", f'{{"looks": {batches}, "batches": {batches}, "iteration": 0, "doing": "t"}}'
            )
            assert not done.wait(0.1), found
        # Now rank 1 stands still.
        assert done.wait(60)
    ((text, speaks),) = found
    assert "rank 1 of 2 has stopped responding in iteration 1, and the others wait" in text
    assert speaks


def test_a_rank_that_never_looked_is_one_that_does_not_respond():
    dog, found, done = watch(0, 2, HashStore())
    with dog:
        assert done.wait(60)
    assert "rank 1 of 2 has stopped responding in iteration 1" in found[0][0]


def test_without_a_limit_nobody_watches():
    dog, found, _ = watch(0, 1, None, seconds=None)
    before = threading.active_count()
    with dog:
        assert threading.active_count() == before
    assert found == []
