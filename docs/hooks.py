"""MkDocs hooks: the tables of bench/results, the changelog and the house style become pages of the site.

The Markdown files link to them by their place in the repository, so that the same links work there.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
TABLES = "bench/results"
# A file of the repository -> its page.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"} | {
    f"{TABLES}/{path.name}": f"tables/{path.name}" for path in sorted((ROOT / TABLES).glob("*.md"))
}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_nav(nav, config, files: Files):
    return nav


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links of the repository as links of the site."""
    by_page = {made: source for source, made in PAGES.items()}
    here = page.file.src_uri
    folder = (ROOT / by_page.get(here, f"docs/{here}")).parent
    depth = "../" * here.count("/")

    def link(match: re.Match) -> str:
        target = (folder / match[1]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        inside = target.relative_to(ROOT).as_posix()
        return f"]({depth}{PAGES.get(inside, inside.removeprefix('docs/'))}"

    return _LINK.sub(link, markdown)
