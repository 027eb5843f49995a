"""What the documents point at exists, and no file names a place on somebody's machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.arch.repository import ROOT, repository_files

DOCUMENTS = [path for path in repository_files() if path.suffix == ".md"]
# Paths in documents that name files of the reader's, with the reason.
NOT_OURS = {
    "pyproject.toml": "also the reader's own",
}
LINK = re.compile(r"\[[^\]\n]*\]\(\s*<?([^)\s>]+)>?[^)\n]*\)")
CODE_SPAN = re.compile(r"`([\w./-]+)`")
SOURCE_SUFFIXES = {".py", ".md", ".toml", ".txt", ".ipynb", ".sh", ".yaml", ".yml"}
ABSOLUTE_PLACE = re.compile(r"""(?<![\w.)}/-])(?:/(?:home|root|Users|tmp|work|mnt|private|scratch)/\w|[A-Z]:\\Users)""")


def headings(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+\s+(.*?)\s*$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(text: str, document: Path) -> list[str]:
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        pointed_at = (document.parent / name).resolve() if name else document
        if not pointed_at.exists() or (anchor and pointed_at.suffix == ".md" and anchor not in headings(pointed_at)):
            broken.append(target)
    return broken


def mentioned_paths(text: str) -> set[str]:
    """Names of files and folders of this repository that a text speaks of, in code spans or in commands."""
    folders = {path.relative_to(ROOT).parts[0] for path in repository_files() if path.parent != ROOT}
    starts = "|".join(sorted(re.escape(folder) for folder in folders))
    in_text = re.findall(rf"(?<![\w./-])((?:{starts})/[\w./-]*[\w/])(?![\w*{{])", text)
    named = [span for span in CODE_SPAN.findall(text) if Path(span).suffix in SOURCE_SUFFIXES and "/" not in span]
    return {*in_text, *named} - NOT_OURS.keys()


def missing_paths(text: str, document: Path) -> list[str]:
    names = {path.name for path in repository_files()}

    def exists(mentioned: str) -> bool:
        below = [ROOT / mentioned, document.parent / mentioned]
        return mentioned in names or any(path.exists() for path in below)

    return sorted(path for path in mentioned_paths(text) if not exists(path))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_point_at_what_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert broken_links(text, document) == []
    assert missing_paths(text, document) == []


def test_broken_links_and_paths_are_seen() -> None:
    text = (
        "[a](nowhere.md) [b](CHANGELOG.md#no-such-heading) [c](https://example.org/x)\n"
        "[d](CHANGELOG.md#changelog) [e](LICENSE 'title')\n"
        "see `nowhere.py`, `CHANGELOG.md`, `tests/arch/nowhere.txt` and run `python tests/arch/public_api.py`"
    )
    document = ROOT / "CONTRIBUTING.md"
    assert broken_links(text, document) == ["nowhere.md", "CHANGELOG.md#no-such-heading"]
    assert missing_paths(text, document) == ["nowhere.py", "tests/arch/nowhere.txt"]


def places(text: str) -> list[str]:
    return [line for line in text.splitlines() if ABSOLUTE_PLACE.search(line)]


def test_no_file_names_a_place_on_a_machine() -> None:
    found = {}
    for path in repository_files():
        try:
            lines = places(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found == {}


@pytest.mark.parametrize("folder", ["home", "root", "Users", "tmp", "work"])
def test_places_are_seen(folder: str) -> None:
    assert places(f'open("/{folder}/someone/file")')
    assert places(f"see https://example.org/{folder}/page and docs/{folder}/x") == []
