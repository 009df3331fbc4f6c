"""What a machine lacks for a cluster: programs, ports, memory, disk."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli.common import port_base
from cli.findings import Finding
from oncepay.errors import OncepayError

if TYPE_CHECKING:
    from deploy.local import Cluster

MIB = 2**20
CLUSTER_MEMORY = 900 * MIB
DISK_LEAST = 512 * MIB
DISK_LITTLE = 4096 * MIB
FILES_LEAST = 1024
INODES_LEAST = 10_000


def look_at_machine(cluster: Cluster, *, running: bool, known: bool) -> list[Finding]:
    """What is missing here. Ports and memory count only while the cluster doesn't hold them itself."""
    found = [*_programs(), *_limits(), *_disk(cluster)]
    if not running:
        found += [*_memory(), *_ports(cluster, known=known)]
    return found


def _programs() -> Iterator[Finding]:
    from deploy import os_user, programs

    try:
        programs.postgres_bin()
        if warning := programs.etcd_warning(programs.etcd_version()):
            yield Finding("warning", "etcd", warning, "in production install etcd 3.5.21 or later, or 3.6")
    except (OncepayError, OSError) as error:
        yield Finding("problem", "programs", str(error), "run `make install`")
    try:
        os_user.for_postgres()
    except OncepayError as error:
        yield Finding("problem", "postgres", str(error), "see docs/runbooks/local-cluster.md")


def _limits() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES_LEAST:
        yield Finding("problem", "limits", f"a process may open only {soft} files", f"ulimit -n {FILES_LEAST} or more")
    if (count := os.cpu_count() or 1) < 2:
        yield Finding("warning", "processor", f"there is {count}", "a local cluster wants 2 or more: expect slow elections")


def _disk(cluster: Cluster) -> Iterator[Finding]:
    folder = cluster.home
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    text = f"{free / MIB:,.0f} MiB are free where {cluster.home} is"
    if free < DISK_LEAST:
        yield Finding("problem", "disk", text, "make room: Postgres stops when its disk is full")
    elif free < DISK_LITTLE:
        yield Finding("warning", "disk", text, "make room, or put ONCEPAY_HOME elsewhere")
    if found.f_files and found.f_favail < INODES_LEAST:
        yield Finding("warning", "disk", f"only {found.f_favail:,} more files fit on it", "delete small files")


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    if free < CLUSTER_MEMORY:
        text = f"{free / MIB:,.0f} MiB of memory are free; a local cluster takes about {CLUSTER_MEMORY / MIB:,.0f}"
        yield Finding("warning", "memory", text, "end something else")


def _ports(cluster: Cluster, *, known: bool) -> Iterator[Finding]:
    from deploy.local.ports import DEFAULT_BASE, SPAN, holder, is_free

    base = cluster.ports.base if known else port_base() or DEFAULT_BASE
    taken = [port for port in range(base, base + SPAN) if not is_free(port)]
    if taken:
        names = ", ".join(f"{port} ({holder(port)})" for port in taken[:3]) + (" …" if len(taken) > 3 else "")
        advice = "stop what holds them, or use another ONCEPAY_HOME with another ONCEPAY_PORT_BASE"
        yield Finding("problem", "ports", f"of the ports {base} to {base + SPAN - 1} these are taken: {names}", advice)
