"""A real browser: Debian's chromium and chromium-driver. Where they are missing, tests skip."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium(*arguments):
    """A driver of a headless browser that is started with these arguments as well."""
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"not installed: {' and '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        *arguments,
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()
