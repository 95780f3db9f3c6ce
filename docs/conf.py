"""Sphinx configuration: MyST pages, and the API reference from the docstrings of the public names."""

from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType

import tl_factedit

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib

project = "tl_factedit"
author = "The tl_factedit authors"
copyright = f"2026, {author}"
release = installed_version("tl-factedit")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"tl_factedit {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"  # for a package: the order of __all__
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes:" of a dataclass describe its fields once, in the class

doctest_global_setup = "import torch\n\nimport tl_factedit as fe"

PUBLIC_MODULES = [name for name in tl_factedit.__all__ if isinstance(getattr(tl_factedit, name), ModuleType)]
PUBLIC_NAMES = "<!-- public names -->"

ADDRESS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
STANDS_FOR_ADDRESS = "<address>"

# References to public names, `tl_factedit.X` and `tl_factedit.namespace.X`, are checked. Names outside the package
# aren't linked, so that the build needs no network, nor are types that stand in a signature but aren't public.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!tl_factedit\.).*"),
    (r"py:.*", r"tl_factedit\.[a-z_]+\.[a-z_]+\..*"),
    (r"py:.*", rf"tl_factedit\.(?!(?:{'|'.join(PUBLIC_MODULES)})\.)[a-z_]+\..*"),
]


def _automodule(title: str, name: str) -> str:
    return f"## {title}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"


def list_public_names(app: object, docname: str, source: list[str]) -> None:  # noqa: ARG001
    """Put the package and its public modules where api.md has its marker."""
    if PUBLIC_NAMES not in source[0]:
        return
    sections = [_automodule("fe", "tl_factedit")]
    sections += [_automodule(f"fe.{name}", f"tl_factedit.{name}") for name in PUBLIC_MODULES]
    source[0] = source[0].replace(PUBLIC_NAMES, "\n".join(sections))


def put_in_the_address(app: object, docname: str, source: list[str]) -> None:  # noqa: ARG001
    """Put the repository's address where pages leave room for it, once there is one."""
    if ".invalid/" not in ADDRESS:
        source[0] = source[0].replace(STANDS_FOR_ADDRESS, ADDRESS)


def setup(app: object) -> dict[str, bool]:
    """Register the hooks above."""
    app.connect("source-read", list_public_names)
    app.connect("source-read", put_in_the_address)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
