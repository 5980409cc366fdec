"""The page in a real browser: headless Chromium, where Playwright and a browser are installed."""

import pytest
from inference_cases import CONFIG, SENTENCES, state, tokenizer

from jaxformer import Translator
from jaxformer.explain.ablation import Ablation
from jaxformer.explain.page import render
from jaxformer.explain.walk import walk

FIGURES = 12


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    translator = Translator(state(2)["params"], tokenizer(), CONFIG, 2)
    told = walk(translator, SENTENCES[0], Ablation(heads=(("cross", 0, 1),)))
    folder = tmp_path_factory.mktemp("page")
    (folder / "ablated.html").write_text(render(told), encoding="utf-8")
    one = told | {"runs": told["runs"][:1]}
    (folder / "plain.html").write_text(render(one), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["plain", "ablated"])
def test_slider_picker_language_and_export(tab, html, name):
    tab.goto((html / f"{name}.html").as_uri())
    assert tab.locator("figure").count() == FIGURES + (name == "ablated")
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    before = tab.locator("#candidates .panels").inner_html()
    tab.locator("#step").fill("1")
    assert tab.locator("#now").inner_text().startswith("2/")
    assert tab.locator("#candidates .panels").inner_html() != before
    before = tab.locator("#weights .panels").inner_html()
    tab.locator("#head button", has_text="3").click()
    tab.locator("#stack button").first.click()
    assert tab.locator("#head button[aria-pressed=true]").inner_text() == "3"
    assert tab.locator("#weights .panels").inner_html() != before
    tab.locator("#language").click()
    assert "下一个词元" in tab.locator("#candidates h3").inner_text()
    tab.locator("#play").click()
    tab.wait_for_function("document.getElementById('now').textContent.startsWith('3/')")
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with tab.expect_download() as download:
            tab.locator(f"#cross_attention [data-as={kind}]").click()
        assert download.value.suggested_filename == f"cross_attention.{kind}"
        with open(download.value.path(), "rb") as file:
            content = file.read()
        assert content.startswith(start)
        assert len(content) > 2000
