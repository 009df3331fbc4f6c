"""What the aggregator counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

BATCHES = Counter("oncepay_feed_batches", "Batches received, by what became of them.", ["shard", "outcome"])
ROWS = Counter("oncepay_feed_rows", "Rows of applied batches.", ["shard", "kind"])
CONTRADICTIONS = Counter("oncepay_feed_contradictions", "Entries that came again with another content.", ["shard"])
APPLY_SECONDS = Histogram("oncepay_feed_apply_seconds", "Time to apply a batch, its commit included.")
LAG_SECONDS = Gauge("oncepay_feed_lag_seconds", "From the shard's commit to here, for the newest row applied.", ["shard"])
WATERMARK = Gauge("oncepay_feed_watermark_bytes", "The position up to which the shard's feed is applied.", ["shard"])
REBUILDS = Counter("oncepay_feed_rebuilds", "Times that what is derived from a shard was made anew.", ["shard"])

RECONCILED = Counter("oncepay_reconcile_runs", "Reconciliations that ended, by how.", ["outcome"])
DIFFERENCES = Gauge("oncepay_reconcile_differences", "Differences that the last whole reconciliation found.")
RECONCILED_AT = Gauge("oncepay_reconcile_last_timestamp_seconds", "When the last whole reconciliation ended, since 1970.")
