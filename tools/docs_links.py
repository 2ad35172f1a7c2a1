"""A hook of mkdocs (mkdocs.yml): adds READMEs and images of the repository to the site, and makes links
between files work there as they do in the repository.

A link to a README in PAGES leads to its page, a link to an image to a copy of it, and a link to any other
file of the repository to `repo_url`. Without a repo_url such a link becomes plain text. A link to a file that
does not exist is a warning, which stops `mkdocs build --strict`.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "recipes/README.md": "reference/recipes.md",
    "slurm/README.md": "reference/slurm.md",
    "ds_configs/README.md": "reference/ds_configs.md",
    "ds_configs/MISTAKES.md": "reference/mistakes.md",
    "recipes/paper/README.md": "reference/paper.md",
    "recipes/evidence/README.md": "reference/evidence.md",
    "benchmarks/README.md": "reference/benchmarks.md",
    "tests/damage.md": "reference/damage.md",
    "CONTRIBUTING.md": "reference/contributing.md",
    "CHANGELOG.md": "reference/changelog.md",
    "README.md": "index.md",  # its own page is not on the site
}
IMAGES = (
    "recipes/images/quickstart_loss.png",
    "recipes/evidence/cpu/attention.png",
    "recipes/evidence/cpu/curves.png",
    "recipes/evidence/cpu/rank_worth.png",
    "benchmarks/results/growth.png",
    "tests/drills/long_run/long_run.png",
)
LINK = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\[(?P<words>[^\]\n]*)\]\((?P<target>[^)\s]+)\)", re.DOTALL)
SOURCES = {page: source for source, page in PAGES.items() if page != "index.md"}
log = logging.getLogger("mkdocs.hooks.docs_links")


def on_files(files, config):
    """Add the pages and images that are outside docs/."""
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for image in IMAGES:
        files.append(File.generated(config, f"repository/{image}", abs_src_path=str(ROOT / image)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Return the page, with links into the repository turned into links of the site."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def on_site(link: re.Match) -> str:
        if link["code"] or re.match(r"[a-z]+:|#", link["target"]):
            return link[0]
        target, _, anchor = link["target"].partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", source, link["target"])
            return link[0]
        uri = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        uri = uri or (f"repository/{path}" if path in IMAGES else None)
        if uri:
            relative = os.path.relpath(uri, os.path.dirname(here) or ".")
            return f"[{link['words']}]({relative}{'#' + anchor if anchor else ''})"
        if not config.repo_url:
            return link["words"]
        return f"[{link['words']}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    return LINK.sub(on_site, markdown)
