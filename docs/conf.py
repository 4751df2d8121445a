"""Configure Sphinx: pages in Markdown (MyST), executed notebooks, the API from docstrings, commands from ``--help``."""

import re
import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import command_pages
import result_pages

project = "largebatch"
author = "The largebatch developers"
copyright = "The largebatch developers, MIT licence"
release = version = metadata.version("largebatch")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]

# Links to headings of other pages are checked, as are links to pages and files.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "dollarmath"]

# A notebook whose cells have not changed since the last build is not executed again; an error ends the build.
nb_execution_mode = "cache"
nb_execution_excludepatterns = ["notebooks/*"]  # committed with their outputs; a slow test executes them
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

smartquotes = False  # --help would become a dash
html_theme = "furo"
html_title = "largebatch"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def write_pages(app: Sphinx) -> None:
    """Write the pages of commands and results before Sphinx looks for pages."""
    docs = Path(app.srcdir)
    command_pages.write_pages(docs / "commands")
    result_pages.write_pages(docs.parent, docs / "results")


def link_results(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links to ``results/NAME/README.md``, which hold in the repository, lead to its page here."""
    source[0] = re.sub(r"\]\(\.\./results/(\w+)/README\.md", r"](results/\1.md", source[0])
    source[0] = re.sub(r"\]\(\.\./results/(\w+)/(\w+)\.md", r"](results/\1-\2.md", source[0])


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", link_results)
