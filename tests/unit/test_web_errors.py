"""web/errors.py: one table from what went wrong to what a client reads, and it is total."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from proxy import errors
from proxy.oci.codes import SPEC_CODES, ErrorCode
from proxy.web.errors import TABLE, answer


def below(kind: type[errors.BreakwaterError]) -> Iterator[type[errors.BreakwaterError]]:
    """Every class of the tree."""
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


OURS = sorted({kind for kind in below(errors.BreakwaterError) if kind.__module__ == "proxy.errors"}, key=str)


def made(kind: type[errors.BreakwaterError]) -> errors.BreakwaterError:
    """One of this kind, with a sentence."""
    if issubclass(kind, errors.UpstreamError):
        return kind("what happened", upstream="docker.io")
    if issubclass(kind, errors.Denied):
        return kind("what happened", rule="**:latest", project="team")
    if issubclass(kind, errors.Unauthenticated):
        return kind("what happened", challenge='Bearer realm="https://here/token"')
    if issubclass(kind, errors.InvalidSettings):
        return kind(["what happened"])
    return kind("what happened")


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_has_an_answer_in_the_specs_format(kind: type[errors.BreakwaterError]) -> None:
    """distribution-spec § Error Codes: a JSON object with one key, `errors`; code, message and perhaps detail in it."""
    response = answer(made(kind))
    assert isinstance(response.body, bytes)
    document = json.loads(response.body)
    assert list(document) == ["errors"]
    (error,) = document["errors"]
    assert {"code", "message"} <= set(error) <= {"code", "message", "detail"}
    assert error["code"] in ErrorCode.__members__
    assert error["message"] == "what happened"
    assert response.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_no_error_falls_through_to_the_last_row(kind: type[errors.BreakwaterError]) -> None:
    """A kind of error that nobody thought of would be a 500. The root itself and settings are never a client's."""
    row = next(row for row in TABLE if issubclass(kind, row[0]))
    if kind not in (errors.BreakwaterError, errors.InvalidSettings, errors.InvalidManifest):
        assert row[0] is not errors.BreakwaterError, f"{kind.__name__} has no row"


def test_children_stand_before_their_parents() -> None:
    """The first row that matches decides, so a parent above its child would hide it."""
    kinds = [row[0] for row in TABLE]
    for n, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[n + 1 :]), kind


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.UnknownName("x"), 404, "NAME_UNKNOWN"),
        (errors.UnknownManifest("x"), 404, "MANIFEST_UNKNOWN"),
        (errors.UnknownBlob("x"), 404, "BLOB_UNKNOWN"),
        (errors.InvalidName("x"), 400, "NAME_INVALID"),
        (errors.InvalidDigest("x"), 400, "DIGEST_INVALID"),
        (errors.Unsupported("x"), 405, "UNSUPPORTED"),
        (errors.Denied("x", rule="r", project="p"), 403, "DENIED"),
        (errors.Unauthenticated("x", challenge="Bearer"), 401, "UNAUTHORIZED"),
        (errors.Overloaded("x"), 503, "UNAVAILABLE"),
        (errors.Unreachable("x", upstream="u"), 502, "UNAVAILABLE"),
        (errors.Misbehaved("x", upstream="u"), 502, "UNAVAILABLE"),
        (errors.Timeout("x", upstream="u"), 504, "UNAVAILABLE"),
        (errors.Throttled("x", upstream="u"), 503, "TOOMANYREQUESTS"),
        (errors.Unauthorised("x", upstream="u"), 403, "DENIED"),
        (errors.InvalidManifest("x"), 502, "MANIFEST_INVALID"),
        (errors.OutOfSpace("x"), 503, "UNAVAILABLE"),
        (errors.Unavailable("x"), 503, "UNAVAILABLE"),
        (errors.Corrupt("x"), 503, "UNAVAILABLE"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_what_an_operator_reads_in_the_manual_is_what_clients_get(
    error: errors.BreakwaterError, status: int, code: str
) -> None:
    """product.md, What a client sees: each meaning has one status and one code."""
    response = answer(error)
    assert isinstance(response.body, bytes)
    assert (response.status, json.loads(response.body)["errors"][0]["code"]) == (status, code)


def test_no_row_is_a_429_and_no_upstream_failure_is_a_401() -> None:
    """peers.md §5: containerd hammers the same mirror on 429 and fails over on 5xx; a relayed 401 makes clients log in
    here in vain."""
    assert 429 not in {status for _, _, status in TABLE}
    assert {kind for kind, _, status in TABLE if status == 401} == {errors.Unauthenticated}
    assert {code for _, code, _ in TABLE} <= set(ErrorCode)
    assert SPEC_CODES & {code for _, code, _ in TABLE}


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (errors.Throttled("x", upstream="u", retry_after_s=6.2), "Retry-After", "7"),
        (errors.Throttled("x", upstream="u"), "Retry-After", "30"),
        (errors.Throttled("x", upstream="u", retry_after_s=0.0), "Retry-After", "0"),
        (errors.Overloaded("x", retry_after_s=2.1), "Retry-After", "3"),
        (errors.Unauthenticated("x", challenge="Bearer realm=y"), "WWW-Authenticate", "Bearer realm=y"),
        (errors.Unsupported("x"), "Allow", "GET, HEAD"),
    ],
)
def test_what_to_do_next_is_said_in_a_header(error: errors.BreakwaterError, header: str, value: str) -> None:
    """RFC 9110: when to come back, how to log in, which methods there are."""
    assert answer(error).headers[header] == value


def test_a_refusal_names_its_rule_and_project() -> None:
    """product.md: for a refusal, which rule of which project; for failures, which upstream and what class."""
    denied = answer(errors.Denied("no", rule="**:latest", project="team")).body
    failed = answer(errors.Timeout("slow", upstream="quay.io")).body
    assert isinstance(denied, bytes) and isinstance(failed, bytes)
    assert json.loads(denied)["errors"][0]["detail"] == {"rule": "**:latest", "project": "team"}
    assert json.loads(failed)["errors"][0]["detail"] == {"upstream": "quay.io", "failure": "timeout"}


def test_nothing_that_a_client_sent_breaks_the_envelope() -> None:
    """Sentences quote names; whatever was in them is escaped."""
    response = answer(errors.UnknownName('no "upstream" for \x00\r\n\u2028<script>'))
    assert isinstance(response.body, bytes)
    assert response.body.isascii() and b"\n" not in response.body
    assert "<script>" in json.loads(response.body)["errors"][0]["message"]
