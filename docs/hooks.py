"""What the documentation site has beyond the pages in this folder: files of other folders, and the commands' help."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from overspill.cli.app import app

ROOT = Path(__file__).parents[1]
# Files beside docs/ that are pages of the site. Others cannot be linked: the strict build says so.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/cuda/README.md": "cuda.md",
    "examples/README.md": "examples.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
COMMANDS = "<!-- the help of each command -->"
HELP_WIDTH = 88


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of other folders."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links, which are those of the repository, to the site's pages; write the commands' help."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = re.sub(
        r"\]\((?![a-z]+:)([^)#\s]+)", lambda link: f"]({_target(link[1], source, page.file.src_uri)}", markdown
    )
    if page.file.src_uri == PAGES["examples/README.md"]:
        markdown += "".join(_script(file) for file in sorted((ROOT / "examples").glob("*.py")))
    return markdown.replace(COMMANDS, _commands_help()) if COMMANDS in markdown else markdown


def _script(file: Path) -> str:
    return f"\n## {file.name}\n\n```python\n{file.read_text(encoding='utf-8')}```\n"


def _target(link: str, source: str, page: str) -> str:
    """Return a link of the file ``source``, from the page that it becomes."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    there = PAGES.get(path, path.removeprefix("docs/"))
    if path.startswith("examples/") and path.endswith(".py"):  # a section of the examples' page
        there = f"{PAGES['examples/README.md']}#{posixpath.basename(path).replace('.', '')}"
    return posixpath.relpath(there, posixpath.dirname(page) or ".")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of the roles in docstrings, such as ``:meth:`Model.stream```."""
    return re.sub(r":(?:class|func|meth|mod|attr|exc|data):<code>~?([\w.]+)(?:\(\))?</code>", _reference, html)


def _reference(role: re.Match[str]) -> str:
    name = role[1]
    identifier = name if name.startswith("overspill") else f"overspill.{name}"
    return f'<autoref identifier="{identifier}" optional><code>{name}</code></autoref>'


def _commands_help() -> str:
    """Return a section for each command: its help, as a terminal shows it."""
    command: Any = typer.main.get_command(app)
    return "\n\n".join([_help(), *(_help(name) for name in command.commands)])


def _help(*command: str) -> str:
    said = CliRunner().invoke(app, [*command, "--help"], prog_name="overspill", terminal_width=HELP_WIDTH)
    if said.exit_code:
        raise RuntimeError(f"overspill {' '.join(command)} --help: {said.output}")
    return f"## {' '.join(['overspill', *command])}\n\n```text\n{said.output.rstrip()}\n```"
