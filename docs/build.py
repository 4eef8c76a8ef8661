"""The documentation as a static site in build/docs: the guide of docs/*.md, and every function from its docstring.

`make docs` runs it. pdoc documents modules; so each page of the guide becomes, for the time of the build, a module of
one docstring in a package `guide`, and is found by the site's search beside the functions.
"""

import re
import shutil
import sys
import tempfile
from functools import partial
from os.path import relpath
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "build" / "docs"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def module_name(page: Path) -> str:
    """The name of the module that stands for a page: `tutorial_pandas` for tutorial-pandas.md."""
    return page.stem.replace("-", "_")


def title(page: Path) -> str:
    """The heading of a page."""
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def site_file(target: Path) -> Path:
    """The file of the site that shows `target`, a file of the repository; itself where none does."""
    if target == DOCS / "README.md":
        return SITE / "guide.html"
    if target.parent == DOCS and target.suffix == ".md":
        return SITE / "guide" / f"{module_name(target)}.html"
    if target.suffix == ".py" and target.relative_to(ROOT).parts[0] in ("quant", "analysis"):
        module = target.parent if target.stem == "__init__" else target
        return (SITE / module.relative_to(ROOT)).with_suffix(".html")
    if target.parent == DOCS / "images":
        return SITE / target.relative_to(DOCS)
    return target


def docstring(page: Path) -> str:
    """The text of a page with its links as the site needs them, and lists that pdoc's Markdown recognises."""
    text = page.read_text(encoding="utf-8")

    def moved(match: re.Match[str], folder: Path) -> str:
        words, link, anchor = match.groups()
        if "://" in link:
            return match[0]
        target = (page.parent / link).resolve()
        if words == target.name and target.parent == DOCS:  # the name of a file says nothing on a site
            words = title(target)
        return f"[{words}]({relpath(site_file(target), folder)}{anchor or ''})"

    text = LINK.sub(partial(moved, folder=site_file(page).parent), text)
    return re.sub(r"^(?!\s*(?:[-*]|\d+\.) )(\S.*\n)(?=[-*] |1\. )", r"\1\n", text, flags=re.MULTILINE)


def main() -> None:
    """Write the site; earlier files in build/docs are removed."""
    shutil.rmtree(SITE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        guide = Path(folder) / "guide"
        guide.mkdir()
        for page in sorted(DOCS.glob("*.md")):
            name = "__init__" if page.name == "README.md" else module_name(page)
            (guide / f"{name}.py").write_text(f"{docstring(page)!r}\n", encoding="utf-8")
        sys.path.insert(0, folder)
        pdoc.render.configure(
            docformat="google",
            template_directory=DOCS / "pdoc",
            footer_text="Quantization Variation Workbench",
            show_source=True,
            search=True,
        )
        pdoc.pdoc("guide", ROOT / "quant", ROOT / "analysis", output_directory=SITE)
    shutil.copytree(DOCS / "images", SITE / "images", ignore=shutil.ignore_patterns("*.md"))
    print(f"documentation in {relpath(SITE / 'guide.html')}")


if __name__ == "__main__":
    main()
