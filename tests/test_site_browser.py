"""The built site in a real browser: figures load and Korean is there. Skipped where no Chromium is on PATH (Debian: apt-get install chromium)."""
import re, shutil, subprocess

import fabricated, pytest
from yunmin_efficientdata.core.store import open_store
from yunmin_efficientdata.report import phase

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
# written into a copy of the page: the dumped DOM then tells whether each picture really has pixels, and whether the Korean font was loaded
PROBE = """<script>addEventListener('load', () => document.fonts.ready.then(() => {
  const images = [...document.images].map(i => i.naturalWidth > 0 ? 1 : 0);
  document.body.dataset.probe = images.length + '/' + images.reduce((a, b) => a + b, 0) + '/' + document.fonts.check('16px "Nanum Gothic Web"', '한글'); }))</script>"""


def browse(tmp_path, page, *more):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path/'profile'}", "--window-size=1300,2200", "--virtual-time-budget=5000"]
    return subprocess.run([CHROMIUM, *flags, *more, page.as_uri()], capture_output=True, timeout=120).stdout.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    ws = tmp_path_factory.mktemp("browser")/"ws"
    fabricated.workspace(open_store(str(ws)))
    phase.run(str(ws), overrides=["report.renderer=smalldocs"])
    return ws/"reports/site"


@pytest.mark.parametrize("name, pictures", [("report", 8), ("index", 2)])
def test_pictures_and_korean(site, tmp_path, name, pictures):
    page = site/f"{name}_probe.html"
    page.write_text((site/f"{name}.html").read_text(encoding="utf-8").replace("</head>", PROBE + "</head>", 1), encoding="utf-8")
    try: dom = browse(tmp_path, page, "--dump-dom")
    finally: page.unlink()
    asked, loaded, font = re.search(r'data-probe="(\d+)/(\d+)/(\w+)"', dom).groups()
    assert asked == loaded and int(asked) >= pictures and font == "true"
    assert "기대치" in dom and "충족" in dom


def test_screenshot_is_not_blank(site, tmp_path):
    from PIL import Image
    browse(tmp_path, site/"index.html", f"--screenshot={tmp_path/'home.png'}")
    with Image.open(tmp_path/"home.png") as image:
        assert image.size == (1300, 2200) and len(image.convert("L").histogram()) == 256 and sum(image.convert("L").histogram()[:200]) > 20_000
