"""Whom events may be sent to: public addresses only, unless the deployment allows others.

An endpoint's address is chosen by a client, so it must not reach what only this network reaches. Names are checked by the
addresses they resolve to, at each connection: what a name meant when the endpoint was made says nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from oncepay.errors import InvalidField

URL_CHARACTERS = 2_000
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IN_IPV4 = ipaddress.ip_network("2002::/16"), _NAT64


class PrivateAddress(OSError):
    """The endpoint's name is of an address that isn't public."""


def is_public(address: str) -> bool:
    """Whether an address can be reached from everywhere: no private, loopback, link-local, multicast or embedded one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if any(found in network for network in _IN_IPV4):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def check_url(url: str, *, allow_private: bool) -> str:
    """The address of an endpoint. Raises InvalidField for one that can't be, or may not."""
    if len(url) > URL_CHARACTERS or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidField(f"an address has at most {URL_CHARACTERS} printable ASCII characters", field="url")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidField(f"this is no address: {error}", field="url") from None
    if parts.scheme != "https" and not (allow_private and parts.scheme == "http"):
        raise InvalidField("an address begins with https://", field="url")
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise InvalidField("an address has a host, no user and no fragment", field="url")
    if not allow_private and not may_reach(host):
        raise InvalidField(f"{host} is in a private network", field="url")
    return url


def may_reach(host: str) -> bool:
    """Whether a host in an address may be asked for: a name may, what it resolves to is checked then."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower().rstrip(".") != "localhost"
    return is_public(host)


class PublicResolver(AbstractResolver):
    """Resolves names, and leaves out what isn't public; aiohttp connects to nothing else."""

    def __init__(self, inner: AbstractResolver | None = None) -> None:
        self._inner = inner or aiohttp.ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """Raises PrivateAddress when no public address is left."""
        found = await self._inner.resolve(host, port, family)
        public = [result for result in found if is_public(result["host"])]
        if not public:
            raise PrivateAddress(f"{host} is in a private network")
        return public

    async def close(self) -> None:
        await self._inner.close()
