"""Sizes, durations, addresses, URLs and rules: what may be written, and what is refused with which words."""

import math
from typing import Any

import pytest

from proxy.settings import values
from proxy.settings.values import Amount, TcpAddress, UnixAddress


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        pytest.param("200GiB", 200 * 2**30, id="powers of two"),
        pytest.param("10MB", 10_000_000, id="powers of ten"),
        pytest.param("1.5 TiB", 3 * 2**39, id="a fraction and a space"),
        pytest.param("512B", 512, id="bytes by name"),
        pytest.param("512", 512, id="bytes without a unit, as the environment gives them"),
        pytest.param(4096, 4096, id="a number"),
        pytest.param("1kb", 1000, id="capitals do not matter"),
    ],
)
def test_a_size_is_bytes(text: Any, n_bytes: int) -> None:
    """kB, MB, GB, TB count in thousands; KiB, MiB, GiB, TiB in 1024s; no unit means bytes."""
    assert values.size_of(text) == n_bytes


@pytest.mark.parametrize(
    "wrong",
    ["10G", "ten", "", "-1GiB", "0", 0, -5, "1e9", True, 1.5, None, ["1GiB"], "9EiB", "99999999TiB", "10 GiB x"],
)
def test_what_is_no_size_is_refused(wrong: Any) -> None:
    """A bare G is refused, for it may mean either; so are zero, booleans and floats."""
    with pytest.raises(ValueError, match="size"):
        values.size_of(wrong)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("80%", Amount(share=0.8)), ("2.5 %", Amount(share=0.025)), ("20GiB", Amount(n_bytes=20 * 2**30))],
)
def test_an_amount_is_bytes_or_a_share(text: str, amount: Amount) -> None:
    """`capacity` and `min_free` are sizes, or shares of the file system."""
    assert values.amount_of(text) == amount


def test_an_amount_becomes_bytes_on_a_file_system() -> None:
    """A share is taken of the file system's size; bytes are bytes on any."""
    assert Amount(share=0.05).of(1000) == 50
    assert Amount(n_bytes=7).of(1000) == 7


@pytest.mark.parametrize("wrong", ["0%", "101%", "-5%", "%", "five%", "80 percent"])
def test_what_is_no_share_is_refused(wrong: str) -> None:
    """Shares are above 0% and at most 100%."""
    with pytest.raises(ValueError, match="%"):
        values.amount_of(wrong)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("1h30m", 5400), ("2s", 2), ("250ms", 0.25), ("1d", 86400), ("1.5h", 5400)]
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    """Units are ms, s, m, h and d, and may follow each other."""
    assert values.duration_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("wrong", [10, 10.5, "10", "ten minutes", "", "-5s", "0s", True, "1h 30m", "forever", None])
def test_what_is_no_duration_is_refused(wrong: Any) -> None:
    """A number has no unit, and guessing one has made outages of minutes out of seconds."""
    with pytest.raises(ValueError, match="duration"):
        values.duration_of(wrong)


def test_zero_and_forever_are_durations_where_they_mean_something() -> None:
    """`0s` always asks; `forever` never ends. Nothing is older than forever."""
    assert values.duration_or_zero_of("0s") == 0
    assert values.lasting_of("forever") == math.inf
    assert not values.lasting_of("forever") < 1e18


@pytest.mark.parametrize(("text", "rate"), [("10KiB/s", 10240), ("1MB/s", 1_000_000)])
def test_a_rate_is_bytes_per_second(text: str, rate: int) -> None:
    """A rate is a size per second."""
    assert values.rate_of(text) == rate


@pytest.mark.parametrize(
    ("text", "start", "end"), [("08:00-18:00", 480, 1080), ("22:00 - 06:00", 1320, 360), ("00:00-24:00", 0, 1440)]
)
def test_hours_are_minutes_of_a_day(text: str, start: int, end: int) -> None:
    """Over midnight, too."""
    assert values.span_of(text) == values.Span(start, end)


@pytest.mark.parametrize(
    "wrong", ["8-18", "08:00", "24:00-06:00", "08:60-18:00", "08:00-24:01", "08:00-08:00", 8, None]
)
def test_what_are_no_hours_is_refused(wrong: Any) -> None:
    """With a sentence that shows how it is written."""
    with pytest.raises(ValueError, match=r"day|no time at all"):
        values.span_of(wrong)


@pytest.mark.parametrize("wrong", ["Europe/Nowhere", "../../etc/passwd", "", "UTC+1h", 1, None])
def test_what_is_no_time_zone_is_refused(wrong: Any) -> None:
    """A rate that held at another hour than somebody meant would be found out late."""
    with pytest.raises(ValueError, match="time zone"):
        values.zone_of(wrong)


@pytest.mark.parametrize("wrong", ["10KiB", 10, "/s", "10KiB/m", "10KiB/s/s", None])
def test_what_is_no_rate_is_refused(wrong: Any) -> None:
    """Without /s it is a size, not a rate."""
    with pytest.raises(ValueError, match="rate"):
        values.rate_of(wrong)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:5000", TcpAddress("127.0.0.1", 5000)),
        (":5000", TcpAddress("", 5000)),
        ("[::]:5000", TcpAddress("::", 5000)),
        ("[fe80::1%eth0]:0", TcpAddress("fe80::1%eth0", 0)),
        ("node-7.example:443", TcpAddress("node-7.example", 443)),
        ("unix:/run/breakwater.sock", UnixAddress("/run/breakwater.sock")),
    ],
)
def test_an_address_to_listen_on_reads_as_it_is_written(text: str, address: values.Address) -> None:
    """host:port, :port, [v6]:port and unix:/path; printed the same way."""
    assert values.address_of(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "wrong",
    [
        "5000",
        "localhost",
        "::1:5000",
        "a b:1",
        ":65536",
        "unix:run/x",
        "unix:",
        "unix:/" + "x" * 107,
        5000,
        "http://x:1",
    ],
)
def test_what_is_no_address_is_refused(wrong: Any) -> None:
    """Among them a Unix path that is relative, or longer than sun_path."""
    with pytest.raises(ValueError, match=r"address|Unix socket"):
        values.address_of(wrong)


