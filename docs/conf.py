"""The documentation as a site: `make site` writes it to build/site; a warning, as of a broken link, is an error."""

project = "Attune"
author = "The Attune authors"
copyright = "2026, The Attune authors"

extensions = ["myst_parser"]
root_doc = "index"
exclude_patterns: list[str] = []
nitpicky = True

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Files of the repository that are no page are linked by their place in it, which a reader of the site has not.
myst_url_schemes = ["http", "https", "mailto"]

html_theme = "furo"
html_title = "Attune"
html_show_sphinx = False
html_copy_source = False
html_static_path: list[str] = []
html_extra_path = ["openapi"]
