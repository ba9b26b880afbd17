"""What the models of the settings are made of: sections, keys, and the types of their values.

A type is how a value is written in TOML, read by its `…_of` in `values.py`. Every key says what it is, its unit, and why
its default is what it is; the reference in the README is generated from that (`shown.py`), and `setting` demands it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import tzinfo
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from proxy.oci.names import SourceHost
from proxy.settings import values

T = TypeVar("T")


class IsPath:
    """Marks a key that holds a path in the file system; relative ones are taken from the folder of their file."""


def listed(value: Any) -> Any:
    """One value stands for a list of it; TOML's lists become tuples."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value,)


Size = Annotated[int, BeforeValidator(values.size_of)]
Rate = Annotated[int, BeforeValidator(values.rate_of)]
RateOrZero = Annotated[int, BeforeValidator(values.rate_or_zero_of)]
Amount = Annotated[values.Amount, BeforeValidator(values.amount_of)]
Duration = Annotated[float, BeforeValidator(values.duration_of)]
DurationOrZero = Annotated[float, BeforeValidator(values.duration_or_zero_of)]
Lasting = Annotated[float, BeforeValidator(values.lasting_of)]
ListenAddress = Annotated[values.TcpAddress | values.UnixAddress, BeforeValidator(values.address_of)]
Url = Annotated[str, BeforeValidator(values.url_of)]
Path = Annotated[str, BeforeValidator(values.path_of), IsPath()]
Host = Annotated[SourceHost, BeforeValidator(values.source_host_of)]
AdminHost = Annotated[str, BeforeValidator(values.host_name_of)]
ProjectName = Annotated[str, BeforeValidator(values.project_name_of)]
ProjectPath = Annotated[str, BeforeValidator(values.project_path_of)]
RepositoryGlob = Annotated[str, BeforeValidator(values.repository_glob_of)]
TagGlob = Annotated[str, BeforeValidator(values.tag_glob_of)]
Rule = Annotated[str, BeforeValidator(values.rule_of)]
SecretHash = Annotated[SecretStr, AfterValidator(values.secret_hash_of)]
Span = Annotated[values.Span, BeforeValidator(values.span_of)]
Zone = Annotated[tzinfo, BeforeValidator(values.zone_of)]
Instant = Annotated[float, BeforeValidator(values.instant_of)]
Helper = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Some = Annotated[tuple[T, ...], BeforeValidator(listed)]
K = TypeVar("K")
Table = Annotated[Mapping[K, T], AfterValidator(MappingProxyType)]


def setting(default: Any = ..., /, *, what: str, why: str, unit: str = "", instead: str = "") -> Any:
    """A key of a section: its default as the file would spell it, what it is, its unit, and the reason of the default.

    Without a default the key must be written, or something from outside the models stands in: `instead` says what.
    `None` means that the key is absent unless written.
    """
    return Field(default, description=what, json_schema_extra={"unit": unit, "why": why, "instead": instead})


class Section(BaseModel):
    """A table of the file: frozen, nothing unknown, TOML's types as they are."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, arbitrary_types_allowed=True
    )
