"""The site of the documentation: `make docs`."""

import hashlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).parent
WORKDIR = Path(os.environ.setdefault("JAXFORMER_WORKDIR", str(HERE.parent / "runs" / "steve")))

project = "jaxformer"
html_title = "jaxformer"
language = "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "examples", "images"]
templates_path = ["_templates"]

html_theme = "furo"
# Formulas are drawn by one file of MathJax, which travels with the site: it needs no network, and
# no fonts, which browsers do not load from disk.
MATHJAX = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
html_static_path = ["_static", f"{MATHJAX}/static/mathjax/tex-svg.js"]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
html_css_files = ["tour.css"]
html_show_copyright = html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_use_index = False  # it would be empty

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"
nb_merge_streams = True
nb_code_prompt_show = "The code · 代码"
nb_code_prompt_hide = "Hide · 收起"


def digest_of_code_and_model() -> str:
    """Of all that pages run: code, the trained model, the settings of the machine."""
    files = [*HERE.parent.glob("jaxformer/**/*.py"), *HERE.glob("tour/*.py")]
    files += WORKDIR.glob("checkpoints/*/manifest.sha256")
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)]
    return hashlib.sha256(" ".join([str(WORKDIR), *sums]).encode()).hexdigest()[:16]


# What a page shows depends on the code and the model, which a cache of pages does not look at: it
# is kept for one state of them only.
DIGEST = digest_of_code_and_model()
CACHES = HERE / "_build" / "executed"
nb_execution_cache_path = str(CACHES / DIGEST)
for old in CACHES.glob("*"):
    if old.name != DIGEST:
        shutil.rmtree(old)


CHINESE = re.compile("[\u3000-\u9fff\uff00-\uffef“”]")


def joined(app, document, name=""):
    """Takes away line breaks between Chinese characters, which browsers show as spaces."""
    for parent in document.findall(nodes.TextElement):
        texts = [child.astext() for child in parent.children]
        # MyST gives a line break a node of its own.
        breaks = {
            i
            for i, (before, text, after) in enumerate(
                zip(texts, texts[1:], texts[2:], strict=False), 1
            )
            if text == "\n" and CHINESE.match(before[-1:]) and CHINESE.match(after)
        }
        parent.children = [child for i, child in enumerate(parent.children) if i not in breaks]


def setup(app):
    """Reads all pages anew when the digest has changed."""
    app.add_config_value("digest", DIGEST, "env", str)
    app.connect("doctree-resolved", joined)
