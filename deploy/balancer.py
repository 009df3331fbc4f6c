"""Load balancers before routers and key services: configuration for HAProxy and for nginx, made from one `Balancer`.

    python -m deploy.balancer haproxy --router 10.0.0.11:8080 --router 10.0.0.12:8080 --keygen 10.0.0.11:8081 > haproxy.cfg
    python -m deploy.balancer --write      # the examples deploy/haproxy/haproxy.cfg and deploy/nginx/nginx.conf

Both send a request again to another replica when a connection fails or ends without an answer, POST too. That is safe here
and would not be elsewhere: what changes a payment carries an idempotency key and is done once however often it arrives,
webhooks are told apart by their event, and keys of an answer that got lost are never used. See docs/keys.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.local.ports import Ports
from oncepay.errors import BodyTooLarge, OncepayError, OutcomeUnknown, Unavailable
from oncepay.service import BODY_LIMIT_BYTES

FOLDER = Path(__file__).parent

ANSWER_S = 100
"""A router may hold a request for 30 s and then wait 60 s for settlement: no answer may be cut off before that."""
CONNECT_S = 2
CLIENT_S = 15
"""For a client to send its whole request."""
IDLE_S = 60
"""Kept connections end at the balancer first: services keep them for longer."""
TRIES = 3
CHECK_MS = 500
CHECK_FAST_MS = 200
CHECK_FALL = 2
"""A replica that drains is out after CHECK_MS + CHECK_FAST_MS at most: give services a longer `--drain-s` than that."""
BUFFER_BYTES = 1 << 16
"""Only a request that fits here with its headers can be sent again once it was sent."""

Pool = Literal["router", "keygen"]


@dataclass(frozen=True)
class Balancer:
    """What stands before which replicas. Addresses are `host:port`, of the replicas' own ports (not the shared one).

    `listen_*` is what clients connect to; `metrics` is HAProxy's own page for Prometheus. `run_dir` holds the pid file
    and temporary files of a balancer that is run by hand; empty for one that Debian's service runs.
    """

    routers: tuple[str, ...]
    keygens: tuple[str, ...]
    listen_router: str = "127.0.0.1:8180"
    listen_keygen: str = "127.0.0.1:8181"
    metrics: str = "127.0.0.1:8182"
    run_dir: str = ""

    def replicas(self, pool: Pool) -> tuple[str, ...]:
        return self.routers if pool == "router" else self.keygens

    def listen(self, pool: Pool) -> str:
        return self.listen_router if pool == "router" else self.listen_keygen

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools that have replicas."""
        names: tuple[Pool, ...] = ("router", "keygen")
        return tuple(pool for pool in names if self.replicas(pool))


def example() -> Balancer:
    """Before the local cluster, at its default ports."""
    ports = Ports()
    return Balancer(
        routers=tuple(f"127.0.0.1:{ports.router_own(n)}" for n in range(2)),
        keygens=tuple(f"127.0.0.1:{ports.keygen_own(n)}" for n in range(2)),
    )


HEAD = """\
# Made by `python -m deploy.balancer`: change the addresses there, or here in a copy.
#
# Requests are sent again to another replica when a connection fails or ends without an answer, POST too. That is safe because
# of idempotency keys: a payment's call is done once however often it arrives, and keys of a lost answer are never used.
# Clients' TLS ends here: API keys travel in a header, so add a certificate before clients come from elsewhere.
"""


def _problem(error: OncepayError, status: int) -> str:
    """A problem document, quoted for both languages."""
    text = json.dumps(error.problem() | {"status": status}, separators=(",", ":"))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


AWAY = Unavailable("no replica can be reached")
NO_ANSWER = OutcomeUnknown("no answer came in time; send it again with the same key")
TOO_LARGE = BodyTooLarge(f"at most {BODY_LIMIT_BYTES} bytes are taken")


# HAProxy


def haproxy(balancer: Balancer) -> str:
    """haproxy.cfg, for HAProxy 2.4 or later."""
    return "\n".join([HEAD + _haproxy_common(balancer), *(_haproxy_pool(balancer, pool) for pool in balancer.pools)])


def _haproxy_common(balancer: Balancer) -> str:
    own = "" if balancer.run_dir else "    user haproxy\n    group haproxy\n"
    errors = "".join(
        f"    http-error status {status} content-type application/problem+json string {_problem(error, status)}{more}\n"
        for status, error, more in (
            (413, TOO_LARGE, ""),
            (502, NO_ANSWER, " hdr Retry-After 2"),
            (503, AWAY, " hdr Retry-After 2"),
            (504, NO_ANSWER, " hdr Retry-After 2"),
        )
    )
    return f"""\
global
    log stdout format raw local0
{own}    # A request is sent again only if it fits in a buffer.
    tune.bufsize {BUFFER_BYTES}

defaults
    mode http
    log global
    option httplog
    option dontlog-normal
    option forwardfor
    option http-buffer-request
    option http-keep-alive
    http-reuse always
    option redispatch 1
    retries {TRIES}
    timeout connect {CONNECT_S}s
    timeout check {CONNECT_S}s
    timeout queue 10s
    timeout http-request {CLIENT_S}s
    timeout http-keep-alive {IDLE_S}s
    timeout client {ANSWER_S}s
    timeout server {ANSWER_S}s
{errors}
frontend metrics
    bind {balancer.metrics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    http-request return status 404
"""


