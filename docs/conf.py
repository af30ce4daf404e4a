"""The site: `make docs` builds it, and takes a warning for an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

HERE = Path(__file__).resolve().parent
GENERATOR = HERE.parent / "generator"
sys.path.insert(0, str(GENERATOR))

from optforge import __version__  # noqa: E402 - it is found there

project = "optforge"
author = "the optforge authors"
project_copyright = "the optforge authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings say `name` as Markdown does
highlight_language = "none"  # of indented blocks, which are commands and text

autodoc_typehints = "none"  # the docstrings have them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
intersphinx_mapping: dict[str, tuple[str, str | None]] = {}  # the build needs no network

html_theme = "furo"
html_title = f"optforge {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_show_sphinx = False


class Help(Directive):
    """The help of the command line and of all its commands, as they say it themselves."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        """A section for each command."""
        from typer.main import get_command

        from optforge.cli import app

        made: list[nodes.Node] = []
        for name in ("", *get_command(app).commands):  # type: ignore[attr-defined]
            title = f"optforge {name}".strip()
            section = nodes.section(ids=[nodes.make_id(title)])
            self.state.document.note_implicit_target(section, section)
            text = said(name)
            section += [nodes.title("", "", nodes.literal("", title)), nodes.literal_block(text, text, language="none")]
            made.append(section)
        return made


def said(command: str) -> str:
    """What `optforge COMMAND --help` says."""
    arguments = [sys.executable, "-P", "-m", "optforge", *filter(None, [command]), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(GENERATOR), "COLUMNS": "92", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip("\n")


def setup(app: object) -> None:
    """Add the directive."""
    app.add_directive("optforge-help", Help)  # type: ignore[attr-defined]
