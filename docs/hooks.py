"""MkDocs hooks that generate pages from the code and the READMEs of the repository."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import posixpath
import re
from collections.abc import Callable

from kd_d2.analysis import ANALYSES
from kd_d2.reference import config_reference

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = {
    "projects/README.md": "results/index.md",
    "projects/results.md": "results/all.md",
    "projects/StructuralKD/README.md": "results/StructuralKD.md",
    "projects/StructuralKD/notes.md": "results/StructuralKD-notes.md",
    "projects/ICD/README.md": "results/ICD.md",
    "projects/ICD/notes.md": "results/ICD-notes.md",
    "projects/RankMimicking/README.md": "results/RankMimicking.md",
    "projects/RankMimicking/notes.md": "results/RankMimicking-notes.md",
    "projects/InstanceMaskAlignment/README.md": "results/InstanceMaskAlignment.md",
    "projects/NewerMethods/README.md": "results/NewerMethods.md",
    "projects/Baselines/README.md": "results/Baselines.md",
    "benchmarks/README.md": "results/benchmarks.md",
    "cluster/README.md": "guides/many-gpus.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Generated page of each Markdown file in the repository."""

log = logging.getLogger("mkdocs.hooks")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files in docs/."""
    pictures: dict[str, str] = {}
    for source, page in PAGES.items():
        with open(os.path.join(ROOT, source), encoding="utf-8") as file:
            text = file.read().replace(" ± ", "&nbsp;±&nbsp;")  # on one line in a narrow column
            content = _with_links(text, source, page, pictures)
        files.append(File.generated(config, page, content=content))
    for source, target in pictures.items():
        files.append(File.generated(config, target, abs_src_path=os.path.join(ROOT, source)))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/keys.md", content=keys_page()))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Replace links in handwritten pages to files outside docs/ with the names of the files."""
    path = page.file.src_uri
    if path in PAGES.values() or path.startswith("reference/"):
        return markdown
    return _with_links(markdown, posixpath.join("docs", path), path, {})


def _with_links(markdown: str, source: str, page: str, pictures: dict[str, str]) -> str:
    """Convert links between files of the repository to links between pages, or to the file name if it is not a page.

    Args:
        source: path of the file in the repository.
        page: path of its page on the site.
        pictures: filled with the pictures that the file shows and their paths on the site.
    """

    def replaced(match: re.Match) -> str:
        mark, text, target = match.groups()
        path, hash_mark, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if mark and not path.startswith("docs/"):
            place = posixpath.join("pictures", path.replace("/", "-"))
            pictures[path] = place
            return f"![{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')})"
        if mark:
            return match[0]
        known = PAGES.get(path) or (
            path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else None
        )
        if known:
            return f"[{text}]({posixpath.relpath(known, posixpath.dirname(page) or '.')}{hash_mark}{anchor})"
        if not os.path.exists(os.path.join(ROOT, path)):
            log.warning(f"{source} links to {path}, which does not exist")
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(replaced, markdown)


def commands_page() -> str:
    """Return the page with the help of every command."""
    from kd_d2.cli import COMMANDS, main

    parts = [
        "# Commands\n\nThe program is `kd-d2`, or equivalently `python -m kd_d2`. Overrides of config keys come last.\n"
    ]
    commands = [[name] for name in COMMANDS]
    commands += [["config", action] for action in ("list", "show", "explain")]
    commands.append(["data", "check"])
    commands += [["analyze", name] for name in ANALYSES]
    for command in sorted(commands):
        parts.append(f"## {' '.join(command)}\n\n```text\n{_help_of(main, command)}\n```\n")
    return "\n".join(parts)


def _help_of(main: Callable[[list[str]], None], command: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue().rstrip()


def keys_page() -> str:
    """Return the page with every config key of the library."""
    parts = [
        "# Config keys\n\nKeys that kd_d2 adds to Detectron2's configs. `kd-d2 config explain KEY` prints the same.\n"
    ]
    nodes: dict[str, list[str]] = {}
    for key in config_reference():
        node, _, name = key.name.rpartition(".")
        cells = (f"`{name}`", f"`{key.default!r}`", key.values, key.description)
        nodes.setdefault(node, []).append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for node, rows in nodes.items():
        parts += [f"## {node}\n", "| key | default | value | |\n|---|---|---|---|", *rows, ""]
    return "\n".join(parts)
