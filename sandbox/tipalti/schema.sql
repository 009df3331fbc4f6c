CREATE TABLE IF NOT EXISTS payees (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, ref_code TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS batches (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL);
-- The reference code is the guard against paying twice, so it is unique here too.
CREATE TABLE IF NOT EXISTS payments (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, ref_code TEXT NOT NULL UNIQUE,
  payee TEXT NOT NULL, status TEXT NOT NULL, batch TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS payments_status ON payments (status);
CREATE INDEX IF NOT EXISTS payments_payee ON payments (payee);
CREATE TABLE IF NOT EXISTS notices (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS receivers (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS tokens (token TEXT PRIMARY KEY, expires REAL NOT NULL) WITHOUT ROWID;
-- The payer's own money at Tipalti: what came in, and what each currency's balance is now.
CREATE TABLE IF NOT EXISTS fundings (ord INTEGER PRIMARY KEY, created INTEGER NOT NULL, data BLOB NOT NULL, currency TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS balances (currency TEXT PRIMARY KEY, amount INTEGER NOT NULL) WITHOUT ROWID;
-- The cut-off time (minutes of the day) and whether fundings come by themselves.
CREATE TABLE IF NOT EXISTS account (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
