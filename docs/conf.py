"""How Sphinx builds the documentation: ``nox -s docs``."""

from __future__ import annotations

import os
import runpy
from importlib.metadata import metadata
from pathlib import Path

from sphinx.util.inspect import TypeAliasForwardRef

# The map on the page about contributing shows the imports as they are now.
house = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "house.py"))
house["PICTURE"].write_text(house["picture"]())

# So does the map for language models.
llms = runpy.run_path(str(Path(__file__).parent / "examples" / "llms.py"))
llms["FILE"].write_text(llms["llms"]())

# Figures fit light and dark pages; the kernels of the notebooks inherit this.
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent)

about = metadata("actrec")

project = about["Name"]
author = about["Author"]
copyright = f"2026, {author}"  # noqa: A001  # Sphinx wants this name
version = release = about["Version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [
    "_build",
    "**/.ipynb_checkpoints",
    "jupyter_execute",
    "benchmarks*.md",
    "*.ipynb",
]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_extra_path = ["llms.txt"]
pygments_dark_style = "github-dark"  # that of the theme underlines what is imported

# --- Text ----------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# --- Notebooks: executed at every build, and broken ones break it ----------------------------------

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "warn"  # a page that warns its readers was not meant to

# --- Reference -----------------------------------------------------------------------------------

autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
#: Names of types that the text explains: a signature shows them, not what they stand for.
_ALIASES = (
    "Array Axes Key Layers Mask Passes Queries Query Reducer Role Selector Transform Value Where"
)
autodoc_type_aliases = {name: name for name in _ALIASES.split()}
TypeAliasForwardRef.__repr__ = lambda self: self.name  # in a union Sphinx shows this class else

python_maximum_signature_line_length = 88

nitpicky = True
# Links into other projects need their inventories from the network, and the docs build without it.
nitpick_ignore_regex = [
    ("py:.*", r"torch(\..*)?"),  # PyTorch has its own reference
    ("py:.*", r"(collections|contextlib|os|types)\..*"),  # and so has the standard library
    # Signatures stand as they are written, with short names for types that the text explains.
    ("py:class", r"nn\.Module|AbstractContextManager|Callable\[.*|.*\bValue\b.*"),
    (
        "py:class",
        r"(Array|Axes|K|Key|Layers|Mask|Overflows|Passes|T|Where|Recording|Role|Selector|StoredLayer|Tensor|V|numpy\.ndarray|actrec\.store\.(reader|layers|joined_ranks)\.\w+)(\[.*)?",
    ),
    ("py:.*", r"actrec\._.*"),
]