def test_localhost_and_no_host_mean_both_families() -> None:
    """A client that resolves localhost to ::1 first must find us there, too; the first of each must bind."""
    assert TcpAddress("localhost", 1).hosts == ("127.0.0.1", "::1")
    assert TcpAddress("", 1).hosts == ("0.0.0.0", "::")
    assert TcpAddress("10.0.0.1", 1).hosts == ("10.0.0.1",)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://registry-1.docker.io", "https://registry-1.docker.io"),
        ("https://registry-1.docker.io/", "https://registry-1.docker.io"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://example.test/artifactory/api/docker/remote/", "https://example.test/artifactory/api/docker/remote"),
        ("http://[::1]:5000", "http://[::1]:5000"),
    ],
)
def test_a_url_loses_its_closing_slash_only(text: str, url: str) -> None:
    """Requests append /v2/…"""
    assert values.url_of(text) == url


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("https://user:secret@example.test", "credentials"),
        ("https://@example.test", "credentials"),
        ("ftp://example.test", "http://"),
        ("docker.io", "https://"),
        ("https://", "https://"),
        ("https://example.test?x=1", "query"),
        ("https://example.test#top", "fragment"),
        ("https://example.test/v2", "/v2"),
        ("https://example.test/v2/", "/v2"),
        ("https://example.test:99999", "cannot be read"),
        ("https://example.test:0", "https://"),
        ("https://exa mple.test", "https://"),
        ("https://example.test\\@evil.test", "credentials"),
        (443, "expected a URL"),
    ],
)
def test_what_is_no_url_of_a_registry_is_refused(wrong: Any, why: str) -> None:
    """Userinfo would end in logs; a query or fragment cannot be part of a base."""
    with pytest.raises(ValueError, match=why) as caught:
        values.url_of(wrong)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "rule",
    [
        "docker.io/library/**",
        "docker.io/library/alpine:3.*",
        "**:latest",
        "**",
        "quay.io/**",
        "*.example.test/**",
        "registry.test:5000/team/*",
        "registry.test:5000/team/app:v*",
        "**/alpine",
        "docker.io/**",
        "[::1]:5000/a/b",
        "sha256:" + "a" * 64,
        "sha512:" + "0" * 128,
    ],
)
def test_a_rule_is_kept_as_written(rule: str) -> None:
    """A denial quotes the rule, so it must read as its author wrote it."""
    assert values.rule_of(rule) == rule


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        pytest.param("alpine", '"\\*\\*/alpine"', id="a bare name matches nothing"),
        pytest.param("quay.io", '"quay.io/\\*\\*"', id="a bare host matches nothing"),
        pytest.param("docker.io/alpine", "docker.io/library/alpine", id="docker hub's library is part of the name"),
        pytest.param("docker.io/*:latest", "docker.io/library/", id="and so for a pattern"),
        pytest.param("Docker.io/library/x", "lower case", id="capitals"),
        pytest.param("docker.io//x", "lower case", id="an empty element"),
        pytest.param("/library/x", "no source host", id="no host"),
        pytest.param("docker.io/library/x:", "tags", id="an empty tag"),
        pytest.param("docker.io/library/x:a b", "tags", id="a tag with a space"),
        pytest.param("docker.io/library/[ab]", "lower case", id="brackets mean nothing here"),
        pytest.param("docker.io/library/?", "lower case", id="a question mark means nothing here"),
        pytest.param("docker.io/x@sha256:00", "lower case", id="a name with a digest"),
        pytest.param("sha256:123", "digest", id="half a digest"),
        pytest.param("sha256:" + "A" * 64, "digest", id="a digest in capitals"),
        pytest.param("", "no source host", id="nothing"),
        pytest.param(5, "expected a rule", id="a number"),
    ],
)
def test_a_rule_that_could_never_match_is_refused(wrong: Any, why: str) -> None:
    """A rule that somebody relies on and that matches nothing is worse than none."""
    with pytest.raises(ValueError, match=why):
        values.rule_of(wrong)


@pytest.mark.parametrize("wrong", ["docker.io/library/alpine:3", "sha256:" + "a" * 64, "**:latest"])
def test_what_belongs_to_a_project_does_not_depend_on_a_tag(wrong: str) -> None:
    """Kubelets fetch by digest, so `match` sees source host and repository only."""
    with pytest.raises(ValueError, match="cannot depend"):
        values.repository_glob_of(wrong)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("library", "official"),
        ("quay.io", "source host"),
        ("localhost", "source host"),
        ("a/b", "one element"),
        ("Team", "lower-case"),
    ],
)
def test_a_project_path_hides_nothing(wrong: str, why: str) -> None:
    """product.md, Routing: `library` and source hosts are refused as project paths."""
    with pytest.raises(ValueError, match=why):
        values.project_path_of(wrong)


@pytest.mark.parametrize("wrong", ["~/store", "", 5, "a\0b"])
def test_what_is_no_path_is_refused(wrong: Any) -> None:
    """A tilde is the shell's, and would become a folder of that name."""
    with pytest.raises(ValueError, match=r"path|~"):
        values.path_of(wrong)
