"""What a worker counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ACTIVE = Gauge("oncepay_worker_active", "1 while this process is the shard's active worker.", ["shard"])
EPOCH = Gauge("oncepay_worker_epoch", "The epoch that this process holds or held last.", ["shard"])

LAG_BYTES = Gauge("oncepay_feed_behind_bytes", "From the aggregator's watermark to the end of the shard's log.", ["shard"])
LAG_SECONDS = Gauge("oncepay_feed_behind_seconds", "Age of the oldest change that the aggregator has not applied.", ["shard"])
FORWARDED = Counter("oncepay_feed_forwarded_rows", "Changes that the aggregator has applied.", ["shard"])
BATCHES = Counter("oncepay_feed_posts", "Batches sent to the aggregator, by outcome.", ["shard", "outcome"])
BARRIERS = Counter("oncepay_feed_barriers", "Barriers of the feed, by outcome.", ["shard", "outcome"])
BARRIER_SECONDS = Histogram("oncepay_feed_barrier_seconds", "From a barrier's start until it was certain.", ["shard"])
CONNECTS = Counter("oncepay_feed_connections", "Replication connections opened, by outcome.", ["shard", "outcome"])
HALTED = Gauge("oncepay_feed_halted", "1 while the feed stands still until an operator acts.", ["shard"])

PENDING = Gauge("oncepay_pending_payments", "Payments with open work, by status.", ["shard", "status"])
POLLS = Counter("oncepay_polls", "Open payments looked at, by how and by what came of it.", ["shard", "how", "outcome"])
POLL_WAITING = Gauge("oncepay_poll_waiting", "Open payments that are due and wait for their single look.", ["shard"])
LISTED = Counter("oncepay_poll_listed", "Objects read in lists while polling.", ["shard", "what"])
CIRCUIT_OPEN = Gauge("oncepay_poll_circuit_open", "1 while polling pauses because Stripe is down.", ["shard"])
REBUILDS = Counter(
    "oncepay_worker_rebuilds", "Rebuilds of what the aggregator derives from the shard, by outcome.", ["shard", "outcome"]
)

MOVE_STATE = Gauge("oncepay_move_state", "1 for the state that a move is in.", ["move", "source", "target", "state"])
MOVE_ROWS = Gauge("oncepay_move_rows", "Rows of a move: in all, copied, verified, deleted.", ["move", "what"])
MOVE_BYTES = Gauge("oncepay_move_copied_bytes", "Bytes that a move has copied.", ["move"])
MOVE_LAG = Gauge("oncepay_move_lag_bytes", "How far a move's stream is behind, when it was last looked at.", ["move"])
MOVE_RATE = Gauge("oncepay_move_rows_per_second", "Rows a second that a move copies or verifies.", ["move"])
MOVE_LEFT = Gauge("oncepay_move_left_seconds", "How long the step that a move is in still takes; 0 when not known.", ["move"])
MOVE_PAUSE = Gauge("oncepay_move_pause_seconds", "How long a move's range was held in its last switch or rollback.", ["move"])
RESCUES = Counter(
    "oncepay_move_rescues", "Fences ended whose operator process was gone, by the move's state then.", ["shard", "state"]
)
