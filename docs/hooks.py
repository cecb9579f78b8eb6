"""What MkDocs must know of this repository: links that leave docs/, and mathematics that needs no script.

Pages link to files of the repository as GitHub shows them, relative to the page. On the site a picture is copied from
its place, and any other file is a link to the repository.
"""

from __future__ import annotations

import html
import re
import unicodedata
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "benchmarks/results"
LINK = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
COMMENT = re.compile(r"^<!--.*?-->\n|<!--/?n\b.*?-->", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)

NORM = re.compile(r"<mo>(&#x0(?:2016|007C);)</mo>")  # bars, which would grow with what comes after them
VARIANT = re.compile(r'<m(?P<tag>[in]) mathvariant="(?P<variant>script|double-struck|bold)">(?P<sign>\w)</m(?P=tag)>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the benchmarks as `figures/`."""
    for path in sorted((ROOT / PICTURES).rglob("*.png")):
        name = f"figures/{path.relative_to(ROOT / PICTURES).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ into those of the site, and drop the comments that tables and numbers stand between."""
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
        found = VARIANT.sub(_unicode, convert(html.unescape(formula["latex"]).strip(), display=display))
        return NORM.sub(r'<mo stretchy="false">\1</mo>', found)

    return FORMULA.sub(mathml, content)


def _unicode(sign: re.Match[str]) -> str:
    """A letter of another alphabet as a character of its own: browsers do not read mathvariant."""
    base = unicodedata.name(sign["sign"]).replace("LATIN ", "").replace("LETTER ", "")
    name = f"{sign['variant'].upper()} {base}"
    try:
        letter = unicodedata.lookup(f"MATHEMATICAL {name}")
    except KeyError:  # those that Unicode had before: ℒ, ℝ
        letter = unicodedata.lookup(name)
    return f"<m{sign['tag']}>{letter}</m{sign['tag']}>"
