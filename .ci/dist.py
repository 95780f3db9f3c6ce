"""Check what `python -m build` made: what must be in it is, and nothing else. Needs nothing but Python.

python .ci/dist.py dist                 what is in the wheel and in the source archive
python .ci/dist.py dist --tag v0.1.0    and for a release: the version, the repository's address, the changelog
"""

import argparse
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

WEIGHTS = {f"tl_factedit/organism/weights/organism-{variant}.safetensors" for variant in ("base", "plain")}
NEEDED = {"tl_factedit/__init__.py", "tl_factedit/__main__.py", "tl_factedit/py.typed", *WEIGHTS}
BESIDE = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"}
MOST_BYTES = 8_000_000


def wrong_with_wheel(path: Path) -> Iterator[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    yield from (f"{path.name} lacks {name}" for name in sorted(NEEDED - names))
    yield from (f"{path.name} lacks {info}/{name}" for name in ("entry_points.txt",) if f"{info}/{name}" not in names)
    others = {name for name in names if name.split("/")[0] not in ("tl_factedit", info)}
    others |= {name for name in names if name.endswith(".safetensors")} - WEIGHTS
    yield from (f"{path.name} has {name}, which doesn't belong there" for name in sorted(others))
    if path.stat().st_size > MOST_BYTES:
        yield f"{path.name} has {path.stat().st_size:,} bytes, needed {MOST_BYTES:,} at most"


def wrong_with_sdist(path: Path) -> Iterator[str]:
    """What is wrong with a source archive."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    needed = NEEDED | BESIDE - {".gitignore"}
    yield from (f"{path.name} lacks {name}" for name in sorted(needed - names))
    others = {name for name in names if not name.startswith("tl_factedit/")} - BESIDE
    others |= {name for name in names if name.endswith(".safetensors")} - WEIGHTS
    yield from (f"{path.name} has {name}, which doesn't belong there" for name in sorted(others))


def not_ready(wheel: Path, tag: str, changelog: str) -> Iterator[str]:
    """Why a wheel can't be released under a tag."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(opened.read(name).decode())
    if tag != f"v{metadata['Version']}":
        yield f"the tag is {tag}, and the version {metadata['Version']}"
    urls = metadata.get_all("Project-URL") or []
    if not urls or any(".invalid/" in url for url in urls):
        yield "[project.urls] in pyproject.toml doesn't hold the repository's address yet"
    heading = re.search(r"^## .*$", changelog, re.MULTILINE)
    wanted = rf"## {re.escape(metadata['Version'])} \(\d{{4}}-\d\d-\d\d\)"
    if heading is None or not re.fullmatch(wanted, heading[0].strip()):
        found = heading[0] if heading else "no heading"
        yield f"CHANGELOG.md begins with {found!r}, needed '## {metadata['Version']} (its date)'"


def main(argv: list[str] | None = None) -> int:
    """Print what is wrong; the number of things."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag")
    args = parser.parse_args(argv)
    (wheel,), (sdist,) = args.folder.glob("*.whl"), args.folder.glob("*.tar.gz")
    wrong = [*wrong_with_wheel(wheel), *wrong_with_sdist(sdist)]
    if args.tag is not None:
        changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
        wrong += not_ready(wheel, args.tag, changelog)
    for each in wrong:
        print(each, file=sys.stderr)
    if not wrong:
        print(
            f"{wheel.name} ({wheel.stat().st_size:,} bytes) and {sdist.name} ({sdist.stat().st_size:,} bytes) are right"
        )
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
