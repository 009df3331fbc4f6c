"""A local cluster: start it, stop it, ask it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from deploy import os_user, patroni, processes, programs
from deploy.local import secrets, shard_map, status, supervisor
from deploy.local.bring_up import BringUp, Hooks, OnProgress, write_node_configs
from deploy.local.errors import AlreadyRunning, ClusterError, NotRunning, RestoreUndone, WrongHome
from deploy.local.etcd import Gateway
from deploy.local.layout import Layout, Memory
from deploy.local.leftovers import Leftovers
from deploy.local.network import Network
from deploy.local.parts import ALL_PARTS, Plan, default_parts, node_names
from deploy.local.ports import DEFAULT_BASE, MAX_SHARDS, Ports, check_free
from deploy.local.preview import Ending, Start
from deploy.local.status import Status
from deploy.local.supervisor import ProcessState, Supervisor, SupervisorAway, SupervisorStops
from oncepay.settings import Settings

DEFAULT_SHARDS = ("s0", "s1")
SHARD_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
UP_TIMEOUT_S = 120.0
DOWN_TIMEOUT_S = 75.0
"""More than a service, then a node, then etcd may take to stop before the supervisor kills it."""
LOCK_WAIT_S = 30.0
"""How long `down` waits for an `up` that it has cut off to end, or for one that has started nothing yet."""
LOCK_POLL_S = 0.1

__all__ = ["Cluster", "Hooks"]


class Cluster:
    """The cluster in `home`. `port_base` and `shards` count only until the home has a cluster of its own.

    Raises ValueError for a port base, a number of shards or a part that can't be.
    """

    def __init__(
        self,
        home: Path,
        port_base: int | None = None,
        shards: Sequence[str] = DEFAULT_SHARDS,
        parts: Sequence[str] | None = None,
        *,
        netns: bool = False,
    ) -> None:
        if not 1 <= len(shards) <= MAX_SHARDS:
            raise ValueError(f"a local cluster has 1 to {MAX_SHARDS} shards, not {len(shards)}")
        unknown = set(parts or ()) - set(ALL_PARTS)
        if unknown:
            raise ValueError(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(ALL_PARTS)}")
        if port_base is not None:
            Ports(port_base)
        self.layout = Layout(home.resolve())
        self._wanted_base = port_base
        self._wanted_shards = tuple(shards)
        self._wanted_parts = tuple(parts) if parts is not None else None
        self._wanted_netns = netns

    @property
    def home(self) -> Path:
        return self.layout.home

    def _memory(self) -> Memory:
        """What the home remembers. Raises NotRunning when it never had a cluster."""
        memory = self.layout.memory()
        if memory is None:
            raise NotRunning(f"there is no cluster in {self.home}: start one with `oncepay up`")
        return memory

    def _plan(self, memory: Memory, *, keep: bool = True) -> Plan:
        ports = Ports(memory.port_base)
        passwords = secrets.load_or_make(self.layout, keep=keep)
        return Plan(
            layout=self.layout,
            ports=ports,
            shards=memory.shards,
            parts=memory.parts,
            settings=secrets.make_settings(self.layout, ports, passwords, memory),
            passwords=passwords,
            os_user=os_user.OsUser(),
            network=Network(memory.port_base) if memory.netns else None,
            numbers=memory.numbers,
            restored=memory.restored,
        )

    @property
    def plan(self) -> Plan:
        """What its programs are made from. Raises NotRunning when there never was a cluster."""
        return self._plan(self._memory())

    @property
    def network(self) -> Network | None:
        """The network namespaces of the nodes, where they have any. Raises NotRunning when there never was a cluster."""
        memory = self._memory()
        return Network(memory.port_base) if memory.netns else None

    def node_host(self, shard: str, node: str) -> str:
        """The address of a node. Raises NotRunning when there never was a cluster."""
        plan = self._plan(self._memory())
        return plan.node_hosts(shard)[node_names(shard).index(node)]

    @property
    def settings(self) -> Settings:
        """The settings that the services of this cluster read. Raises NotRunning when there never was one."""
        return self._plan(self._memory()).settings

    @property
    def ports(self) -> Ports:
        """Raises NotRunning when there never was a cluster."""
        return Ports(self._memory().port_base)

    def is_running(self) -> bool:
        """Whether the cluster's supervisor is alive, also when it doesn't answer."""
        return self._supervisor_pid() is not None

    def _supervisor_pid(self) -> int | None:
        try:
            pid = int(self.layout.supervisor_pid.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        if not processes.is_alive(pid) or not processes.is_marked(pid, str(self.home)):
            return None
        return pid if processes.variable(pid, processes.PROCESS_ENV) is None else None

    def up(
        self,
        *,
        hooks: Hooks | None = None,
        on_progress: OnProgress | None = None,
        on_warning: Callable[[str], None] | None = None,
        stripe_key_file: Path | None = None,
        stripe_webhook_secret_file: Path | None = None,
        timeout_s: float = UP_TIMEOUT_S,
        first_nodes: tuple[str, ...] = (),
        restoring: bool = False,
    ) -> None:
        """Start everything, and return when it is ready. What didn't end properly before is ended first. `first_nodes` lead
        before the others of their shards are started. `restoring`: it is the restore of etcd that starts it.

        When a part doesn't come up, or the caller is interrupted, all is stopped again. Raises AlreadyRunning,
        RestoreUndone, PortTaken, PartFailed, WrongHome.
        """
        self._check_key(stripe_key_file)
        self.layout.make()
        with self.only_one_up():
            self._check_stopped(restoring=restoring)
            memory = self._next_memory(stripe_key_file, stripe_webhook_secret_file)
            if not Leftovers(self.layout).end():
                raise ClusterError("processes of an earlier run can't be ended")
            self.layout.clean_run()
            plan = dataclasses.replace(self._plan(memory), os_user=os_user.for_postgres(), first_nodes=first_nodes)
            all_programs = plan.programs()
            check_free(port for program in all_programs for port in program.listens)
            if on_warning is not None and (warning := programs.etcd_warning(programs.etcd_version())):
                on_warning(warning)
            self.layout.remember(memory)
            self._write(plan)
            try:
                if plan.network is not None:
                    plan.network.make(max(memory.numbers.values()) + 1)
                self.layout.make_socket_folder()
                supervisor.start(self.layout)
                BringUp(plan, memory, hooks or Hooks(), on_progress or (lambda _: None), timeout_s).run()
            except BaseException:
                self._clear(stopped=self._stop())
                raise

    def _check_key(self, key_file: Path | None) -> None:
        """Raises WrongHome for a Stripe key that can't be used, before anything is written."""
        memory = self.layout.memory()
        if path := str(key_file or "") or (memory.stripe_key_file if memory is not None else ""):
            secrets.read_key(path)

    def _check_stopped(self, *, restoring: bool = False) -> None:
        """Raises AlreadyRunning, RestoreUndone."""
        if self.is_running():
            router = f"http://127.0.0.1:{self.ports.router}"
            raise AlreadyRunning(
                f"a cluster is already running in {self.home}, its router at {router}: `oncepay status` shows it"
            )
        if self.layout.restoring.exists() and not restoring:
            raise RestoreUndone(
                f"a restore of etcd was begun in {self.home} and is not over: run `oncepay etcd restore FILE` again"
            )

    def would_start(self, stripe_key_file: Path | None = None, stripe_webhook_secret_file: Path | None = None) -> Start:
        """What `up` would start, and what it would end before. Nothing is written. Raises what `up` raises before it starts."""
        self.layout.check_usable()
        self._check_key(stripe_key_file)
        with self._lock() as is_free:
            if not is_free:
                raise self._at_work()
            self._check_stopped()
            memory = self._next_memory(stripe_key_file, stripe_webhook_secret_file)
            plan = dataclasses.replace(self._plan(memory, keep=False), os_user=os_user.for_postgres())
            all_programs = plan.programs()
            listens = sorted({port for program in all_programs for port in program.listens})
            left = Leftovers(self.layout).find()
            if not left:  # which may hold the ports now
                check_free(listens)
            parts = tuple(dict.fromkeys(program.part for program in all_programs))
            is_new = self.layout.memory() is None
            return Start(self.home, is_new, memory.port_base, tuple(listens), memory.shards, parts, tuple(left))

    def add_shard(
        self,
        shard: str,
        *,
        hooks: Hooks | None = None,
        on_progress: OnProgress | None = None,
        timeout_s: float = UP_TIMEOUT_S,
        restore: dict[str, str] | None = None,
    ) -> None:
        """Give the running cluster one more shard, which owns no range yet. On failure it is taken away again.

        With `restore` (a plan of `deploy/restore.py`) it is made from a backup, and gets no worker.

        Raises NotRunning, PortTaken, PartFailed; WrongHome for a name that can't be, or a shard too many.
        """
        with self.only_one_up():
            control = self.supervisor()
            before = self.check_addition(shard)
            memory = before.with_shard(shard, restored=restore is not None)
            restores = {shard: restore} if restore is not None else {}
            plan = dataclasses.replace(self._plan(memory), os_user=os_user.for_postgres(), restores=restores)
            all_programs = plan.programs()
            check_free(port for program in all_programs if program.shard == shard for port in program.listens)
            write_node_configs(plan)
            config = supervisor.configuration(all_programs, self.layout, added_shard=shard)
            self.layout.supervisor_config.write_text(config, encoding="utf-8")
            self.layout.remember(memory)
            try:
                if plan.network is not None:
                    plan.network.add(memory.numbers[shard])
                control.add_groups()
                report = on_progress or (lambda _: None)
                BringUp(plan, memory, hooks or Hooks(), report, timeout_s, added=shard).run()
            except BaseException:
                self.layout.remember(before)
                for group in reversed(supervisor.GROUPS):
                    control.remove_group(f"{group}-{shard}")
                gateway = Gateway(plan.settings.etcd.endpoints)
                gateway.delete(f"{plan.settings.etcd.prefix}/shards/{shard}")
                gateway.delete_prefix(f"{plan.settings.etcd.prefix}/patroni/{shard}/")
                if plan.network is not None:
                    plan.network.remove_shard(memory.numbers[shard])
                raise

    def check_addition(self, shard: str) -> Memory:
        """What the home remembers now. Raises WrongHome when the shard can't be added, NotRunning."""
        self.supervisor()
        memory = self._memory()
        if not SHARD_NAME.fullmatch(shard) or shard in memory.shards:
            raise WrongHome(f"no shard can be added as {shard!r}: there are {', '.join(memory.shards)}")
        if len(memory.shards) >= MAX_SHARDS:
            raise WrongHome(f"a local cluster has room for {MAX_SHARDS} shards, and has them")
        kept = self.layout.backups(shard)
        if kept.exists():
            raise WrongHome(
                f"{kept} has the backups of an earlier shard {shard}, and a new one would archive into them: take another name, "
                f"or move that folder first (then `oncepay shards restore {shard} --folder WHERE` finds it)"
            )
        return memory

    def check_shard(self, shard: str) -> Memory:
        """What the home remembers now. Raises WrongHome when there is no such shard."""
        memory = self._memory()
        if shard not in memory.shards:
            raise WrongHome(f"there is no shard {shard}: there are {', '.join(memory.shards)}")
        return memory

    def accept_shard(self, shard: str, *, on_progress: OnProgress | None = None, timeout_s: float = UP_TIMEOUT_S) -> None:
        """Let the workers of a shard that was restored from a backup begin. Whether it owns anything is the caller's to know.

        Raises NotRunning, PartFailed; WrongHome for a shard that isn't there.
        """
        with self.only_one_up():
            control = self.supervisor()
            before = self.check_shard(shard)
            memory = msgspec.structs.replace(before, restored=tuple(name for name in before.restored if name != shard))
            plan = dataclasses.replace(self._plan(memory), os_user=os_user.for_postgres())
            config = supervisor.configuration(plan.programs(), self.layout, added_shard=shard, added_groups=("services",))
            self.layout.supervisor_config.write_text(config, encoding="utf-8")
            self.layout.remember(memory)
            record = shard_map.shard_record(plan.ports, plan.number(shard), shard, plan.node_hosts(shard))
            Gateway(plan.settings.etcd.endpoints).put(f"{plan.settings.etcd.prefix}/shards/{shard}", record)
            control.add_groups()
            BringUp(plan, memory, Hooks(), on_progress or (lambda _: None), timeout_s, added=shard).run()

    def restored(self) -> tuple[str, ...]:
        """The shards that were made from a backup, and have not been accepted."""
        return self._memory().restored

    def remove_shard(self, shard: str, check: Callable[[], None]) -> None:
        """Stop the shard's processes, forget it and delete its nodes' data. `check` raises when it is needed: it is called when
        the shard's record says that it may get no slots any more, which is taken back then.

        When it is interrupted it may be called again. Raises NotRunning; WrongHome for a shard that isn't there.
        """
        with self.only_one_up():
            self.supervisor()
            control = Supervisor(self.layout, timeout_s=DOWN_TIMEOUT_S)
            memory = self.check_shard(shard)
            plan = self._plan(memory)
            gateway = Gateway(plan.settings.etcd.endpoints)
            key = f"{plan.settings.etcd.prefix}/shards/{shard}"
            hosts, restored = plan.node_hosts(shard), shard in memory.restored
            record = partial(shard_map.shard_record, plan.ports, plan.number(shard), shard, hosts, restored=restored)
            gateway.put(key, record(removing=True))
            try:
                check()
            except BaseException:
                gateway.put(key, record())
                raise
            gateway.delete(key)
            ours = [program for program in plan.programs() if program.shard == shard]
            control.stop(program.name for program in ours if program.group == "services")
            control.stop((program.name for program in ours if program.group == "data"), wait=False)
            control.await_stopped({program.name for program in ours}, DOWN_TIMEOUT_S)
            gateway.delete_prefix(f"{plan.settings.etcd.prefix}/patroni/{shard}/")
            for node in node_names(shard):
                shutil.rmtree(self.layout.node(node), ignore_errors=True)
            if plan.network is not None:
                plan.network.remove_shard(memory.numbers[shard])
            self.layout.remember(memory.without_shard(shard))
            for group in reversed(supervisor.GROUPS):
                control.remove_group(f"{group}-{shard}")

    def _write(self, plan: Plan) -> None:
        """Everything that the processes read."""
        secrets.write_settings(self.layout, plan.settings)
        write_node_configs(plan)
        config = supervisor.configuration(plan.programs(), self.layout)
        self.layout.supervisor_config.write_text(config, encoding="utf-8")

    @contextlib.contextmanager
    def only_one_up(self) -> Iterator[None]:
        """Nobody else starts or changes this cluster meanwhile. Raises AlreadyRunning."""
        with self._lock(make=True) as is_free:
            if not is_free:
                raise self._at_work()
            yield

    @contextlib.contextmanager
    def _lock(self, *, make: bool = False) -> Iterator[bool]:
        """Whether nobody else starts or changes this cluster; then nobody does meanwhile. Without a lock nobody began."""
        with contextlib.ExitStack() as stack:
            is_free = True
            try:
                file = stack.enter_context(open(self.layout.lock, "ab" if make else "rb+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free = os.path.samestat(os.fstat(file.fileno()), os.stat(self.layout.lock))  # or it was purged meanwhile
            except BlockingIOError:
                is_free = False
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                raise WrongHome(f"can't use {self.layout.lock}: {error.strerror}") from error
            yield is_free

    def _at_work(self) -> AlreadyRunning:
        holders = processes.lock_holders(self.layout.lock)
        who = ", ".join(f"pid {pid}: {' '.join(processes.command(pid))}" for pid in holders) or "its pid can't be seen"
        return AlreadyRunning(f"another `oncepay` is at work on the cluster in {self.home} ({who})")

    def _next_memory(self, key_file: Path | None, webhook_secret_file: Path | None) -> Memory:
        """What the home will remember of this `up`. Raises WrongHome when that doesn't fit its data."""
        key = str(key_file.resolve()) if key_file else ""
        webhook_secret = str(webhook_secret_file.resolve()) if webhook_secret_file else ""
        parts = self._wanted_parts if self._wanted_parts is not None else default_parts()
        known = self.layout.memory()
        if known is None:
            base = self._wanted_base if self._wanted_base is not None else DEFAULT_BASE
            return Memory(base, self._wanted_shards, parts, (), key, webhook_secret, self._wanted_netns)
        if self._wanted_base not in (None, known.port_base):
            raise WrongHome(
                f"the cluster in {self.home} has the ports from {known.port_base} on, not from {self._wanted_base}: "
                "its nodes know each other by them. Use another ONCEPAY_HOME, or `oncepay down --purge`"
            )
        if self._wanted_netns and not known.netns:
            raise WrongHome(
                f"the nodes of the cluster in {self.home} know each other by loopback addresses: --netns needs a new "
                "ONCEPAY_HOME, or `oncepay down --purge`"
            )
        if key and key != known.stripe_key_file and known.made:
            raise WrongHome(
                f"the books in {self.home} belong to another Stripe account or to the stand-in: "
                "use another ONCEPAY_HOME, or `oncepay down --purge`"
            )
        return msgspec.structs.replace(
            known,
            parts=parts,
            stripe_key_file=key or known.stripe_key_file,
            stripe_webhook_secret_file=webhook_secret or known.stripe_webhook_secret_file,
        )

    def down(self, *, purge: bool = False) -> bool:
        """Stop everything; with `purge` kill it, with the clusters in its sub-folders, and delete their data.

        Returns whether anything was running. Raises WrongHome when there is nothing to purge but other things, AlreadyRunning
        when somebody else starts or changes the cluster for long, ClusterError when something can't be ended.
        """
        if purge:
            self.layout.check_purge()
        stopped = False
        held_since_s: float | None = None
        while True:
            stopped |= self._stop(purge=purge)
            with self._lock() as is_free:
                if is_free:
                    return self._clear(stopped=stopped, purge=purge)
            now_s = time.monotonic()
            held_since_s = held_since_s or now_s
            if now_s - held_since_s > LOCK_WAIT_S:
                raise self._at_work()
            time.sleep(LOCK_POLL_S)

    def _stop(self, *, purge: bool = False) -> bool:
        """Have the supervisor end everything, or with `purge` kill all; whether there was a supervisor."""
        pid = self._supervisor_pid()
        if pid is None:
            return False
        if purge:
            Leftovers(self.layout, below=True).kill()
        else:
            self._stop_supervisor(pid)
        return True

    def _clear(self, *, stopped: bool, purge: bool = False) -> bool:
        """End what is left, and remove what only a running cluster needs; whether anything was running. Under the lock."""
        leftovers = Leftovers(self.layout, below=purge)
        was_running = stopped or bool(leftovers.find())
        ended = leftovers.kill() if purge or stopped else leftovers.end()
        if not ended:
            raise ClusterError(f"these processes can't be ended: {leftovers.find()}")
        self._remove_networks(below=purge)
        if purge:
            self.layout.purge()
        elif not self.home.exists() or self.layout.holds_cluster():
            self.layout.clean_run()
        return was_running

    def would_end(self, *, purge: bool = False) -> Ending:
        """What `down` would stop, delete and leave. Raises WrongHome."""
        if purge:
            self.layout.check_purge()
        found = Leftovers(self.layout, below=purge).find()
        left = [self.home / name for each in self.layout.homes() for name in each.strange()] if purge else []
        return Ending.of(self.home, found, list(self.layout.data()) if purge else [], left)

    def _remove_networks(self, *, below: bool) -> None:
        """Delete the nodes' namespaces, in which nothing runs any more."""
        for layout in self.layout.homes() if below else [self.layout]:
            with contextlib.suppress(WrongHome):
                memory = layout.memory()
                if memory is not None and memory.netns:
                    Network(memory.port_base).remove()

    def _stop_supervisor(self, pid: int) -> None:
        """Ask it to stop all and end, and wait for that. What doesn't answer, or doesn't end within the bound, is left."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            Supervisor(self.layout).shut_down()
        except SupervisorStops:
            pass  # another `down` has asked it
        except SupervisorAway:
            os.close(handle)
            return
        processes.wait_for_end([handle], DOWN_TIMEOUT_S)

    def wait(self) -> None:
        """Until the cluster's supervisor ends."""
        pid = self._supervisor_pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            processes.wait_for_end([os.pidfd_open(pid)], wait_s=None)

    def status(self) -> Status:
        """What runs now. Raises NotRunning."""
        memory = self._memory()
        if not self.is_running():
            raise NotRunning(f"no cluster is running in {self.home}: start it with `oncepay up`")
        states, stopping = dict[str, ProcessState](), False
        try:
            states = Supervisor(self.layout, timeout_s=2.0).states()
        except SupervisorAway:
            pass
        except SupervisorStops:
            stopping = True
        return status.collect(self._plan(memory), states, stopping=stopping)

    def supervisor(self) -> Supervisor:
        """To stop and start single processes. Raises NotRunning."""
        if not self.is_running():
            raise NotRunning(f"no cluster is running in {self.home}")
        return Supervisor(self.layout)

    def pids(self) -> list[int]:
        """Every process of this cluster, the supervisor too."""
        return Leftovers(self.layout).find()

    def kill(self) -> None:
        """SIGKILL every process at once, as if the machine had lost its power. For tests of what survives that."""
        Leftovers(self.layout).kill()

    def postmaster_pid(self, node: str) -> int | None:
        """The pid of that node's postmaster, None when it has none."""
        return processes.postmaster_pid(str(self.layout.node(node) / "data"))

    def patroni_rest_credential(self) -> patroni.Credential:
        """With which Patroni's REST API takes changes, such as a switchover."""
        return patroni.Credential("oncepay", secrets.load_or_make(self.layout).patroni_rest)
