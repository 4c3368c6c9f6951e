"""The built site in a real browser: every page in a wide and a narrow window and in dark mode. Skipped where no Chromium is on PATH (Debian: apt-get install chromium).

YUNMIN_SCREENSHOTS=folder keeps a picture of every page that is opened; YUNMIN_WORKSPACE=ws looks at a finished run in place of the fabricated one."""
import os
from pathlib import Path

import fabricated, pytest
from browser import Browser, needed
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.report import phase

pytestmark = needed
PAGES = ["index", "report", "history", "architecture", "tasks", "guide", "phases/01_dedup", "phases/02_format", "phases/03_dem", "phases/04_evaluation", "phases/05_report", "library/01b_minhash", "api/index", "api/core.store"]
IMAGES = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)"
FONT = "document.fonts.check('16px \"Nanum Gothic Web\"', '한글')"
# what sticks out of the window, unless something around it scrolls or cuts
WIDE = """[...document.querySelectorAll('main *')].filter(e => { const r = e.getBoundingClientRect(); if (r.width === 0 || r.right <= innerWidth + 1) return false;
  for (let p = e; p && p.tagName !== 'MAIN'; p = p.parentElement) if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) && p.getBoundingClientRect().right <= innerWidth + 1) return false;
  return true; }).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40)).slice(0, 5)"""
# contrast of text against the nearest background, as WCAG 2 defines it; the least readable ones
PALE = """(() => { const rgb = s => (s.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number), lin = v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4;
  const light = c => .2126*lin(c[0]) + .7152*lin(c[1]) + .0722*lin(c[2]), out = [];
  for (const e of document.querySelectorAll('main p, main li, main td, main th, main h1, main h2, main h3, main code, #quarto-sidebar a')) {
    if (!e.textContent.trim() || !e.getBoundingClientRect().width) continue;
    let p = e, back = null; while (p) { const c = rgb(getComputedStyle(p).backgroundColor); if (c.length < 4 || c[3] > .5) { back = c; break; } p = p.parentElement; }
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(back || [255, 255, 255])].sort((x, y) => y - x), ratio = (a + .05)/(b + .05);
    if (ratio < 3) out.push(e.tagName + ' ' + ratio.toFixed(1) + ' ' + e.textContent.trim().slice(0, 40)); }
  return out.slice(0, 5); })()"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if ws := os.environ.get("YUNMIN_WORKSPACE"): return Path(ws)/"reports/site"
    ws = tmp_path_factory.mktemp("browser")/"ws"
    fabricated.workspace(open_store(str(ws)), parts=("dedup", "format", "dem", "evaluation", "ledger", "figures", "notebooks", "extras"))
    phase.run(str(ws), overrides=["report.renderer=smalldocs"])
    return ws/"reports/site"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("chromium"))
    try: yield found
    finally: found.close()


def keep(browser, name, mode):
    if folder := os.environ.get("YUNMIN_SCREENSHOTS"): browser.screenshot(Path(folder)/f"{name.replace('/', '_')}_{mode}.png", whole=True)


@pytest.mark.parametrize("name", PAGES)
def test_wide(site, browser, name):
    "Pictures are there, Korean has its font, scripts do not fail, nothing sticks out."
    browser.open((site/f"{name}.html").as_uri())
    keep(browser, name, "wide")
    assert browser.run(IMAGES) == [] and browser.run(FONT) is True and browser.run(WIDE) == []
    assert browser.problems() == [], "scripts that failed, or something asked of the network"


@pytest.mark.parametrize("name", PAGES)
def test_narrow(site, browser, name):
    "On a phone nothing is wider than the window, but for what scrolls inside itself."
    browser.open((site/f"{name}.html").as_uri(), width=390, height=844)
    keep(browser, name, "narrow")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth + 1") and browser.run(WIDE) == []


@pytest.mark.parametrize("name", ["index", "report", "tasks", "phases/03_dem", "api/core.store"])
def test_dark(site, browser, name):
    "Dark where the reader's system is dark; text keeps its contrast, pictures their white ground."
    browser.open((site/f"{name}.html").as_uri(), dark=True)
    keep(browser, name, "dark")
    assert browser.run("document.documentElement.classList.contains('quarto-dark')")
    assert browser.run(PALE) == []
    assert browser.run("[...document.querySelectorAll('main img, main svg')].every(i => getComputedStyle(i).backgroundColor === 'rgb(255, 255, 255)')")


def test_light_text_is_readable_too(site, browser): assert browser.open((site/"report.html").as_uri()).run(PALE) == []


def test_search_finds_a_page(site, browser):
    "The search box, with the index that the site carries, over http as `yunmin report --serve` shows it."
    import functools, http.server, threading
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_port}/index.html")
        browser.run("(() => { const i = document.querySelector('input[type=search], #quarto-search input, .sd-search input'); i.focus(); i.value = 'signatures'; i.dispatchEvent(new Event('input', {bubbles: true})); })()")
        browser._until(lambda: browser.run("[...document.querySelectorAll('a')].some(a => a.offsetParent && /minhash/.test(a.href) && a.closest('[class*=search], [id*=search]'))"), 20)
    finally: server.shutdown(); server.server_close()


def test_print_leaves_the_menus_out(site, browser):
    browser.open((site/"report.html").as_uri())
    browser.send("Emulation.setEmulatedMedia", media="print")
    try: assert browser.run("getComputedStyle(document.querySelector('#quarto-sidebar')).display") == "none"
    finally: browser.send("Emulation.setEmulatedMedia", media="")