def _haproxy_pool(balancer: Balancer, pool: Pool) -> str:
    # A key service without keys says 503 and another may have some; a router's 503 would be the same elsewhere.
    retry_on = "conn-failure empty-response" + (" 503" if pool == "keygen" else "")
    balance = "leastconn" if pool == "router" else "roundrobin"
    servers = "".join(f"    server {pool}-{n} {address}\n" for n, address in enumerate(balancer.replicas(pool), start=1))
    return f"""\
frontend {pool}
    bind {balancer.listen(pool)}
    http-request set-var(txn.request_id) req.hdr(X-Request-Id)
    http-request set-var(txn.request_id) uuid() unless {{ req.hdr(X-Request-Id) -m found }}
    http-request set-header X-Request-Id %[var(txn.request_id)]
    http-after-response set-header X-Request-Id %[var(txn.request_id)]
    http-request deny deny_status 413 if {{ req.body_size gt {BODY_LIMIT_BYTES} }}
    default_backend {pool}s

backend {pool}s
    balance {balance}
    retry-on {retry_on}
    option httpchk
    http-check send meth GET uri /readyz
    http-check expect status 200
    default-server check inter {CHECK_MS}ms fastinter {CHECK_FAST_MS}ms downinter {CHECK_MS}ms fall {CHECK_FALL} rise 2
{servers}"""


# nginx


def nginx(balancer: Balancer) -> str:
    """nginx.conf, for nginx 1.18 or later."""
    run_dir = balancer.run_dir
    if run_dir:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        top = f"pid {run_dir}/nginx.pid;\nerror_log stderr warn;"
        paths = "".join(f"    {kind}_temp_path {run_dir}/{kind};\n" for kind in kinds)
    else:
        top, paths = "user www-data;\npid /run/nginx.pid;\nerror_log /var/log/nginx/error.log warn;", ""
    upstreams = "\n".join(_nginx_upstream(balancer, pool) for pool in balancer.pools)
    servers = "\n".join(_nginx_server(balancer, pool) for pool in balancer.pools)
    return f"""\
{HEAD}#
# nginx looks at /readyz only in its commercial edition. This one takes a replica out for a second when a request to it fails,
# and that request is answered by another one.
{top}
worker_processes auto;

events {{
    worker_connections 8192;
}}

http {{
{paths}    access_log off;
    server_tokens off;

    map $http_x_request_id $its_request_id {{
        "" $request_id;
        default $http_x_request_id;
    }}

{upstreams}
    client_max_body_size {BODY_LIMIT_BYTES};
    client_body_buffer_size {BUFFER_BYTES};
    client_header_timeout {CLIENT_S}s;
    client_body_timeout {CLIENT_S}s;
    keepalive_timeout {IDLE_S}s;
    keepalive_requests 1000000;

    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Request-Id $its_request_id;
    proxy_connect_timeout {CONNECT_S}s;
    proxy_send_timeout {CLIENT_S}s;
    proxy_read_timeout {ANSWER_S}s;
    proxy_buffers 16 32k;
    proxy_next_upstream_tries {TRIES};

{servers}}}
"""


def _nginx_upstream(balancer: Balancer, pool: Pool) -> str:
    balance = "        least_conn;\n" if pool == "router" else ""
    servers = "".join(f"        server {address} max_fails=1 fail_timeout=1s;\n" for address in balancer.replicas(pool))
    return f"""\
    upstream {pool}s {{
        zone {pool}s 128k;
{balance}{servers}        keepalive 128;
        keepalive_requests 1000000;
        keepalive_timeout {IDLE_S}s;
    }}
"""


def _nginx_server(balancer: Balancer, pool: Pool) -> str:
    again = "error timeout invalid_header http_502 http_504" + (" http_503" if pool == "keygen" else "")
    return f"""\
    server {{
        listen {balancer.listen(pool)};
        error_page 413 @too_large;
        error_page 502 504 =503 @away;
        location / {{
            proxy_pass http://{pool}s;
            proxy_next_upstream {again} non_idempotent;
        }}
        location @too_large {{
            default_type application/problem+json;
            add_header X-Request-Id $its_request_id always;
            return 413 {_problem(TOO_LARGE, 413)};
        }}
        location @away {{
            default_type application/problem+json;
            add_header Retry-After 2 always;
            add_header X-Request-Id $its_request_id always;
            return 503 {_problem(AWAY, 503)};
        }}
    }}
"""


EXAMPLES = {FOLDER / "haproxy" / "haproxy.cfg": haproxy, FOLDER / "nginx" / "nginx.conf": nginx}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", choices=["haproxy", "nginx"])
    parser.add_argument("--router", action="append", default=[], metavar="HOST:PORT", help="a router's own port; again for each")
    parser.add_argument("--keygen", action="append", default=[], metavar="HOST:PORT", help="a key service's own port")
    parser.add_argument(
        "--listen-router", default="127.0.0.1:8180", help="where clients of the routers connect (default: %(default)s)"
    )
    parser.add_argument("--listen-keygen", default="127.0.0.1:8181", help="where clients of the key services connect")
    parser.add_argument("--write", action="store_true", help="write the two examples into deploy/")
    options = parser.parse_args()
    if options.write:
        for path, render in EXAMPLES.items():
            path.write_text(render(example()), encoding="ascii")
            print(f"{path.relative_to(FOLDER.parent)} written")
        return
    if options.program is None or not (options.router or options.keygen):
        parser.error("say haproxy or nginx, and the address of at least one --router or --keygen")
    balancer = Balancer(tuple(options.router), tuple(options.keygen), options.listen_router, options.listen_keygen)
    print(haproxy(balancer) if options.program == "haproxy" else nginx(balancer), end="")


if __name__ == "__main__":
    main()
