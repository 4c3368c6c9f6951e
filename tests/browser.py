"""Chromium over its devtools protocol: pages in any width, light or dark, questions to the page, screenshots. No driver beyond a websocket."""
import base64, json, shutil, subprocess, time, urllib.request
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needed = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*"]


class Browser:
    "One headless Chromium with one page."
    def __init__(self, folder):
        from websocket import create_connection
        profile, self.count, self.logged = Path(folder)/"profile", 0, []
        self.process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.port = self._until(lambda: (profile/"DevToolsActivePort").read_text().split("\n")[0], 60)
        pages = self._until(lambda: [t for t in json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json", timeout=10)) if t["type"] == "page"], 60)
        self.socket = create_connection(pages[0]["webSocketDebuggerUrl"], timeout=120)
        for domain in ("Page", "Runtime", "Network", "Log"): self.send(f"{domain}.enable")
    def _until(self, ask, seconds, every=.1):
        end = time.time() + seconds
        while True:
            try:
                if found := ask(): return found
            except (OSError, ValueError): pass
            assert time.time() < end, "the browser did not answer in time"
            time.sleep(every)
    def send(self, method, **params):
        "One command; events that come meanwhile are kept in `logged`."
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.logged.append(answer)
    def run(self, script):
        "The value of a JavaScript expression in the page; promises are awaited."
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")
    def open(self, url, width=1300, height=1000, dark=False, until="document.readyState === 'complete'", seconds=60):
        "Load a page; waits until an expression is true in it, and for its fonts."
        self.logged.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.send("Page.navigate", url=str(url))
        self._until(lambda: self.run(f"location.href !== 'about:blank' && Boolean({until})"), seconds)
        self.run("document.fonts.ready.then(() => new Promise(r => setTimeout(() => r(1), 150)))")
        return self
    def problems(self):
        "Scripts that failed and files that could not be loaded since the page was opened."
        bad = [e["params"]["exceptionDetails"]["text"] for e in self.logged if e.get("method") == "Runtime.exceptionThrown"]
        return bad + [e["params"]["errorText"] for e in self.logged if e.get("method") == "Network.loadingFailed" and not e["params"].get("canceled")]
    def screenshot(self, path, whole=False, most=12000):
        "A PNG of the window, or of the whole page."
        clip = {}
        if whole:
            width, height = self.run("[innerWidth, Math.max(document.body.scrollHeight, document.documentElement.scrollHeight)]")
            clip = {"clip": {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}, "captureBeyondViewport": True}
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **clip)["data"]))
        return path
    def close(self):
        try: self.send("Browser.close")
        except Exception: self.process.terminate()
        self.socket.close()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
