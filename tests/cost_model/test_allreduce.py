"""The α–β model against arithmetic by hand."""

import pytest

from largebatch.base.errors import UserError
from largebatch.cost_model.allreduce import ALGORITHMS, exchange, halving_doubling, ring
from largebatch.cost_model.profile import Link, load

LINK = Link("nodes", latency_us=10.0, gbit_per_second=8.0)  # 1 GB/s


def test_a_message_takes_alpha_and_b_beta():
    assert LINK.seconds(0) == pytest.approx(10e-6)
    assert LINK.seconds(1_000_000) == pytest.approx(10e-6 + 1e-3)


def test_a_ring_of_four():
    # 6 messages of 1 MB: 6 · (10 µs + 1 ms).
    assert ring(4, 4_000_000, LINK) == pytest.approx(6.06e-3)


@pytest.mark.parametrize(
    ("members", "seconds"),
    [
        (1, 0.0),
        (2, 2 * 10e-6 + 4e-3),  # a half there and back
        (4, 4 * 10e-6 + 6e-3),  # 2 MB and 1 MB there, 1 MB and 2 MB back
        (8, 6 * 10e-6 + 7e-3),
        (44, 12 * 10e-6 + 2 * 4e-3 * 43 / 44),  # binary blocks of 32, 8 and 4: as many steps as 64 take
    ],
)
def test_halving_and_doubling_sends_as_much_in_fewer_messages(members, seconds):
    assert halving_doubling(members, 4_000_000, LINK) == pytest.approx(seconds)


def test_the_fastest_is_the_one_with_fewer_messages_and_both_are_equal_for_two():
    assert ALGORITHMS["fastest"](32, 1000, LINK) == halving_doubling(32, 1000, LINK) < ring(32, 1000, LINK)
    assert ring(2, 1000, LINK) == pytest.approx(halving_doubling(2, 1000, LINK))


# Messages of 20 MB. Between the 2 GPUs of a node each takes 2 · (1 ms + 1 ms) = 4 ms; between 2 nodes 2 · (2 ms + 10
# ms) = 24 ms; between 4 nodes by halving and doubling 4 · 2 ms + 30 ms = 38 ms.
@pytest.mark.parametrize(
    ("gpus", "nodes", "total", "exposed"),
    [
        (1, 1, 0.0, 0.0),
        # Messages come every 15 ms and take 4: the last one alone is not hidden.
        (2, 1, 16e-3, 4e-3),
        # They take 24 between nodes, 9 more than they come in: 4 + 24 + 3 · 9.
        (4, 2, 4e-3 + 4 * 24e-3, 55e-3),
        (8, 4, 4e-3 + 4 * 38e-3, 4e-3 + 38e-3 + 3 * 23e-3),
        # One GPU a node: nothing within it.
        (2, 2, 96e-3, 24e-3 + 3 * 9e-3),
    ],
)
def test_what_back_propagation_does_not_hide(profile, gpus, nodes, total, exposed):
    found = exchange(profile(), gpus, nodes, backward=60e-3, algorithm="halving_doubling")
    assert (found.total, found.exposed) == pytest.approx((total, exposed))


def test_what_shares_the_processor_hides_less(profile):
    # 16 ms, of which 12 could be hidden.
    for overlap, exposed in ((1.0, 4e-3), (0.5, 10e-3), (0.0, 16e-3)):
        assert exchange(profile(overlap=overlap), 2, 1, 60e-3, "ring").exposed == pytest.approx(exposed)


def test_a_link_that_is_not_known_is_asked_for(profile):
    alone = profile(links=())
    assert exchange(alone, 1, 1, 60e-3, "ring").total == 0
    with pytest.raises(
        UserError, match=r"4 GPUs on 2 nodes exchange gradients between the GPUs of a node, but .* gpu_link="
    ):
        exchange(alone, 4, 2, 60e-3, "ring")
    with pytest.raises(UserError, match=r"between nodes, but .* give network=… and latency=…"):
        exchange(alone, 4, 4, 60e-3, "ring")


def test_the_papers_network(profile):
    paper = load("paper")
    # Section 4.3: 200 MB in 125 ms ask for 12.8 Gbit/s; twice 100 MB between many nodes take just that long.
    link = Link("nodes", 0.0, 12.8)
    assert ring(1000, 100e6, link) == pytest.approx(0.125, rel=2e-3)
    # Section 4.1: on 32 nodes halving and doubling is 3 times as fast as the ring, tensor by tensor.
    size, own = paper.gradient_bytes / paper.messages, paper.link("nodes")
    assert ring(32, size, own) / halving_doubling(32, size, own) == pytest.approx(3, abs=0.01)
