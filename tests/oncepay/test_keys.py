"""Keys: slots, what a header may carry, and the form of issued keys."""

from __future__ import annotations

import base64
import hashlib
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncepay.errors import InvalidKey, MissingKey
from oncepay.keys import (
    ISSUED_CHARACTERS,
    RESERVED_PREFIXES,
    MacSecrets,
    check_issued,
    issue,
    origin,
    parse_key,
    payout_key,
    seller_key,
    slot,
)

PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F))
SECRETS = {0: b"a" * 32, 7: b"b" * 32}

acceptable = st.text(PRINTABLE, min_size=1, max_size=200).filter(lambda key: key.strip() == key and key not in (".", ".."))


def quoted(key: str) -> str:
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.text(PRINTABLE, max_size=200))
def test_slot_is_the_first_16_bits_of_the_digest(key: str) -> None:
    assert slot(key) == int(hashlib.sha256(key.encode()).hexdigest()[:4], 16)


@given(acceptable)
def test_a_key_is_the_same_quoted_and_raw(key: str) -> None:
    assert parse_key(quoted(key)) == key
    if not key.startswith('"'):
        assert parse_key(key) == key


@given(st.text(min_size=1, max_size=250))
def test_what_is_accepted_is_printable_and_short(header: str) -> None:
    try:
        key = parse_key(header)
    except (InvalidKey, MissingKey):
        return
    assert 0 < len(key) <= 200
    assert set(key) <= set(PRINTABLE)
    assert key == key.strip()


@pytest.mark.parametrize("header", [None, "", '""'])
def test_a_missing_key(header: str | None) -> None:
    with pytest.raises(MissingKey):
        parse_key(header)


@pytest.mark.parametrize(
    "header",
    ['"', '"a', '"a"b"', '"a";v=1', '"a\\n"', '"\\"', "ä", "a\tb", "a\x7f", " a", "a ", '" a"', "..", ".", "a" * 201, '"a" "b"'],
)
def test_an_invalid_key(header: str) -> None:
    with pytest.raises(InvalidKey):
        parse_key(header)


@pytest.mark.parametrize("prefix", RESERVED_PREFIXES)
def test_reserved_prefixes_are_refused_in_any_case(prefix: str) -> None:
    for key in (prefix, prefix + "1", prefix.upper() + "x", prefix.title() + "x"):
        with pytest.raises(InvalidKey, match="reserved"):
            origin(key, SECRETS)


def test_the_platform_s_own_names_are_reserved() -> None:
    for key in (seller_key("s1"), payout_key("s1", "usd", 3), "pi_3Abc", "txn_1"):
        with pytest.raises(InvalidKey):
            origin(key, SECRETS)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**40), st.integers(0, 50), st.sampled_from([0, 7]))
def test_issued_keys_check_and_are_distinct(seed: bytes, first: int, count: int, number: int) -> None:
    keys = issue(seed, first, count, number, SECRETS[number])
    assert len(set(keys)) == len(keys) == count
    for key in keys:
        assert len(key) == ISSUED_CHARACTERS
        assert parse_key(key) == key
        assert origin(key, SECRETS) == "issued"
        assert origin(key, {number: b"another secret"}) == "unproven"
        assert not check_issued(key, {})


@given(st.binary(min_size=32, max_size=32), st.integers(0, 1000), st.integers(1, 30), st.integers(0, 29))
def test_a_range_is_the_same_in_one_go_or_in_two(seed: bytes, first: int, count: int, cut: int) -> None:
    cut = min(cut, count)
    whole = issue(seed, first, count, 7, SECRETS[7])
    assert whole == issue(seed, first, cut, 7, SECRETS[7]) + issue(seed, first + cut, count - cut, 7, SECRETS[7])


@given(st.integers(4, ISSUED_CHARACTERS - 1), st.sampled_from(string.ascii_letters + string.digits + "-_"))
def test_one_changed_character_doesn_t_check(position: int, character: str) -> None:
    key = issue(b"s" * 32, 5, 1, 7, SECRETS[7])[0]
    changed = key[:position] + character + key[position + 1 :]
    assert check_issued(changed, SECRETS) == (changed == key)


@given(st.binary(min_size=24, max_size=24))
def test_an_invented_key_doesn_t_check(raw: bytes) -> None:
    assert origin("ok1_" + base64.urlsafe_b64encode(raw).decode(), SECRETS) == "unproven"


@given(st.text(max_size=60))
def test_checking_never_raises(text: str) -> None:
    assert not check_issued("ok1_" + text, SECRETS)
    assert not check_issued(text, SECRETS)


@pytest.mark.parametrize("key", ["ok1_", "OK1_abc", "ok2_abcdef", "ok1_" + "A" * 32, "ok1_" + "A" * 31])
def test_what_looks_issued_is_never_a_client_s_own(key: str) -> None:
    assert origin(key, SECRETS) == "unproven"


def test_different_seeds_give_different_keys() -> None:
    assert not set(issue(b"x" * 32, 0, 1000, 0, SECRETS[0])) & set(issue(b"y" * 32, 0, 1000, 0, SECRETS[0]))


def test_secrets_survive_their_record() -> None:
    secrets = MacSecrets(7, SECRETS)
    assert msgspec.json.decode(msgspec.json.encode(secrets), type=MacSecrets) == secrets
