"""The dashboard in a real headless Chromium: what people see, press and hear of it."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.interop.conftest import upstreams_at
from tests.support import ports
from tests.support.browser import ENTER, TAB, Browser
from tests.support.crowd import Visit, visit_all
from tests.support.images import KIB, MIB, Image, artifact, image, multi_arch
from tests.support.images import index as referring_index
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually
from tests.support.relay import Relay

_SEED = count(191_000)
#: Where screenshots go, to be looked at; DASHBOARD_SHOTS=folder keeps them.
SHOTS = os.environ.get("DASHBOARD_SHOTS", "")
PROJECTS = {
    "platform": {"match": ["docker.io/library/**"], "deny": ["**:latest"], "quota": "64MiB"},
    "data": {"match": ["docker.io/data/**"], "quota": "8MiB", "on_full": "bypass"},
}
PAGES = {
    "overview": "/",
    "search": "/images?search=alpine",
    "nothing found": "/images?search=absent",
    "image": "/image?reference=docker.io/library/alpine:3.20",
    "purge": "/purge?what=docker.io/library/alpine:3.20",
    "prefetch": "/prefetch",
    "failure": "/image?reference=absent:1",
}


class Seen:
    """A Breakwater with a day's work behind it, and a browser."""

    def __init__(self, breakwater: Breakwater, browser: Browser, origin: Origin, alpine: Image) -> None:
        self.breakwater, self.browser, self.origin, self.alpine = breakwater, browser, origin, alpine

    def go(self, path: str) -> None:
        """Open a page of the dashboard."""
        self.browser.open(f"http://127.0.0.1:{self.breakwater.admin_port}{path}")

    @property
    def token(self) -> str:
        """As an operator finds it."""
        return (self.breakwater.store / "breakwater" / "admin-token").read_text().strip()

    def shoot(self, name: str, folder: Path) -> None:
        """Take a picture."""
        kept = Path(SHOTS) if SHOTS else folder
        kept.mkdir(parents=True, exist_ok=True)
        self.browser.screenshot(kept / f"{name.replace(' ', '-')}.png")


@pytest.fixture(scope="module")
def seen(scratch: Path, origin: Origin) -> Iterator[Seen]:
    """One for all tests of this file: they look at it and leave it much as it was."""
    settings = upstreams_at(origin.url)
    settings["projects"] = PROJECTS
    with Breakwater(scratch / "breakwater", settings) as running, Browser(scratch / "browser") as browser:
        alpine = _a_days_work(running, origin)
        yield Seen(running, browser, origin, alpine)
        running.assert_log_is_clean()


def _a_days_work(running: Breakwater, origin: Origin) -> Image:
    alpine = origin.push("library/alpine", "3.20", multi_arch(next(_SEED), (200 * KIB, 900 * KIB)))
    sbom = origin.push("library/alpine", None, artifact(alpine, "application/spdx+json", b"what is in it"))
    origin.push("library/alpine", alpine.digest.replace(":", "-"), referring_index([sbom]))
    amd = alpine.children[0]
    ask = [f"/v2/library/alpine/manifests/{target}" for target in ("3.20", amd.digest, sbom.digest)]
    ask += [f"/v2/library/alpine/blobs/{blob.digest}" for blob in amd.all_blobs()[:2]]
    ask += ["/v2/library/alpine/manifests/latest", "/v2/library/nginx/manifests/latest"]
    for n, name in enumerate(("library/nginx", "library/postgres", "data/warehouse", "team/payments")):
        one = origin.push(name, f"1.2{n}", image(next(_SEED), (400 * KIB, 2 * MIB)))
        ask += [f"/v2/{name}/manifests/1.2{n}", *(f"/v2/{name}/blobs/{blob.digest}" for blob in one.all_blobs())]
    for n in range(1, 8):
        visit_all(running.port, [Visit(path) for path in ask[: max(5, len(ask) - 3 * n)]])
    visit_all(running.port, [Visit(path) for path in ask])
    return alpine


@pytest.fixture(autouse=True)
def _the_console_is_silent(seen: Seen, request: pytest.FixtureRequest) -> Iterator[None]:
    """No script error, no blocked content, nothing asked of anybody else: in every test of this file."""
    seen.browser.look()
    seen.browser.console()
    yield
    said = [line for line in seen.browser.console() if not _is_expected(line)]
    assert said == []


