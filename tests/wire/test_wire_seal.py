"""The seal: opened by whom it is for, and by nobody else; and where its key comes from."""

import hashlib
import hmac
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from fedsieve.types import InputError
from fedsieve.wire import Body, Envelope, WireError, encode, key_of_run, seal, unseal

KEY = bytes(range(32))
BODY = Body(encode({"n": 2.0}))
OURS = Envelope("run-1", "lr .1", 7, 3, "up", b"base")
SEALED = seal(BODY, OURS, KEY)


def test_a_sealed_message_opens_and_is_32_bytes_longer() -> None:
    assert unseal(SEALED, OURS, KEY) == BODY
    assert len(SEALED) == len(BODY.data) + 32


def test_the_tag_is_what_the_page_says() -> None:
    told = b"fedsieve seal 3\0" + struct.pack("<IIIIqq", 5, 5, 2, 4, 7, 3) + b"run-1" + b"lr .1" + b"up" + b"base"
    assert SEALED[:32] == hmac.new(KEY, told + hashlib.sha256(BODY.data).digest(), hashlib.sha256).digest()


def test_a_message_that_was_opened_before_is_the_same_one_and_no_other_passes_for_it() -> None:
    first = unseal(SEALED, OURS, KEY)
    again = seal(first, replace(OURS, client=4), KEY)
    assert unseal(again, replace(OURS, client=4), KEY, first) is first
    other = seal(Body(BODY.data[:-1] + b"!"), OURS, KEY)
    assert unseal(other, OURS, KEY, first).data == BODY.data[:-1] + b"!"
    longer = seal(Body(b"!" + BODY.data), OURS, KEY)
    assert unseal(longer, OURS, KEY, first).data == b"!" + BODY.data
    with pytest.raises(WireError, match="the seal does not fit"):
        unseal(other[:32] + BODY.data, OURS, KEY, first)


OTHERS = {
    "another run": replace(OURS, run="run-2"),
    "other settings": replace(OURS, settings="lr .2"),
    "the run's name longer, its settings cut": replace(OURS, run="run-1l", settings="r .1"),
    "another round (a replay)": replace(OURS, round=8),
    "another client": replace(OURS, client=4),
    "another direction (its own message sent back)": replace(OURS, direction="down"),
    "another base": replace(OURS, base=b"esab"),
    "no base": replace(OURS, base=b""),
    "the run's name cut, the base longer": replace(OURS, run="run-", base=b"1base"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_refused_from(other: str) -> None:
    with pytest.raises(WireError, match="the seal does not fit"):
        unseal(SEALED, OTHERS[other], KEY)


def test_refused_with_another_key() -> None:
    with pytest.raises(WireError, match="the seal does not fit"):
        unseal(SEALED, OURS, KEY[::-1])


def test_refused_when_cut_anywhere() -> None:
    for end in range(len(SEALED)):
        with pytest.raises(WireError):
            unseal(SEALED[:end], OURS, KEY)


def test_refused_with_any_bit_flipped() -> None:
    for at in range(8 * len(SEALED)):
        damaged = bytearray(SEALED)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(WireError):
            unseal(bytes(damaged), OURS, KEY)


def test_refused_with_more_bytes_behind() -> None:
    with pytest.raises(WireError):
        unseal(SEALED + b"\0", OURS, KEY)


def test_tags_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: asked.append((a, b)) or False)
    with pytest.raises(WireError):
        unseal(SEALED, OURS, KEY)
    assert len(asked) == 1


def test_a_short_key_or_a_third_direction_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        seal(BODY, OURS, b"short")
    with pytest.raises(ValueError, match="sideways"):
        seal(BODY, replace(OURS, direction="sideways"), KEY)


def test_a_key_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    assert key_of_run({"FEDSIEVE_KEY": KEY.hex()}) == KEY
    assert key_of_run({"FEDSIEVE_KEY_FILE": str(tmp_path / "key")}) == KEY


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no key: set FEDSIEVE_KEY"),
        ({"FEDSIEVE_KEY": "hunter2"}, "FEDSIEVE_KEY is not hexadecimal"),
        ({"FEDSIEVE_KEY": "abcd"}, "FEDSIEVE_KEY has 2 bytes"),
        ({"FEDSIEVE_KEY_FILE": "{dir}/none"}, "cannot be read: No such file"),
        ({"FEDSIEVE_KEY_FILE": "{dir}/empty"}, "no key"),
        ({"FEDSIEVE_KEY_FILE": "{dir}/noise"}, "is not hexadecimal"),
        ({"FEDSIEVE_KEY": "ab", "FEDSIEVE_KEY_FILE": "x"}, "both FEDSIEVE_KEY and FEDSIEVE_KEY_FILE"),
    ],
)
def test_a_bad_key_is_named_in_one_line(given: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError) as error:
        key_of_run({name: value.replace("{dir}", str(tmp_path)) for name, value in given.items()})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)
