"""The supervisor: its configuration, starting it detached, and talking to it over its unix socket."""

from __future__ import annotations

import http.client
import os
import shlex
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple, cast

from deploy import processes
from deploy.local.errors import ClusterError
from deploy.local.layout import Layout
from deploy.local.parts import Group, Program, project_root

RPC_TIMEOUT_S = 5.0
STOPPED_POLL_S = 0.1
SHUTDOWN_STATE = 6
"""Its answer to every call while it stops (`supervisor.xmlrpc.Faults`, whose import takes long)."""
LOG_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 2
START_RETRIES = 1_000_000
"""Nothing is given up, however long an outage lasts."""
GROUPS: tuple[Group, ...] = ("etcd", "data", "services")
FOREIGN_PREFIXES = ("PG", "PATRONI", "ETCD_", "SUPERVISOR_")
"""Variables of the caller that would change what the programs do."""


class SupervisorAway(ClusterError):
    """The supervisor doesn't answer."""


class SupervisorStops(ClusterError):
    """The cluster is being stopped."""

    slug = "local-cluster-stopping"


class ProcessState(NamedTuple):
    """What the supervisor knows of a process; `pid` is 0 when it isn't running."""

    name: str
    group: str
    pid: int
    state: str


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _section(program: Program, layout: Layout) -> str:
    variables = {processes.PROCESS_ENV: program.name, **program.environment}
    environment = ",".join(f'{name}="{_escape(value)}"' for name, value in variables.items())
    lines = {
        "command": _escape(shlex.join(program.command)),
        "environment": environment,
        "directory": _escape(str(program.directory or layout.run)),
        "autostart": str(program.autostart).lower(),
        "autorestart": "true",
        "startsecs": "1",
        "startretries": str(START_RETRIES),
        "stopsignal": program.stop_signal,
        "stopwaitsecs": str(program.stop_s),
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": _escape(str(layout.log(program.name))),
        "stdout_logfile_maxbytes": str(LOG_BYTES),
        "stdout_logfile_backups": str(LOG_BACKUPS),
    }
    return f"[program:{program.name}]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items())


def configuration(
    programs: Sequence[Program], layout: Layout, added_shard: str = "", added_groups: Sequence[Group] = GROUPS
) -> str:
    """The text of the supervisor's configuration file.

    The programs of a shard that is added to a running cluster (those of `added_groups`) form groups of their own, because the
    supervisor starts a group that has changed anew.
    """
    text = (
        f"[supervisord]\nlogfile = {_escape(str(layout.log('supervisor')))}\nlogfile_maxbytes = {LOG_BYTES}\n"
        f"logfile_backups = 1\npidfile = {_escape(str(layout.supervisor_pid))}\nchildlogdir = {_escape(str(layout.logs))}\n"
        f"directory = {_escape(str(layout.run))}\nminfds = 1024\numask = 077\n\n"
        f"[unix_http_server]\nfile = {_escape(str(layout.supervisor_socket))}\nchmod = 0600\n\n"
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n\n"
    )
    for priority, group in enumerate(GROUPS, start=1):
        added = added_shard if group in added_groups else ""
        old = [program for program in programs if program.group == group and not (added and program.shard == added)]
        new = [program for program in programs if program.group == group and program not in old]
        for name, members in ((group, old), (f"{group}-{added_shard}", new)):
            if not members:
                continue
            names = ",".join(program.name for program in members)
            text += f"[group:{name}]\nprograms = {names}\npriority = {priority}\n\n"
            text += "\n".join(_section(program, layout) for program in members) + "\n"
    return text


