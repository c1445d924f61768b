"""What mkdocs needs beside its settings: the pages of the repository's root, and links that fit the site.

Pages are written for readers of the repository, where `../MODEL.md` is right. In the site README, MODEL and so on lie
beside the guides; links to files that are no pages become plain text, since the site does not hold them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "about.md",
    "MODEL.md": "model.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "dev/LOG.md": "log.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_PICTURE = re.compile(r'\b(src|srcset)="docs/')  # of HTML, which README needs for pictures of two kinds
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]*`)", re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the root that are there."""
    for source, name in PAGES.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links into those of the site."""
    sources = {name: source for source, name in PAGES.items()}
    here = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def replaced(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        name, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not name:
            return match[0]
        path = os.path.normpath(here / name).replace(os.sep, "/")
        site = PAGES.get(path) or path.removeprefix("docs/")
        return f"{picture}[{text}]({site}{hash_}{anchor})" if files.get_file_from_path(site) else text

    parts = _CODE.split(markdown)
    return "".join(
        part if index % 2 else _PICTURE.sub(r'\1="', _LINK.sub(replaced, part)) for index, part in enumerate(parts)
    )
