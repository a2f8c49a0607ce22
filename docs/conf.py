"""The site: MyST-NB and the book theme over the pages that docs/build.py has laid out. Nothing is executed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "grad_nb"
author = "The grad_nb developers"
copyright = author  # noqa: A001

extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["_static"]
nb_execution_mode = "off"  # what a notebook has stored is what is shown
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell gives as Markdown

myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "slugs.as_in_jupyter"

html_theme = "sphinx_book_theme"
html_title = "grad_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "collapse_navbar": True,
    "navbar_persistent": [],
}
mathjax_path = "mathjax/tex-chtml.js"
html_context = {"default_mode": "auto"}
