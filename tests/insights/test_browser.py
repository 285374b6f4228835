"""The page in a real browser: what is chosen there, and what is seen. Needs Captum 0.8, chromium.

With SCREENSHOTS=folder, images of the page are written there.
"""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.browser import chromium
from PIL import Image

from captum_generic_attn import GenericAttention, demo

pytestmark = [pytest.mark.slow, pytest.mark.ci_sample]


class Dashboard:
    """`python -m captum_generic_attn.insights` in a process of its own."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "captum_generic_attn.insights", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.fullmatch(r"Captum Insights: (http://127\.0\.0\.1:\d+) .*\n", line)
        assert found, line + self.process.stderr.read()
        self.address = found[1]

    def interrupt(self):
        """Ctrl-C: exit code, and what was said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@pytest.fixture
def dashboard(insights_config):
    started = []

    def start(*arguments):
        started.append(Dashboard(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


@pytest.fixture(scope="module")
def browser(insights_config):
    arguments = "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1300,1700"
    with chromium(*arguments) as driver:
        yield driver


class Page:
    """Captum Insights as one uses it."""

    def __init__(self, driver, address):
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.wait = WebDriverWait(driver, 30, ignored_exceptions=_gone()).until
        driver.get(address)
        self.wait(lambda _: self.methods)

    def all(self, selector, within=None):
        return (within or self.driver).find_elements("css selector", selector)

    def named(self, name):
        (field,) = self.all(f"[name={name}]")
        return field

    @property
    def methods(self):
        return [option.text for option in self.all("select[name=selected_method] option")]

    @property
    def method(self):
        return self.named("selected_method").get_property("value")

    def choose(self, name, value):
        from selenium.webdriver.support.ui import Select

        Select(self.named(name)).select_by_visible_text(value)

    def fetch(self):
        before = self.images()
        self.button("Fetch").click()
        self.wait(lambda _: len(self.images()) == 4 and self.images() != before)

    def explain(self, label):
        """Click one of the scores of the first example."""
        before = self.images()[0]
        self.button(f"{label} (", self.panel).click()
        self.wait(lambda _: self.images()[0] != before)

    def button(self, start, within=None):
        (found,) = [b for b in self.all("button", within) if b.text.startswith(start)]
        return found

    @property
    def panels(self):
        return self.all("[class^=App_panel___]")

    @property
    def panel(self):
        return self.panels[0]

    def scores(self):
        """Of the first example."""
        texts = [button.text for button in self.all("button", self.panel)]
        found = [re.fullmatch(r"(.*) \((\d\.\d{3})\)", text) for text in texts]
        return {match[1]: float(match[2]) for match in found if match}

    def images(self):
        """The attributions, base64."""
        return [image.get_attribute("src") for image in self.all("img[alt=attribution]")]

    def words(self):
        """Words of the first example, and how their ground is coloured."""
        spans = self.all("[class*=text-feature-word]", self.panel)
        return [(s.text, s.value_of_css_property("background-color")) for s in spans]

    def bars(self):
        """Contributions to the first example, as heights of bars; 10 is added to those below."""
        names = self.all("[class*=bar-chart__group__title]", self.panel)
        bars = self.all("[class*=bar-chart__group__bar]", self.panel)
        return {
            name.text: float(bar.value_of_css_property("height").removesuffix("px"))
            for name, bar in zip(names, bars, strict=True)
        }

    def screenshot(self, name, panels):
        """With SCREENSHOTS=folder: the page down to the end of so many examples."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            from selenium.webdriver.common.action_chains import ActionChains

            ActionChains(self.driver).move_to_element(self.named("prediction")).perform()
            time.sleep(1)  # colours fade where the mouse was
            shot = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
            last = self.panels[panels - 1].rect
            below = int(last["y"] + last["height"]) + 16
            shot.crop((0, 0, shot.width, below)).save(Path(folder) / name, optimize=True)


def _gone():
    from selenium.common.exceptions import StaleElementReferenceException

    return [StaleElementReferenceException]  # the page was drawn anew meanwhile


def pixels_of(source):
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def drawn(attributions, pixels):
    """As Insights draws them."""
    from captum.insights.attr_vis.features import ImageFeature

    output = ImageFeature("canvas", None, None).visualize(attributions, pixels * 0, 1.0)
    return pixels_of(output.modified)


def example(index):
    return demo.preprocess(demo.canvases()[index].image())[None]


def assert_shows(source, attributions, pixels):
    seen = pixels_of(source)
    assert seen.std() > 5  # levels of 255: not blank
    assert np.abs(seen - drawn(attributions, pixels)).max() <= 3


def test_pictures(dashboard, browser):
    shown = dashboard()
    page = Page(browser, shown.address)
    model = demo.load_model()
    assert page.method == "Generic Attention"
    assert page.methods[-1] == "Lrp"

    page.fetch()
    pixels = example(0)
    with torch.no_grad():
        scores, order = model(pixels).sigmoid()[0].topk(4)
    names = [demo.CLASSES[int(index)] for index in order]
    assert list(page.scores()) == names
    assert list(page.scores().values()) == pytest.approx(scores.tolist(), abs=6e-4)
    method = GenericAttention(model)
    assert_shows(page.images()[0], method.attribute(pixels, int(order[0])), pixels)
    page.explain(names[1])
    assert_shows(page.images()[0], method.attribute(pixels, int(order[1])), pixels)
    page.screenshot("insights.png", panels=2)

    page.choose("selected_method", "Attention Rollout")
    page.choose("selected_method", "Generic Attention")
    layer = page.named("start_layer")
    layer.send_keys("\ue015")  # arrow down: the last layer
    assert layer.get_property("value") == "-1"
    page.choose("interpolation", "nearest")
    page.fetch()
    pixels = example(4)  # the next four
    target = int(model(pixels).argmax())
    changed = GenericAttention(model, start_layer=-1, interpolation="nearest")
    assert_shows(page.images()[0], changed.attribute(pixels, target), pixels)
    with pytest.raises(AssertionError):
        assert_shows(page.images()[0], method.attribute(pixels, target), pixels)

    # An error is hidden by the page, but not on the terminal; then all goes on.
    layers = page.named("layers")
    layers.send_keys("nowhere")
    page.button("Fetch").click()
    page.wait(lambda _: not page.images())
    layers.send_keys("\ue003" * len("nowhere"))  # backspace
    page.fetch()
    code, errors = shown.interrupt()
    assert code == 0
    assert errors.count("Traceback (most recent call last):") == 1
    assert "ValueError: layers='nowhere' selects no attention call" in errors
    # No line for each request, and no warning of Captum's that means nothing here.
    assert "POST /fetch HTTP" not in errors
    assert "UserWarning" not in errors


def test_pictures_with_captions(dashboard, browser):
    pytest.importorskip("transformers")
    page = Page(browser, dashboard("--multimodal").address)
    assert page.method == "Generic Attention (per token)"

    page.fetch()
    assert list(page.scores()) == ["both are there", "one is there", "none is there"]
    words = page.words()
    assert [word for word, _ in words[:7]] == [
        "both are there:", "a", "sandal", "and", "a", "trouser", "·",
    ]  # fmt: skip
    no_colour = words[-1][1]
    coloured = [place for place, (_, colour) in enumerate(words) if colour != no_colour]
    assert {1, 2, 3, 4, 5} <= set(coloured) <= set(range(7))
    shared = page.bars()
    assert set(shared) == {"canvas", "captions"}
    assert min(shared.values()) > 20
    page.screenshot("insights_multimodal.png", panels=1)

    before = page.images()[0]
    page.explain("one is there")
    assert np.abs(pixels_of(page.images()[0]) - pixels_of(before)).max() > 50
    coloured = [place for place, (_, colour) in enumerate(page.words()) if colour != no_colour]
    assert {8, 9, 10, 11, 12} <= set(coloured) <= set(range(7, 14))

    page.choose("selected_method", "Generic Attention")
    page.fetch()
    drowned = page.bars()
    assert drowned["canvas"] == pytest.approx(100, abs=1)
    assert drowned["captions"] == pytest.approx(10, abs=1)  # nothing, and 10 that are added
