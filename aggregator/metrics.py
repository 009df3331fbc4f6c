"""What the aggregator counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

BATCHES = Counter("oncepay_feed_batches", "Batches received, by what became of them.", ["shard", "outcome"])
ROWS = Counter("oncepay_feed_rows", "Rows of applied batches.", ["shard", "kind"])
CONTRADICTIONS = Counter("oncepay_feed_contradictions", "Entries that came again with another content.", ["shard"])
REPEATED = Counter("oncepay_feed_repeated_batches", "Batches with rows that were here already.", ["shard"])
APPLY_SECONDS = Histogram("oncepay_feed_apply_seconds", "Time to apply a batch, its commit included.")
LAG_SECONDS = Gauge("oncepay_feed_lag_seconds", "From the shard's commit to here, for the newest row applied.", ["shard"])
WATERMARK = Gauge("oncepay_feed_watermark_bytes", "The position up to which the shard's feed is applied.", ["shard"])
REBUILDS = Counter("oncepay_feed_rebuilds", "Times that what is derived from a shard was made anew.", ["shard"])

RECONCILED = Counter("oncepay_reconcile_runs", "Reconciliations that ended, by how.", ["outcome"])
DIFFERENCES = Gauge("oncepay_reconcile_differences", "Differences that the last whole reconciliation found.")
RECONCILED_AT = Gauge("oncepay_reconcile_last_timestamp_seconds", "When the last whole reconciliation ended, since 1970.")

AUDITED = Counter("oncepay_audit_entries", "Entries that the background audit has compared with the shards.")
AUDIT_SECONDS = Histogram("oncepay_audit_seconds", "Time of a round of the audit, the wait for the feed included.")
AUDIT_DIFFERENCES = Gauge("oncepay_audit_differences", "What the last round of the audit found wrong, twice.")

EVENTS_SENT = Counter("oncepay_events_deliveries", "Tries to deliver an event, by what came of them.", ["endpoint", "outcome"])
EVENTS_PARKED = Gauge("oncepay_events_parked", "Events that wait to be sent again, or behind one that does.", ["endpoint"])
EVENTS_DEAD = Counter("oncepay_events_dead_letters", "Events that were given up.", ["endpoint"])