def _is_expected(line: str) -> bool:
    """Chromium reports the status of a page that says why something was not done."""
    return "Failed to load resource" in line and any(f"status of {code}" in line for code in (400, 401, 404))


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_the_overview_shows_what_the_status_says(seen: Seen, tmp_path: Path) -> None:
    """Issue 7: hit ratio and bytes, transfers, upstreams, projects against quotas, busiest repositories, denials."""
    seen.go("/")
    assert seen.browser.title == "Overview · Breakwater"
    status = seen.breakwater.status()
    requests = status["requests"]
    had = sum(requests[outcome] for outcome in ("hit", "coalesced", "stale"))
    assert f"{100 * had / (had + requests['miss']):.1f} %" in seen.browser.text("#summary")
    assert "docker.io\nok" in seen.browser.text("#upstreams").replace(" ", "\n")
    assert "of 64.0 MiB" in seen.browser.text("#projects") and "bypass" in seen.browser.text("#projects")
    assert seen.browser.texts("#repositories tbody th")[0] == "docker.io/library/alpine"
    assert "**:latest" in seen.browser.text("#denials")
    assert "library/alpine:latest is refused by rule" in seen.browser.text("#denials")
    seen.shoot("overview", tmp_path)


def test_a_running_transfer_shows_its_progress_without_anybody_reloading(
    seen: Seen, scratch: Path, tmp_path: Path
) -> None:
    """Live: it appears while it runs, moves, and goes when it is done."""
    name = f"library/slow-{next(_SEED)}"
    slow = seen.origin.push(name, "1", image(next(_SEED), (3 * MIB,)))
    layer = slow.all_blobs()[-1]
    with Relay(seen.origin.port, hold_back=MIB, holds=lambda target: layer.digest in target) as relay:
        settings = {**upstreams_at(relay.url), "projects": PROJECTS}
        with Breakwater(scratch / "slow", settings) as running:
            _a_days_work(running, seen.origin)
            seen.browser.open(f"http://127.0.0.1:{running.admin_port}/")
            assert "Nothing is being fetched" in seen.browser.text("#transfers")
            visit_all(running.port, [Visit(f"/v2/{name}/manifests/1")])
            reader = threading.Thread(target=_read, args=(running.port, f"/v2/{name}/blobs/{layer.digest}"))
            reader.start()
            try:
                seen.browser.sees(name, "#transfers")
                eventually(lambda: _part(seen.browser) > 0.3, "bytes of it")
                seen.browser.look(1280, 1240)
                seen.shoot("transfer", tmp_path)
            finally:
                relay.release()
                reader.join(30)
            seen.browser.sees("Nothing is being fetched", "#transfers")
            seen.browser.open("about:blank")


