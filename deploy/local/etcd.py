"""A few calls to etcd's HTTP gateway: enough to read the map and put first records, without gRPC."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Sequence

from deploy.local.errors import ClusterError

TIMEOUT_S = 2.0


class EtcdAway(ClusterError):
    """No etcd member answers."""

    slug = "etcd-unavailable"


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _prefix_end(prefix: str) -> str:
    """The first key after all keys with that prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


class Gateway:
    """The gateway of the first member that answers."""

    def __init__(self, endpoints: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        self.endpoints = endpoints
        self.timeout_s = timeout_s

    def _call(self, path: str, body: dict[str, object]) -> dict[str, object]:
        reasons = []
        for endpoint in self.endpoints:
            connection = http.client.HTTPConnection(endpoint, timeout=self.timeout_s)
            try:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
                if response.status == 200 and isinstance(answer, dict):
                    return answer
                reasons.append(f"{endpoint}: {answer}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons.append(f"{endpoint}: {error}")
            finally:
                connection.close()
        raise EtcdAway("; ".join(reasons))

    def is_decided(self) -> bool:
        """Whether every member serves, and all have agreed on the version that they speak. Clients stumble before."""
        for endpoint in self.endpoints:
            connection = http.client.HTTPConnection(endpoint, timeout=self.timeout_s)
            try:
                connection.request("GET", "/version")
                version = json.loads(connection.getresponse().read())
            except (OSError, http.client.HTTPException, ValueError):
                return False
            finally:
                connection.close()
            if version.get("etcdcluster") in (None, "", "not_decided"):
                return False
        return True

    def get(self, key: str, *, serializable: bool = False) -> str | None:
        """The value of `key`, None when there is none. Raises EtcdAway.

        With `serializable` one member is enough, whose answer may be a little old.
        """
        answer = self._call("/v3/kv/range", {"key": _b64(key), "serializable": serializable})
        kvs = answer.get("kvs")
        if not isinstance(kvs, list) or not kvs:
            return None
        return base64.b64decode(kvs[0].get("value", "")).decode()

    def put(self, key: str, value: str) -> None:
        """Raises EtcdAway."""
        self._call("/v3/kv/put", {"key": _b64(key), "value": _b64(value)})

    def put_if_absent(self, key: str, value: str) -> bool:
        """Whether it was put; False when the key was there already. Raises EtcdAway."""
        compare = {"key": _b64(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        put = {"request_put": {"key": _b64(key), "value": _b64(value)}}
        return bool(self._call("/v3/kv/txn", {"compare": [compare], "success": [put]}).get("succeeded"))

    def delete(self, key: str) -> None:
        """Raises EtcdAway."""
        self._call("/v3/kv/deleterange", {"key": _b64(key)})

    def delete_prefix(self, prefix: str) -> None:
        """Delete every key that starts with `prefix`. Raises EtcdAway."""
        assert prefix, "that would delete everything"
        self._call("/v3/kv/deleterange", {"key": _b64(prefix), "range_end": _b64(_prefix_end(prefix))})
