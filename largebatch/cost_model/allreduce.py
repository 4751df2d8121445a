"""Compute the time of adding gradients over p GPUs by the α–β model: a message of b bytes takes α + bβ.

After Thakur, Rabenseifner and Gropp (2005). The arithmetic of the sums and congestion are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from largebatch.cost_model.profile import Link, Profile, missing_link


def ring(members: int, size: float, link: Link) -> float:
    """Return the seconds of an all-reduce in a ring: 2(p − 1) messages of b/p bytes one after another.

    Args:
        members: p.
        size: b, in bytes.
        link: Of each member.
    """
    return 2 * (members - 1) * link.seconds(size / members)


def halving_doubling(members: int, size: float, link: Link) -> float:
    """Return the seconds of an all-reduce by recursive halving and doubling: 2 ⌈log₂ p⌉ messages.

    Together they are 2b(p − 1)/p bytes, as in the ring. Where p is no power of two, that is of binary blocks (the
    paper's section 4.1), whose imbalance is left out.
    """
    steps = 2 * (members - 1).bit_length()
    if not steps:
        return 0.0
    return steps * link.seconds(2 * size * (members - 1) / members / steps)


ALGORITHMS: dict[str, Callable[[int, float, Link], float]] = {
    "ring": ring,
    "halving_doubling": halving_doubling,
    "fastest": lambda members, size, link: min(ring(members, size, link), halving_doubling(members, size, link)),
}


@dataclass(frozen=True)
class Exchange:
    """One step's exchange: ``total`` seconds by itself, of which ``exposed`` are not hidden behind computing."""

    total: float
    exposed: float


def exchange(profile: Profile, gpus: int, nodes: int, backward: float, algorithm: str) -> Exchange:
    """Return what exchanging all gradients takes, first in every node, then between nodes.

    The gradients travel in equal messages; each is complete at its share of back-propagation, and goes through the
    node (a ring, its halves before and after) while another one is between nodes. So the last message is never hidden,
    and the others are where the slower of the two keeps up with back-propagation::

        exposed = t_node + t_nodes + (messages − 1) · max(0, max(t_node, t_nodes) − backward / messages)

    Args:
        profile: Sizes, links, and which share of what could be hidden is.
        gpus: All of them, as many in each node.
        nodes: Over how many nodes.
        backward: Seconds of the last pass's back-propagation.
        algorithm: Between nodes: one of ``ALGORITHMS``.

    Raises:
        UserError: the profile has not the links for this.
    """
    if gpus == 1:
        return Exchange(0.0, 0.0)
    size, members = profile.gradient_bytes / profile.messages, gpus // nodes
    stages = []
    for between, count, how in (("gpus", members, ring), ("nodes", nodes, ALGORITHMS[algorithm])):
        if count > 1:
            link = profile.link(between)
            if link is None:
                raise missing_link(between, gpus, nodes)
            stages.append(how(count, size, link))
    slowest, through = max(stages), math.fsum(stages)
    total = through + (profile.messages - 1) * slowest
    least = through + (profile.messages - 1) * max(0.0, slowest - backward / profile.messages)
    return Exchange(total, least + (1 - profile.overlap) * (total - least))
