"""What Patroni says of a shard: its own keys in etcd, and the REST API of each member."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from oncepay.errors import OncepayError, ShardUnavailable
from oncepay.etcd import Etcd
from oncepay.settings import PatroniSettings

ASK_S = 3.0
CHANGE_S = 120.0
"""A restart answers when Postgres runs again; a switchover when there is another leader, or Patroni gave up."""


class PatroniRefused(OncepayError):
    """Patroni refuses."""

    status = 409
    slug = "patroni-refused"


class Member(msgspec.Struct, frozen=True):
    """A node as it describes itself in etcd. `xlog_location` is a position in bytes."""

    name: str = ""
    conn_url: str = ""
    api_url: str = ""
    state: str = ""
    role: str = ""
    timeline: int = 0
    xlog_location: int = 0
    replication_state: str = ""
    pending_restart: bool = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of its Postgres."""
        url = urlsplit(self.conn_url)
        return url.hostname or "", url.port or 5432

    @property
    def streams(self) -> bool:
        """Whether it is a standby that follows its leader."""
        return self.role == "replica" and self.state == "running" and self.replication_state == "streaming"


class Sync(msgspec.Struct, frozen=True):
    """Who may be elected: the leader, and who voted for it. `quorum` is how many of the voters must have a commit, less one."""

    leader: str | None = None
    sync_standby: str | None = None
    quorum: int | str = 0

    @property
    def voters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.sync_standby or "").split(",") if name)


class ShardMembers(msgspec.Struct, frozen=True):
    """A shard as Patroni's keys show it. Members are by name, in order."""

    shard: str
    leader: str | None
    members: tuple[Member, ...]
    sync: Sync
    initialized: bool
    config: dict[str, object] = {}
    """What all nodes share, as Patroni keeps it; empty when it keeps nothing."""

    def member(self, name: str) -> Member:
        """Raises ShardUnavailable for a node that isn't there."""
        for member in self.members:
            if member.name == name:
                return member
        raise ShardUnavailable(f"node {name} of shard {self.shard} isn't there: no Patroni of that name is in touch with etcd")

    def leading(self) -> Member:
        """The leader. Raises ShardUnavailable while there is none."""
        if self.leader is None:
            raise ShardUnavailable(f"shard {self.shard} has no leader now")
        return self.member(self.leader)

    def standbys(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.name != self.leader)


async def read(etcd: Etcd, shard: str) -> ShardMembers:
    """The shard's members now. Raises EtcdUnavailable."""
    prefix = f"patroni/{shard}/"
    found, _ = await etcd.get_prefix(prefix)
    values = {kv.key.removeprefix(prefix): kv.value for kv in found}
    members = [
        msgspec.structs.replace(msgspec.json.decode(value, type=Member), name=name.removeprefix("members/"))
        for name, value in values.items()
        if name.startswith("members/")
    ]
    leader = values.get("leader")
    return ShardMembers(
        shard=shard,
        leader=leader.decode() if leader else None,
        members=tuple(sorted(members, key=lambda member: member.name)),
        sync=msgspec.json.decode(values["sync"], type=Sync) if values.get("sync") else Sync(),
        initialized=bool(values.get("initialize")),
        config=msgspec.json.decode(values["config"], type=dict[str, object]) if values.get("config") else {},
    )


async def shard_names(etcd: Etcd) -> list[str]:
    """Every shard that is registered, also those that own nothing."""
    found, _ = await etcd.get_prefix("shards/")
    return sorted((kv.key.removeprefix("shards/") for kv in found), key=lambda name: (len(name), name))


class PatroniRest:
    """Changes through Patroni's REST API: `async with PatroniRest(settings.patroni) as rest: …`."""

    def __init__(self, settings: PatroniSettings) -> None:
        self._authorization = aiohttp.encode_basic_auth(settings.username, settings.password)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers={"Authorization": self._authorization})
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def switchover(self, leader: Member, candidate: str) -> tuple[bool, str]:
        """Ask for a change of leader; whether it happened, and Patroni's words.

        False may also mean that Patroni knows no fit candidate yet, or lost sight of it: look who leads. Raises PatroniRefused
        for what it never does, ShardUnavailable without an answer.
        """
        status, text = await self._post(leader, "switchover", {"leader": leader.name, "candidate": candidate})
        if status not in (200, 202, 412, 503):
            raise PatroniRefused(f"{leader.name}: {text} ({status})")
        return status == 200, text

    async def restart(self, member: Member) -> tuple[bool, str]:
        """Restart the node's Postgres, and wait until it runs again; whether it did, and Patroni's words.

        False: Patroni is busy with something else, or the restart failed. Raises PatroniRefused, ShardUnavailable.
        """
        status, text = await self._post(member, "restart", {})
        if status not in (200, 503):
            raise PatroniRefused(f"{member.name}: {text} ({status})")
        return status == 200, text

    async def _post(self, member: Member, call: str, body: dict[str, object]) -> tuple[int, str]:
        assert self._session is not None, "open it first"
        url = urlsplit(member.api_url)._replace(path=f"/{call}").geturl()
        try:
            async with self._session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=CHANGE_S)) as answer:
                return answer.status, (await answer.text()).strip()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ShardUnavailable(f"Patroni of {member.name} gave no answer to {call}: {error!r}") from error

    async def ready(self, members: Iterable[Member]) -> dict[str, bool]:
        """By node: whether its Patroni answers, and says that its Postgres runs."""
        wanted = list(members)
        return dict(zip((member.name for member in wanted), await asyncio.gather(*map(self._readiness, wanted)), strict=True))

    async def answering(self, members: Iterable[Member]) -> list[str]:
        """The nodes whose Patroni gives any answer."""
        wanted = [member for member in members if member.api_url]
        answers = await asyncio.gather(*map(self._answers, wanted))
        return [member.name for member, answered in zip(wanted, answers, strict=True) if answered]

    async def _answers(self, member: Member) -> bool:
        assert self._session is not None, "open it first"
        url = urlsplit(member.api_url)._replace(path="/liveness").geturl()
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)):
                return True
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _readiness(self, member: Member) -> bool:
        assert self._session is not None, "open it first"
        url = urlsplit(member.api_url)._replace(path="/readiness").geturl()
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False
