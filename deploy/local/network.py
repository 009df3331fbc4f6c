"""A network namespace for each node, so that nodes can be cut off from the rest on one machine.

All are on one bridge of the host: the host has the first address, and a node reaches nothing but the bridge. Cuts are silent, as
those of a real network are: nobody is told that a packet went nowhere. They need the command `ip` and nothing else: both ways by
taking the node off the bridge, one way by a neighbour entry with an address that nobody has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from deploy.local.errors import ClusterError
from deploy.local.ports import NODES_PER_SHARD, SPAN

Way = Literal["both", "in", "out"]
"""What is cut: all packets, those to the node, or those from it."""
NOBODY = "02:00:00:00:00:ff"
FIRST_NODE = 10
CALL_S = 20.0


class NetworkFailed(ClusterError):
    """The namespaces can't be made or changed."""

    slug = "local-cluster-network"


def why_not() -> str:
    """Why namespaces can't be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter") if shutil.which(name) is None]
    return f"network namespaces need the command {' and '.join(missing)} (Debian: iproute2, util-linux)" if missing else ""


@dataclass(frozen=True)
class Network:
    """The namespaces of the cluster whose ports begin at `base`. No two clusters have addresses in common."""

    base: int

    @property
    def bridge(self) -> str:
        return f"op{self.base}"

    @property
    def _net(self) -> str:
        number = self.base // SPAN
        return f"10.{200 + number // 250}.{number % 250}"

    @property
    def host(self) -> str:
        """The address of what is in no namespace: etcd's members, routers, workers."""
        return f"{self._net}.1"

    @property
    def subnet(self) -> str:
        return f"{self._net}.0/24"

    def address(self, shard: int, node: int) -> str:
        """A node's address; shards and nodes are counted from zero."""
        return f"{self._net}.{FIRST_NODE + shard * NODES_PER_SHARD + node}"

    def namespace(self, shard: int, node: int) -> str:
        """The name of the namespace, and of the host's end of its cable."""
        return f"op{self.base}-{shard}{node}"

    def enter(self, shard: int, node: int) -> list[str]:
        """What goes before a command that is to run in the node's namespace."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(shard, node)}"]

    def make(self, shards: int) -> None:
        """Make the bridge and all namespaces anew. Raises NetworkFailed."""
        if reason := why_not():
            raise NetworkFailed(reason)
        self.remove()
        try:
            _ip([f"link add {self.bridge} type bridge", f"addr add {self.host}/24 dev {self.bridge}"])
            _ip([f"link set {self.bridge} up"])
            for shard in range(shards):
                self.add(shard)
        except NetworkFailed:
            self.remove()
            raise

    def add(self, shard: int) -> None:
        """Make one shard's namespaces anew. Raises NetworkFailed."""
        self.remove_shard(shard)
        for node in range(NODES_PER_SHARD):
            name = self.namespace(shard, node)
            _ip(
                [
                    f"netns add {name}",
                    f"link add {name} type veth peer name eth0 netns {name}",
                    f"link set {name} master {self.bridge} up",
                ]
            )
            _ip([f"addr add {self.address(shard, node)}/24 dev eth0", "link set eth0 up", "link set lo up"], name)

    def remove_shard(self, shard: int) -> None:
        """Delete what there is of one shard's namespaces. Nothing may run in them any more. Raises NetworkFailed."""
        ours = {self.namespace(shard, node) for node in range(NODES_PER_SHARD)}
        for name in self.namespaces():
            if name in ours:
                _delete(name)

    def remove(self) -> None:
        """Delete what there is of it. Nothing may run in the namespaces any more."""
        for name in self.namespaces():
            _delete(name)
        if os.path.exists(f"/sys/class/net/{self.bridge}"):
            _ip([f"link del {self.bridge}"])

    def namespaces(self) -> list[str]:
        """Those that there are."""
        try:
            return sorted(name for name in os.listdir("/run/netns") if name.startswith(f"{self.bridge}-"))
        except FileNotFoundError:
            return []

    def cut(self, shard: int, node: int, way: Way) -> None:
        """Cut a node off from all others and from the host. Raises NetworkFailed."""
        own, address = self.namespace(shard, node), self.address(shard, node)
        if way == "both":
            _ip([f"link set {own} nomaster"])
        elif way == "out":
            _ip([_nowhere(peer, "eth0") for peer in self._peers(own)], own)
        else:
            _ip([_nowhere(address, self.bridge)])
            for other in self.namespaces():
                if other != own:
                    _ip([_nowhere(address, "eth0")], other)

    def join(self, shard: int, node: int) -> None:
        """Take back every cut of the node. Raises NetworkFailed."""
        own, address = self.namespace(shard, node), self.address(shard, node)
        _ip([f"link set {own} master {self.bridge}", f"neigh flush to {address} nud permanent dev {self.bridge}"])
        _ip(["neigh flush nud permanent dev eth0"], own)
        for other in self.namespaces():
            if other != own:
                _ip([f"neigh flush to {address} nud permanent dev eth0"], other)

    def _peers(self, own: str) -> list[str]:
        others = [name for name in self.namespaces() if name != own]
        return [self.host, *(self.address(int(name[-2]), int(name[-1])) for name in others)]


def _delete(name: str) -> None:
    """Delete a namespace, its cable first: the kernel takes that away some time after the namespace. Raises NetworkFailed."""
    own = f"/sys/class/net/{name}"
    if os.path.exists(own):
        try:
            _ip([f"link del {name}"])
        except NetworkFailed:
            if os.path.exists(own):
                raise
    _ip([f"netns del {name}"])


def _nowhere(address: str, device: str) -> str:
    return f"neigh replace {address} lladdr {NOBODY} nud permanent dev {device}"


def _ip(commands: Iterable[str] | Sequence[str], namespace: str = "") -> None:
    """Run commands of `ip`, in that namespace or the host's. Raises NetworkFailed."""
    inside = ["-n", namespace] if namespace else []
    text = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(["ip", *inside, "-batch", "-"], input=text, capture_output=True, text=True, timeout=CALL_S, check=False)
    if done.returncode != 0:
        raise NetworkFailed(f"ip: {text.strip()}: {done.stderr.strip()}")
