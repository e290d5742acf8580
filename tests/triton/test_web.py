"""The web page in headless Chromium, over a real server. Needs Debian's chromium and chromium-driver."""

from __future__ import annotations

import base64
import io
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.triton.web.serve import web_server
from nova_export import Pipeline
from tests.triton.server import PATIENCE, Server, wait_until

pytestmark = pytest.mark.triton

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1000,900"
)


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with web_server(server.url, port=0) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield running
    running.quit()


def fill(browser: Any, **values: str) -> None:
    for name, value in values.items():
        field = browser.find_element("name", name)
        field.clear()
        field.send_keys(value)


def wait_for(browser: Any, state: str) -> str:
    """What the page says once it is in that state."""
    from selenium.webdriver.support.ui import WebDriverWait

    stage = browser.find_element("id", "stage")
    WebDriverWait(browser, PATIENCE).until(lambda _: stage.get_attribute("data-state") == state)
    return str(browser.find_element("id", "status").text)


def test_a_person_sees_the_frames_of_the_prompt(
    address: str, browser: Any, pipe: Pipeline, tmp_path: Path
) -> None:
    browser.get(address)
    fill(browser, prompt="a blue square growing", seed="7", max_latent_length="2")
    fill(browser, num_inference_steps="8", num_diffusion_steps="5")
    browser.find_element("id", "start").click()
    assert wait_for(browser, "done") == "5 frames, seed 7"
    images = [each.get_attribute("src") for each in browser.find_elements("css selector", "#strip img")]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2])))) for src in images]
    steps = {"num_inference_steps": 8, "num_diffusion_steps": 5}
    expected = pipe("a blue square growing", seed=7, max_latent_length=2, **steps).frames[0]
    np.testing.assert_array_equal(np.stack(shown), expected)
    canvas = browser.execute_script(
        "return [canvas.width, canvas.height, pen.getImageData(0, 0, 1, 1).data[3]]"
    )
    assert canvas == [64, 64, 255]  # something was drawn
    assert browser.get_log("browser") == []


def test_stopping_stops_the_server(address: str, browser: Any, server: Server) -> None:
    cancelled = 'nova_requests{model="nova",result="cancelled"}'
    before = server.settled_metrics().get(cancelled, 0)
    browser.get(address)
    fill(browser, prompt="x", max_latent_length="13", num_diffusion_steps="200")
    browser.find_element("id", "start").click()
    wait_for(browser, "working")
    browser.find_element("id", "stop").click()
    assert wait_for(browser, "done").startswith("Stopped")
    wait_until(lambda: server.metrics().get(cancelled, 0) == before + 1)


def test_what_the_server_refuses_is_shown(address: str, browser: Any) -> None:
    browser.get(address)
    fill(browser, prompt="x", max_latent_length="99")
    browser.find_element("id", "start").click()
    assert "this server makes at most 13" in wait_for(browser, "failed")


def test_pages_from_elsewhere_are_refused(address: str) -> None:
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example:80"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=5)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(address + "/../serve.py", timeout=5)
