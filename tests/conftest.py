"""Eight virtual CPU devices, strict types and ranks: set before any test imports JAX."""

import os
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, of programs that run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, where Playwright and a browser are installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def tab(request, browser):
    """A new page that fails the test if its console says something, or if it asks the network."""
    said = []
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, locale="en-US")
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: r.url.startswith("http") and said.append(r.url))
    yield page
    page.close()
    assert not said