def _read(port: int, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    connection.getresponse().read()
    connection.close()


def _part(browser: Browser) -> float:
    found = browser.run("const p = document.querySelector('#transfers progress'); return p ? p.value / p.max : 0")
    return float(found)


def test_each_address_of_an_upstream_is_shown_with_its_state(seen: Seen, scratch: Path, tmp_path: Path) -> None:
    """Issue 7, "upstreams": of several addresses one may be left alone while another is asked, and that is seen."""
    dead = f"http://127.0.0.1:{ports.take()}"
    settings = upstreams_at(seen.origin.url)
    settings["upstreams"]["docker.io"] = {"url": [dead, seen.origin.url]}
    with Breakwater(scratch / "addresses", settings) as running:
        for n in range(6):
            visit_all(running.port, [Visit(f"/v2/library/absent{n}/manifests/1")])
        seen.browser.open(f"http://127.0.0.1:{running.admin_port}/")
        assert seen.browser.texts("#upstreams tr.part th") == [dead, seen.origin.url]
        first, second = seen.browser.texts("#upstreams tr.part td[colspan]")
        assert first.startswith(("left alone", "on trial")) and second == "asked"
        assert seen.browser.run(_CHECKS) == []
        seen.shoot("addresses", tmp_path)
        seen.browser.open("about:blank")


def test_updates_can_be_paused(seen: Seen) -> None:
    """WCAG 2.2.2: what moves by itself can be stopped, by keyboard too, and a screen reader is told."""
    seen.go("/")
    seen.browser.run("document.querySelector('[data-pause]').focus()")
    seen.browser.press(ENTER)
    assert seen.browser.run("return document.querySelector('[data-pause]').getAttribute('aria-pressed')") == "true"
    assert seen.browser.text("[data-updates-state]") == "Updates are paused"
    name = f"team/paused-{next(_SEED)}"
    seen.origin.push(name, "1", image(next(_SEED), (4 * KIB,)))
    for _ in range(200):
        visit_all(seen.breakwater.port, [Visit(f"/v2/{name}/manifests/1")])
    shown = seen.browser.text("#repositories")
    seen.browser.click("[data-pause]")
    seen.browser.sees(name, "#repositories")
    assert name not in shown


def test_an_image_is_searched_and_looked_at(seen: Seen, tmp_path: Path) -> None:
    """Issue 7: search for an image and see what is cached of it: platforms, layers, size, tags, referrers, last pull."""
    seen.go("/")
    seen.browser.type("#search", "alpine 3.20" + ENTER)
    seen.browser.sees("Cached images for “alpine 3.20”")
    seen.browser.click("tbody th a")
    seen.browser.sees("docker.io/library/alpine:3.20", "h1")
    text = seen.browser.text()
    assert seen.alpine.digest in text
    assert "linux/amd64" in text and "in part" in text and "linux/arm64" in text and "not fetched" in text
    assert "application/spdx+json" in text and "Last pull" in text
    seen.browser.run("document.querySelector('details').open = true")
    assert seen.browser.texts("details[open] td .state") == ["yes", "yes", "no"]
    seen.shoot("image-open", tmp_path)


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_scripts", [True, False], ids=["with scripts", "without scripts"])
def test_purge_shows_what_would_go_and_asks_for_the_token(seen: Seen, with_scripts: bool, tmp_path: Path) -> None:
    """A wrong token does nothing and says where the right one is; the right one purges. Pages need no script for it."""
    name = f"library/purged-{next(_SEED)}"
    one = seen.origin.push(name, "1", image(next(_SEED), (40 * KIB,)))
    paths = [f"/v2/{name}/manifests/1", *(f"/v2/{name}/blobs/{blob.digest}" for blob in one.all_blobs())]
    visit_all(seen.breakwater.port, [Visit(path) for path in paths])
    seen.browser.scripts(with_scripts)
    try:
        seen.go(f"/image?reference={quote(f'docker.io/{name}:1')}")
        seen.browser.click("a.danger")
        seen.browser.sees(f"Purge docker.io/{name}:1?", "h1")
        seen.browser.empty("#token")
        seen.browser.type("#token", "wrong" * 8)
        seen.browser.click("button.danger")
        seen.browser.sees("needs the token in")
        assert seen.breakwater.admin(f"/api/v1/image?reference=docker.io/{name}:1")["found"]
        seen.browser.empty("#token")
        seen.browser.type("#token", seen.token)
        seen.browser.click("button.danger")
        seen.browser.sees(f"Purged docker.io/{name}:1", "h1")
        seen.shoot("purged", tmp_path)
        visit = Visit(f"/api/v1/image?reference=docker.io/{name}:1")
        visit_all(seen.breakwater.admin_port, [visit])
        assert visit.status == 404
    finally:
        seen.browser.scripts(True)
        seen.browser.open("about:blank")


def test_prefetch_is_ordered_and_its_progress_is_shown(seen: Seen, tmp_path: Path) -> None:
    """It runs behind the page; what was not understood is said, and what was written stays written."""
    name = f"library/prefetched-{next(_SEED)}"
    seen.origin.push(name, "1", multi_arch(next(_SEED), (40 * KIB, 300 * KIB)))
    seen.go("/prefetch")
    seen.browser.empty("#token")
    seen.browser.type("#references", f"docker.io/{name}:1\nNOT/an:image:at:all")
    seen.browser.type("#token", seen.token)
    seen.browser.click("#pin")
    seen.browser.click("button.primary")
    seen.browser.sees("Line 2:")
    seen.browser.run("const r = document.getElementById('references'); r.value = r.value.split('\\n')[0]")
    assert seen.browser.run("return document.getElementById('token').value") == seen.token
    seen.browser.click("button.primary")
    seen.browser.sees(f"docker.io/{name}:1", "#orders")
    seen.browser.sees("done", "#orders")
    seen.shoot("prefetched", tmp_path)
    (image_seen,) = seen.breakwater.admin(f"/api/v1/image?reference=docker.io/{name}:1")["found"]
    assert all(platform["cached"] for platform in image_seen["platforms"])
    pins = seen.breakwater.status()["pins"]
    assert pins["references"] == 1
    seen.go("/")
    assert f"{pins['bytes'] / KIB:.0f} KiB pinned by 1 reference" in seen.browser.text("#summary")


# -- for everybody -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_every_page_can_be_read_and_used_by_everybody(seen: Seen, page: str, scheme: Any, tmp_path: Path) -> None:
    """What a checker of accessibility looks at: language, title, one h1, headings in order, names of everything that
    can be used, table heads, unique ids, contrast; and no page is wider than a phone."""
    seen.browser.look(scheme=scheme)
    seen.go(PAGES[page])
    seen.shoot(f"{page}-{scheme}", tmp_path)
    assert seen.browser.run(_CHECKS) == []
    assert seen.browser.run(_CONTRAST) == []
    seen.browser.look(360, 740, scheme=scheme)
    assert seen.browser.run("return document.documentElement.scrollWidth") <= 360
    seen.shoot(f"{page}-{scheme}-phone", tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_the_focus_goes_through_a_page_in_the_order_of_reading(seen: Seen, page: str) -> None:
    """By keyboard alone: the first stop skips to the content, every stop is visible, none is left out or a trap."""
    seen.go(PAGES[page])
    expected = seen.browser.run(_STOPS)
    met = []
    for _ in range(len(expected)):
        seen.browser.press(TAB)
        met.append(seen.browser.run(_STOP))
    assert [name for name, _ in met] == expected
    assert met[0][0] == "Skip to content"
    assert all(is_shown for _, is_shown in met), met


def test_skipping_goes_to_the_content(seen: Seen) -> None:
    """The link is seen when it has the focus, and leads past the navigation."""
    seen.go("/")
    seen.browser.press(TAB)
    seen.browser.press(ENTER)
    assert seen.browser.run("return document.activeElement.id") == "main"


def test_nothing_in_a_page_comes_from_what_a_client_sent(seen: Seen) -> None:
    """A path, a search or a reference full of markup is shown as the text it is; the policy allows no inline script."""
    evil = "<img src=x onerror=alert(1)>'\""
    visit_all(seen.breakwater.port, [Visit(f"/v2/library/nginx/manifests/latest?x={quote(evil)}")])
    for path in ("/", f"/images?search={quote(evil)}", f"/image?reference={quote(evil)}", f"/purge?what={quote(evil)}"):
        seen.go(path)
        assert seen.browser.run("return document.querySelectorAll('main img, main script').length") == 0
    connection = http.client.HTTPConnection("127.0.0.1", seen.breakwater.admin_port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    policy = answer.getheader("Content-Security-Policy") or ""
    body = answer.read().decode()
    connection.close()
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert " style=" not in body and "<script>" not in body and " on" + "click" not in body
    assert "http://" not in body and "https://" not in body, "a page asks nobody but us"


_CHECKS = """
const found = [];
const say = (words, e) => found.push(words + (e ? ': ' + e.outerHTML.slice(0, 120) : ''));
const visible = e => e.getClientRects().length > 0;
if (!document.documentElement.lang) say('no language');
if (!document.title) say('no title');
if (document.querySelectorAll('h1').length !== 1) say('not one h1');
if (document.querySelectorAll('main').length !== 1) say('not one main');
let level = 0;
for (const h of document.querySelectorAll('h1, h2, h3, h4')) {
  const its = Number(h.tagName[1]);
  if (its > level + 1) say('a heading is left out', h);
  level = its;
}
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
ids.filter((id, n) => ids.indexOf(id) !== n).forEach(id => say('twice: #' + id));
for (const e of document.querySelectorAll('input:not([type=hidden]), textarea, select')) {
  if (!e.labels.length) say('no label', e);
}
for (const e of document.querySelectorAll('a, button, summary')) {
  if (!e.textContent.trim()) say('no name', e);
}
for (const e of document.querySelectorAll('progress, nav')) {
  if (!e.getAttribute('aria-label')) say('no name', e);
}
for (const e of document.querySelectorAll('[aria-labelledby], [aria-describedby]')) {
  for (const id of (`${e.getAttribute('aria-labelledby')} ${e.getAttribute('aria-describedby')}`).split(' ')) {
    if (id !== 'null' && !document.getElementById(id)) say('refers to nothing', e);
  }
}
const width = row => [...row.cells].reduce((n, cell) => n + cell.colSpan, 0);
for (const t of document.querySelectorAll('table')) {
  if (!t.querySelector('thead th[scope=col]')) say('no column heads', t);
  for (const row of t.querySelectorAll('tr')) {
    if (width(row) !== width(t.rows[0])) say('a row of another width', row);
  }
}
for (const e of document.querySelectorAll('button, .button, input:not([type=hidden]), select, nav a')) {
  const box = e.getBoundingClientRect();
  if (visible(e) && e.type !== 'checkbox' && (box.width < 24 || box.height < 24)) say('too small to hit', e);
}
return found;
"""

# WCAG 2.1, relative luminance and contrast ratio: 4.5 for text, 3 for text of 24 px or bold of 19 px.
_CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const parse = c => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
  const d = canvas.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255];
};
const lum = c => {
  const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = e => {
  for (let n = e; n; n = n.parentElement) {
    const c = parse(getComputedStyle(n).backgroundColor);
    if (c[3] === 1) return c;
  }
  return [255, 255, 255, 1];
};
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const a = lum(parse(style.color)), b = lum(ground(e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
  const wanted = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
  if (ratio < wanted) found.push(ratio.toFixed(2) + ' ' + e.outerHTML.slice(0, 100));
}
return found;
"""

#: What can have the focus, in the order of the document, by its words.
_STOPS = """
return [...document.querySelectorAll('a[href], button, input:not([type=hidden]), textarea, select, summary')]
  .filter(e => e.checkVisibility() || e.className === 'skip')
  .map(e => (e.labels && e.labels[0] || e).textContent.trim());
"""
_STOP = """
const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
const shown = box.width > 0 && box.bottom > 0 && style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
return [(e.labels && e.labels[0] || e).textContent.trim(), shown];
"""
