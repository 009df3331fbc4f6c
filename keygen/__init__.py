"""The key service: issues idempotency keys from a pool of blocks in etcd, each key once."""
