"""A real headless browser for pages on disk: Debian's chromium and chromedriver, driven by selenium.

python tests/support/browser.py PAGE FOLDER takes screenshots: light, dark, on a phone.
"""

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PHONE_WIDTH = 390
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
"""Without them chromium itself asks its makers' hosts for updates."""
PATIENCE_S = 120


def find_reason() -> str | None:
    """Why no browser can be driven here; None if one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    missing = [] if find_chromium() else ["chromium"]
    missing += [] if shutil.which("chromedriver") else ["chromedriver"]
    return f"no {' and '.join(missing)} on the PATH (apt-get install chromium-driver)" if missing else None


def find_chromium() -> str | None:
    """The path of a browser that chromedriver drives, or None."""
    paths = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in paths if path), None)


class Browser:
    """An open browser: a page, what it logged, what it asked for."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page: Path, width: int = 1200, dark: bool = False) -> None:
        """Open a page from disk at a width in CSS pixels, and wait until its charts are drawn."""
        from selenium.webdriver.support.ui import WebDriverWait

        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 640}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(page.resolve().as_uri())
        WebDriverWait(self.driver, PATIENCE_S).until(
            lambda driver: driver.execute_script("return document.documentElement.dataset.drawn")
        )

    def run(self, script: str, *arguments):
        """What a piece of JavaScript returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list:
        """The elements that a CSS selector names."""
        return self.driver.find_elements("css selector", selector)

    def console(self) -> list[str]:
        """The lines of the console since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that the page asked for since it was opened, without data: and blob:."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def hover(self, element, x: int = 0, y: int = 0) -> None:
        """Move the mouse to a place relative to the middle of an element."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element_with_offset(element, x, y).perform()

    def shoot(self, path: Path) -> None:
        """Write a screenshot of the whole page."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png", "clip": clip}
        )
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser with a profile of its own, closed when the block ends."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = find_chromium()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield Browser(driver)
        finally:
            driver.quit()


if __name__ == "__main__":
    with open_browser() as browser:
        for name, width in {"light": 1200, "dark": 1200, "phone": PHONE_WIDTH}.items():
            browser.open(Path(sys.argv[1]), width, name == "dark")
            browser.shoot(Path(sys.argv[2]) / f"{name}.png")
            print(name, browser.console(), browser.requests(), browser.run("return innerWidth"))
