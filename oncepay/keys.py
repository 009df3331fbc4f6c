"""Idempotency keys: their slot, what a client may choose, and the form of those that the platform issues.

An issued key is `ok1_` and 32 characters of base64url over 24 bytes: an unguessable id (16), the number of the MAC secret
(1) and a keyed BLAKE2b over both (7). So a router tells an issued key from an invented one in a microsecond, without a
look-up. See docs/keys.md.
"""

from __future__ import annotations

import functools
import hmac
import re
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Mapping
from hashlib import blake2b, sha256
from typing import Literal

import msgspec

from oncepay.errors import InvalidKey, MissingKey

SLOTS = 65_536
SLOTS_KNOWN_MAX = 4096
"""Keys whose slot is remembered: a payment's is asked for up to ten times until it is settled."""
KEY_CHARACTERS = 200

ISSUED_PREFIX = "ok1_"
ISSUED_CHARACTERS = 36
ID_BYTES = 16
IDS_A_HASH = 4
MAC_BYTES = 7
SECRET_BYTES = 32

RESERVED_PREFIXES = (
    *("seller:", "payout:", "platform:", "refund:", "stripe:", "tipalti:", "bank:", "oncepay:"),
    *("pi_", "ch_", "py_", "re_", "pyr_", "po_", "txn_", "dp_", "du_", "tr_", "tu_", "evt_", "cs_", "seti_"),
)
"""Names that the platform gives to what belongs to no payment, and the providers' ids. Compared without case."""

_ISSUED_FORM = re.compile(r"ok\d+_", re.IGNORECASE)
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_ESCAPED = re.compile(r'\\(["\\])')
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")
_RAW_BYTES = ID_BYTES + 1 + MAC_BYTES

Origin = Literal["issued", "unproven", "client"]


class MacSecrets(msgspec.Struct, frozen=True):
    """The record `keys/mac`: secrets by number (0 to 255), and the number that new keys are made with.

    `added_at` is when the newest was added (seconds since the epoch): routers have to know it before it is used.
    """

    current: int
    secrets: dict[int, bytes]
    added_at: float = 0.0


@functools.lru_cache(SLOTS_KNOWN_MAX)
def slot(key: str) -> int:
    """The key's slot, 0 to 65,535: the first 16 bits of its SHA-256. `key` is unquoted."""
    digest = sha256(key.encode()).digest()
    return (digest[0] << 8) | digest[1]


def parse_key(header: str | None) -> str:
    """The key that an Idempotency-Key header carries: a quoted string (RFC 8941, 3.3.3) or raw.

    MissingKey when there is none; InvalidKey when it isn't 1 to 200 printable ASCII characters, begins or ends with a
    space, or is a dot segment, which no URL path can carry.
    """
    if not header:
        raise MissingKey
    key = header
    if header[0] == '"':
        key = header[1:-1]
        if "\\" in key or '"' in key or header[-1] != '"' or len(header) == 1:
            match = _QUOTED.fullmatch(header)
            if match is None:
                raise InvalidKey("it begins with a quote but isn't a quoted string")
            key = _ESCAPED.sub(r"\1", match[1])
        if not key:
            raise MissingKey("the Idempotency-Key header is empty")
    return check_characters(key)


def check_characters(key: str) -> str:
    """`key`, if it is one that can be: see parse_key."""
    if not 0 < len(key) <= KEY_CHARACTERS:
        raise InvalidKey(f"it has {len(key)} characters; 1 to {KEY_CHARACTERS} are allowed")
    if not (key.isascii() and key.isprintable()):
        raise InvalidKey("only printable ASCII characters are allowed")
    if key[0] == " " or key[-1] == " ":
        raise InvalidKey("it begins or ends with a space")
    if key in (".", ".."):
        raise InvalidKey("a URL path can't carry it")
    return key


def origin(key: str, secrets: Mapping[int, bytes]) -> Origin:
    """Where a key comes from; InvalidKey when its prefix is reserved.

    `issued`: by this platform, for sure. `unproven`: it looks issued but its MAC doesn't check, so it is acceptable only
    if a row with it exists already (its secret may have been rotated away). `client`: the client chose it.
    """
    if key.startswith(ISSUED_PREFIX):
        return "issued" if check_issued(key, secrets) else "unproven"
    if _ISSUED_FORM.match(key):
        return "unproven"
    if key.lower().startswith(RESERVED_PREFIXES):
        raise InvalidKey(f"keys that begin with {key[: _reserved_length(key)]} are reserved")
    return "client"


def check_issued(key: str, secrets: Mapping[int, bytes]) -> bool:
    """Whether the key's MAC was made with one of `secrets`."""
    if len(key) != ISSUED_CHARACTERS or not key.startswith(ISSUED_PREFIX):
        return False
    try:
        raw = a2b_base64(key[len(ISSUED_PREFIX) :].encode().translate(_FROM_URL), strict_mode=True)
    except (Base64Error, UnicodeEncodeError):
        return False
    if len(raw) != _RAW_BYTES:
        return False
    secret = secrets.get(raw[ID_BYTES])
    if secret is None:
        return False
    mac = blake2b(raw[: ID_BYTES + 1], key=secret, digest_size=MAC_BYTES).digest()
    return hmac.compare_digest(mac, raw[ID_BYTES + 1 :])


def issue(seed: bytes, first: int, count: int, secret_number: int, secret: bytes) -> list[str]:
    """Keys `first` to `first + count - 1` of the block with `seed`. The same arguments give the same keys."""
    maced = blake2b(key=secret, digest_size=MAC_BYTES)
    number = bytes((secret_number,))
    ids = _ids(seed, first, count)
    raws = []
    for at in range(0, count * ID_BYTES, ID_BYTES):
        numbered = ids[at : at + ID_BYTES] + number
        hasher = maced.copy()
        hasher.update(numbered)
        raws.append(numbered + hasher.digest())
    # 24 bytes make exactly 32 characters, so one conversion does for all of them.
    text = b2a_base64(b"".join(raws), newline=False).translate(_TO_URL).decode()
    return [ISSUED_PREFIX + text[at : at + 32] for at in range(0, len(text), 32)]


def _ids(seed: bytes, first: int, count: int) -> bytes:
    """The ids of keys `first` to `first + count - 1`, one after the other. One hash makes IDS_A_HASH of them."""
    seeded = blake2b(key=seed, digest_size=ID_BYTES * IDS_A_HASH)
    digests = []
    for index in range(first // IDS_A_HASH, -(-(first + count) // IDS_A_HASH)):
        hasher = seeded.copy()
        hasher.update(index.to_bytes(8, "big"))
        digests.append(hasher.digest())
    begin = first % IDS_A_HASH * ID_BYTES
    return b"".join(digests)[begin : begin + count * ID_BYTES]


def seller_key(seller: str) -> str:
    """The reserved key under which a seller's row lives."""
    return f"seller:{seller}"


def payout_key(seller: str, currency: str, sequence: int) -> str:
    """The reserved key of a seller's payout number `sequence` in `currency`."""
    return f"payout:{seller}:{currency}:{sequence}"


def funding_key(funding: str) -> str:
    """The reserved key under which money that came to the balance at Tipalti is booked."""
    return f"tipalti:{funding}"


def transaction_key(transaction: str) -> str:
    """The reserved key under which a balance transaction at Stripe is booked that no payment caused."""
    return f"stripe:{transaction}"


def _reserved_length(key: str) -> int:
    lower = key.lower()
    return max(len(prefix) for prefix in RESERVED_PREFIXES if lower.startswith(prefix))
