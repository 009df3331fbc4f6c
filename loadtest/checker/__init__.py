"""Checks the promises from outside: the shards' rows, Stripe's lists and the aggregator, row by row.

It imports nothing of the project, so that an error there is not repeated here: how a slot is made, how a split is
rounded and how revenue adds up is written down a second time.
"""

from loadtest.checker.looks import verify
from loadtest.checker.model import CheckerError, Difference, Misread, Report, ShardTarget, Target, Unreachable

__all__ = ["CheckerError", "Difference", "Misread", "Report", "ShardTarget", "Target", "Unreachable", "verify"]
