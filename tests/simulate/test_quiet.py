"""Messages and bytes of a member do not grow with the job: `python -m tests.simulate --members 10000`."""

from __future__ import annotations

from ckptd.protocol.cluster.facts import FAN_OUT
from tests.simulate.quiet import Quiet

OTHERS_IN_GROUP = 3
MOST_MESSAGES = 1 + FAN_OUT + 2 * OTHERS_IN_GROUP
"""Facts to the parent, Decided to each child; a seal record, and the receipt of one, to each other in the group."""


def test_traffic_of_a_member_does_not_grow_with_the_job() -> None:
    small, large = Quiet(400).run(2), Quiet(2000).run(2)
    assert max(small.sent.messages, large.sent.messages) <= MOST_MESSAGES
    assert max(small.received.messages, large.received.messages) <= MOST_MESSAGES
    assert large.sent.size <= 1.1 * small.sent.size
    assert large.received.size <= 1.1 * small.received.size
    assert large.ticks <= 1.2 * small.ticks
