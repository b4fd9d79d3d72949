"""MkDocs hooks: the tables of bench/results, the changelog and the house style become pages of the site.

The Markdown files link to them by their place in the repository, so that the same links work there.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
TABLES = [path.relative_to(RESULTS).as_posix() for path in sorted(RESULTS.rglob("*.md"))]
# File of the repository -> its page.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"bench/results/{name}": f"tables/{name}" for name in TABLES},
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_config(config):
    """Adds the tables to the navigation."""
    config.nav.append({"Tables": [f"tables/{name}" for name in TABLES]})
    return config


def on_files(files: Files, config) -> Files:
    """Adds the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    folder = (ROOT / _SOURCES.get(here, f"docs/{here}")).parent
    up = "../" * here.count("/")

    def link(match: re.Match) -> str:
        target = (folder / match[1]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        inside = target.relative_to(ROOT).as_posix()
        return f"]({up}{PAGES.get(inside, inside.removeprefix('docs/'))}"

    return _LINK.sub(link, markdown)
