"""What MkDocs must know of this repository: links that leave docs/, and mathematics that needs no script.

Pages link to files of the repository as GitHub shows them, relative to the page. On the site a picture is copied from
its place, and any other file is a link to the repository.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "benchmarks/results"
LINK = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
COMMENT = re.compile(r"^<!--.*?-->\n", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the benchmarks as `figures/`."""
    for path in sorted((ROOT / PICTURES).rglob("*.png")):
        name = f"figures/{path.relative_to(ROOT / PICTURES).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ into those of the site, and drop the comments that tables stand between."""
    folder = Path(page.file.src_uri).parent

    def on_site(link: re.Match[str]) -> str:
        target = (ROOT / "docs" / folder / link["path"]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri} links to {link['path']}, which does not exist.")
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        if target.suffix == ".png":
            up = "../" * len(folder.parts)
            return f"]({up}figures/{target.relative_to(ROOT / PICTURES).as_posix()})"
        kind = "tree" if target.is_dir() else "blob"
        at = target.relative_to(ROOT).as_posix()
        return f"]({config.extra['repository']}/{kind}/main/{at}{link['anchor'] or ''})"

    return LINK.sub(on_site, COMMENT.sub("", markdown))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers show by themselves."""

    def mathml(formula: re.Match[str]) -> str:
        display = "block" if formula["tag"] == "div" else "inline"
        return convert(html.unescape(formula["latex"]).strip(), display=display)

    return FORMULA.sub(mathml, content)
