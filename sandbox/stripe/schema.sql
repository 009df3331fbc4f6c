-- One table a kind: `ord` is the ordinal that the object's id carries, `data` the packed object.
CREATE TABLE IF NOT EXISTS payment_intents (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, customer TEXT);
CREATE INDEX IF NOT EXISTS payment_intents_customer ON payment_intents (customer, ord) WHERE customer IS NOT NULL;
CREATE TABLE IF NOT EXISTS charges (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, intent INTEGER, customer TEXT);
CREATE INDEX IF NOT EXISTS charges_intent ON charges (intent);
CREATE INDEX IF NOT EXISTS charges_customer ON charges (customer, ord) WHERE customer IS NOT NULL;
CREATE TABLE IF NOT EXISTS balance_transactions (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL,
  source TEXT, type TEXT, currency TEXT, net INTEGER, available_on INTEGER);
CREATE TABLE IF NOT EXISTS refunds (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, charge TEXT, intent TEXT);
CREATE INDEX IF NOT EXISTS refunds_charge ON refunds (charge);
CREATE INDEX IF NOT EXISTS refunds_intent ON refunds (intent);
CREATE TABLE IF NOT EXISTS disputes (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, charge TEXT, intent TEXT);
CREATE INDEX IF NOT EXISTS disputes_charge ON disputes (charge);
CREATE INDEX IF NOT EXISTS disputes_intent ON disputes (intent);
CREATE TABLE IF NOT EXISTS payment_methods (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, customer TEXT);
CREATE INDEX IF NOT EXISTS payment_methods_customer ON payment_methods (customer) WHERE customer IS NOT NULL;
CREATE TABLE IF NOT EXISTS customers (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, deleted INTEGER, email TEXT);
CREATE TABLE IF NOT EXISTS payouts (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, status TEXT);
CREATE TABLE IF NOT EXISTS events (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, type INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS events_type ON events (type, ord);
CREATE TABLE IF NOT EXISTS webhook_endpoints (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL);

-- Which intents carry a pair of metadata: `pair` is a hash of key and value. Rows may be stale; readers look at the intent.
CREATE TABLE IF NOT EXISTS intent_metadata (pair INTEGER NOT NULL, intent INTEGER NOT NULL, PRIMARY KEY (pair, intent)) WITHOUT ROWID;

-- Answers by idempotency key; `hash` is of API key and idempotency key, `fingerprint` of endpoint and parameters.
CREATE TABLE IF NOT EXISTS idempotency (ord INTEGER PRIMARY KEY, hash INTEGER NOT NULL, created INTEGER NOT NULL,
  fingerprint BLOB NOT NULL, status INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS idempotency_hash ON idempotency (hash);
