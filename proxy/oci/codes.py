"""Error codes (distribution-spec § Error Codes): the wire name, our status and the sentence, declared once.

The spec names the codes and leaves the status to the registry. `web/errors.py` may answer with another status where the
fault is not the client's (a manifest that upstream spoilt is a 502), but never with another name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any


class ErrorCode(Enum):
    """One code. `name` goes on the wire; `status` and `sentence` are what we say unless there is more to say."""

    # The fourteen of the spec, in its order. Those about uploads are here so that the registry of codes is complete.
    BLOB_UNKNOWN = (404, "this repository has no such blob")
    BLOB_UPLOAD_INVALID = (400, "the blob upload is invalid")
    BLOB_UPLOAD_UNKNOWN = (404, "there is no such blob upload")
    DIGEST_INVALID = (400, "this is not a digest: expected sha256:<64 hex> or sha512:<128 hex>, lower case")
    MANIFEST_BLOB_UNKNOWN = (404, "the manifest names a manifest or blob that this repository does not have")
    MANIFEST_INVALID = (400, "this is not a manifest that can be served")
    MANIFEST_UNKNOWN = (404, "this repository has no such manifest")
    NAME_INVALID = (400, "this is not a repository name")
    NAME_UNKNOWN = (404, "there is no such repository")
    SIZE_INVALID = (400, "the length does not match the content")
    UNAUTHORIZED = (401, "say who you are")
    DENIED = (403, "a rule refuses this")
    UNSUPPORTED = (405, "this registry is read-only")
    TOOMANYREQUESTS = (429, "too many requests")

    # Ours. Clients read a code they do not know as UNKNOWN, so these cost nothing and say more.
    TAG_INVALID = (400, "this is not a tag")
    REQUEST_INVALID = (400, "the request cannot be understood")
    RANGE_INVALID = (416, "no part of the blob lies in this range")
    UNAVAILABLE = (503, "this cannot be had at the moment")
    UNKNOWN = (500, "something went wrong here")

    def __init__(self, status: int, sentence: str) -> None:
        self.status = status
        self.sentence = sentence


#: The spec's fourteen, as opposed to ours.
SPEC_CODES = frozenset(list(ErrorCode)[:14])


def envelope(code: ErrorCode, message: str = "", detail: Mapping[str, Any] | None = None) -> bytes:
    """The JSON body of an error response (distribution-spec § Error Codes), as ASCII.

    `message` is for a person; the code's own sentence stands in for an empty one. `detail` must be JSON.
    """
    error: dict[str, Any] = {"code": code.name, "message": message or code.sentence}
    if detail is not None:
        error["detail"] = dict(detail)
    return json.dumps({"errors": [error]}, separators=(",", ":")).encode("ascii")