def environment(layout: Layout) -> dict[str, str]:
    """The environment of everything in the cluster: the caller's, without what would change the programs."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)}
    variables[processes.CLUSTER_ENV] = str(layout.home)
    path = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = os.pathsep.join([str(project_root()), *([path] if path else [])])
    variables["PYTHONUNBUFFERED"] = "1"
    variables["LC_ALL"] = "C.UTF-8"
    variables["MALLOC_ARENA_MAX"] = "2"  # the services and Patroni have many threads, and each arena keeps its memory
    local = "127.0.0.1,localhost"
    for name in ("no_proxy", "NO_PROXY"):
        variables[name] = f"{variables[name]},{local}" if variables.get(name) else local
    variables.pop(processes.PROCESS_ENV, None)
    return variables


def start(layout: Layout) -> None:
    """Start the supervisor, detached: it holds no file handle of the caller. Raises ClusterError."""
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(layout.supervisor_config)]
    done = subprocess.run(
        command,
        env=environment(layout),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        start_new_session=True,
        cwd=layout.run,
    )
    if done.returncode != 0:
        raise ClusterError(f"the supervisor didn't start: {done.stderr.strip() or done.stdout.strip()}")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__()
        self._path = path
        self._timeout_s = timeout_s

    def make_connection(self, host: object) -> http.client.HTTPConnection:
        del host
        return _Connection(self._path, self._timeout_s)


class Supervisor:
    """A running supervisor. Every call raises SupervisorAway when it doesn't answer, SupervisorStops while it ends everything."""

    def __init__(self, layout: Layout, timeout_s: float = RPC_TIMEOUT_S) -> None:
        transport = _Transport(str(layout.supervisor_socket), timeout_s)
        self._proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport)

    def _call(self, method: str, *arguments: object) -> object:
        try:
            return getattr(self._proxy.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise SupervisorAway(f"the supervisor doesn't answer: {error}") from error
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == SHUTDOWN_STATE:
                raise SupervisorStops from fault
            raise

    def pid(self) -> int:
        return int(cast(int, self._call("getPID")))

    def states(self) -> dict[str, ProcessState]:
        """All processes by name."""
        rows = cast(list[dict[str, object]], self._call("getAllProcessInfo"))
        states = (
            ProcessState(str(row["name"]), str(row["group"]), int(cast(int, row["pid"])), str(row["statename"])) for row in rows
        )
        return {state.name: state for state in states}

    def start(self, names: Iterable[str]) -> None:
        """Start those of the processes that aren't running, without waiting for them."""
        known = self.states()
        for name in names:
            self._change("startProcess", known[name])

    def stop(self, names: Iterable[str], *, wait: bool = True) -> None:
        """Stop processes; they stay stopped until they are started again."""
        known = self.states()
        for name in names:
            self._change("stopProcess", known[name], wait)

    def await_stopped(self, names: Set[str], wait_s: float) -> None:
        """Until none of the processes runs. Raises ClusterError after `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        while running := [state.name for state in self.states().values() if state.name in names and state.pid]:
            if time.monotonic() > deadline_s:
                raise ClusterError(f"these don't stop: {', '.join(running)}")
            time.sleep(STOPPED_POLL_S)

    def _change(self, method: str, process: ProcessState, wait: bool = False) -> None:
        try:
            self._call(method, f"{process.group}:{process.name}", wait)
        except xmlrpc.client.Fault as fault:
            if not fault.faultString.startswith(("ALREADY_STARTED", "NOT_RUNNING")):
                raise ClusterError(f"{process.name}: {fault.faultString}") from fault

    def add_groups(self) -> None:
        """Read the configuration again, and start the groups that are new in it; the others are left as they are."""
        [[added, _, _]] = cast(list[list[list[str]]], self._call("reloadConfig"))
        for group in added:
            self._call("addProcessGroup", group)

    def remove_group(self, group: str) -> None:
        """Stop a group's processes and forget them."""
        try:
            self._call("stopProcessGroup", group)
            self._call("removeProcessGroup", group)
        except xmlrpc.client.Fault as fault:
            if not fault.faultString.startswith("BAD_NAME"):
                raise ClusterError(f"{group}: {fault.faultString}") from fault

    def shut_down(self) -> None:
        """Stop everything, services first, etcd last, and then the supervisor. Doesn't wait for it."""
        self._call("shutdown")
