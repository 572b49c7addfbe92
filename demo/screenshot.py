"""
Takes the README's figure of the demo, demo/screenshot.png, with Chromium and its driver (`pip install selenium`):

    python demo/screenshot.py --model_name_or_path out/can-quickstart
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


HERE = Path(__file__).resolve().parent


@contextlib.contextmanager
def running_app(model_name_or_path: str) -> Iterator[str]:
    """Starts the app as a process of its own on a free port; yields its address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "app.py"), "--model_name_or_path", model_name_or_path]
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the app did not start (exit status {process.poll()})")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)  # as Ctrl-C, upon which it tidies up
        process.wait(timeout=30)


@contextlib.contextmanager
def chromium(width: int, height: int) -> Iterator[webdriver.Chrome]:
    """A browser without a window, whose pages are of that size, that finds no host but 127.0.0.1."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars",
                     "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield browser
    finally:
        browser.quit()


def wait_for_images(browser: webdriver.Chrome):
    """Until every image on the page is there."""
    loaded = "return [...document.querySelectorAll('.image-shown img')].filter(x => x.naturalWidth).length"
    num = len(browser.find_elements(By.CSS_SELECTOR, ".image-shown"))
    WebDriverWait(browser, 60).until(lambda browser: num and browser.execute_script(loaded) == num)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="out/can-quickstart")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--output", default=str(HERE / "screenshot.png"))
    args = parser.parse_args()
    with running_app(args.model_name_or_path) as address, chromium(args.width, args.height) as browser:
        browser.get(address)
        WebDriverWait(browser, 60).until(lambda browser: browser.find_elements(By.CSS_SELECTOR, ".image-shown"))
        wait_for_images(browser)
        time.sleep(1)  # for the last of the page to find its place
        browser.save_screenshot(args.output)


if __name__ == "__main__":
    main()
