"""Error codes (distribution-spec § Error Codes)."""

from __future__ import annotations

import json

import pytest

from proxy.oci.codes import SPEC_CODES, ErrorCode, envelope

SPEC = {
    "BLOB_UNKNOWN",
    "BLOB_UPLOAD_INVALID",
    "BLOB_UPLOAD_UNKNOWN",
    "DIGEST_INVALID",
    "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID",
    "MANIFEST_UNKNOWN",
    "NAME_INVALID",
    "NAME_UNKNOWN",
    "SIZE_INVALID",
    "UNAUTHORIZED",
    "DENIED",
    "UNSUPPORTED",
    "TOOMANYREQUESTS",
}


def test_the_fourteen_codes_of_the_spec_are_all_there() -> None:
    """distribution-spec § Error Codes."""
    assert {code.name for code in SPEC_CODES} == SPEC


@pytest.mark.parametrize("code", ErrorCode, ids=lambda code: code.name)
def test_every_code_has_an_error_status_and_a_sentence(code: ErrorCode) -> None:
    """Nothing is an error without a status of 4xx or 5xx and words for a person."""
    assert 400 <= code.status < 600
    assert code.sentence


def test_no_two_codes_are_one() -> None:
    """An enum makes aliases of equal values without a word; that would lose a wire name."""
    assert len(ErrorCode.__members__) == len(list(ErrorCode))


def test_the_envelope_is_the_one_of_the_spec() -> None:
    """distribution-spec § Error Codes: a list of errors with code, message and perhaps detail."""
    body = envelope(ErrorCode.DENIED, "no", {"rule": "deny", "project": "platform"})
    assert json.loads(body) == {
        "errors": [{"code": "DENIED", "message": "no", "detail": {"rule": "deny", "project": "platform"}}]
    }


def test_an_empty_message_becomes_the_sentence_of_the_code() -> None:
    """An error always says something; without detail the key is left out."""
    error = json.loads(envelope(ErrorCode.NAME_UNKNOWN))["errors"][0]
    assert error == {"code": "NAME_UNKNOWN", "message": ErrorCode.NAME_UNKNOWN.sentence}


def test_any_message_can_be_sent() -> None:
    """Whatever a client smuggled into a sentence leaves as ASCII JSON."""
    body = envelope(ErrorCode.NAME_INVALID, "é\u2028\ud800\r\n\0")
    assert body.isascii()
    assert b"\n" not in body
    assert json.loads(body)["errors"][0]["message"] == "é\u2028\ud800\r\n\0"
