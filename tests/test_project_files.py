"""What the project says of itself, in files that no program compares: version, address, citation, workflows."""

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

import tl_factedit

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
TEXTS = (".md", ".toml", ".cff", ".yml", ".yaml", ".ipynb", ".py", "")


def tracked() -> list[Path]:
    """The project's files of text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.suffix in TEXTS and file.is_file()]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ one version


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert tl_factedit.__version__ == importlib.metadata.version("tl-factedit") == version
    assert str(CITATION["version"]) == version
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == version
    assert f"version = {{{version}}}" in text("docs/cite.md")


# ------------------------------------------------------------------------------------------------ one address


def addresses(content: str) -> list[str]:
    """Addresses of a repository called tl_factedit, those inside other addresses too."""
    return re.findall(r"(?:https?://|github/|git@)[^\s\"'()<>\]}\\]*/tl_factedit\b", content)


def test_the_repositorys_address_stands_in_one_place():
    address = PROJECT["urls"]["Repository"]
    assert CITATION["repository-code"] == address
    here = Path(__file__)
    others = {
        (file.name, found)
        for file in tracked()
        if file not in (here, ROOT / "pyproject.toml", ROOT / "CITATION.cff")
        for found in addresses(file.read_text(encoding="utf-8"))
    }
    assert others == set()


def test_an_address_is_seen_wherever_it_stands():
    assert addresses("pip install git+https://example.org/me/tl_factedit") == ["https://example.org/me/tl_factedit"]
    badge = "https://colab.research.google.com/github/me/tl_factedit/blob/main/examples/quickstart.ipynb"
    assert addresses(f'"[![Open]({badge})\\n"') == ["https://colab.research.google.com/github/me/tl_factedit"]
    assert addresses("import tl_factedit; see docs/tl_factedit and https://example.org/tl_factedit_2") == []


def test_pages_leave_room_for_the_address():
    for name in ("README.md", "docs/install.md", "docs/cite.md"):
        assert "<address>" in text(name), name


# ------------------------------------------------------------------------------------------------ citation


def test_the_citation_names_the_project_its_authors_and_its_licence():
    title = CITATION["title"]
    assert title.startswith("tl_factedit: ") and CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert CITATION["authors"] == PROJECT["authors"]
    assert CITATION["license"] == PROJECT["license"]
    page = text("docs/cite.md").replace("\\_", "_")
    assert f"title   = {{{title}}}" in page
    assert all(f"{{{{{author['name']}}}}}" in page for author in CITATION["authors"])


# ------------------------------------------------------------------------------------------------ what is installed


def test_the_script_is_the_program():
    from tl_factedit.cli.program import main

    module, _, name = PROJECT["scripts"]["tl-factedit"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def script(name: str):
    """A script of ``.ci`` as a module."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path):
    """A wheel with empty files."""
    dist = script("dist")

    def make(*more, without=(), url="https://example.org/me/tl_factedit", version="0.1.0"):
        path, info = tmp_path / f"tl_factedit-{version}-py3-none-any.whl", f"tl_factedit-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as file:
            for name in sorted({*dist.NEEDED, f"{info}/entry_points.txt", *more} - set(without)):
                file.writestr(name, "")
            file.writestr(f"{info}/METADATA", f"Version: {version}\nProject-URL: Repository, {url}\n")
        return path

    return make


def test_a_wheel_with_too_much_or_too_little_is_seen(wheel):
    dist = script("dist")
    assert list(dist.wrong_with_wheel(wheel())) == []
    assert len(list(dist.wrong_with_wheel(wheel("tests/test_tokens.py")))) == 1
    assert len(list(dist.wrong_with_wheel(wheel("tl_factedit/organism/weights/organism-oracle0.safetensors")))) == 1
    assert len(list(dist.wrong_with_wheel(wheel(without=("tl_factedit/py.typed",))))) == 1
    assert len(list(dist.wrong_with_wheel(wheel(without=tuple(dist.WEIGHTS))))) == 2


def test_a_release_needs_its_tag_its_date_and_an_address(wheel):
    dist = script("dist")
    dated = "# Changelog\n\n## 0.1.0 (2026-12-01)\n"
    assert list(dist.not_ready(wheel(), "v0.1.0", dated)) == []
    assert len(list(dist.not_ready(wheel(), "v0.2.0", dated))) == 1
    assert len(list(dist.not_ready(wheel(), "v0.1.0", dated.replace("2026-12-01", "unreleased")))) == 1
    assert len(list(dist.not_ready(wheel(url="https://repository.invalid/tl_factedit"), "v0.1.0", dated))) == 1


# ------------------------------------------------------------------------------------------------ what GitHub reads


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_is_yaml_and_may_write_nothing_by_default(name):
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["runs-on"] and job["steps"] for job in workflow["jobs"].values())


def test_a_release_is_tried_with_the_versions_of_the_makefile_before_it_is_published():
    jobs = yaml.safe_load(WORKFLOWS["release"].read_text(encoding="utf-8"))["jobs"]
    tried = [each.split()[0] for each in jobs["smoke"]["strategy"]["matrix"]["install"]]
    made = re.findall(r"^TL[34] = (\S+)$", text("Makefile"), re.MULTILINE)
    assert sorted(tried) == sorted(["transformer-lens", *(f"transformer-lens=={version}" for version in made)])
    assert jobs["publish"]["needs"] == "smoke" and jobs["smoke"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_pre_commit_runs_what_ci_runs():
    (repo,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    targets = [hook["entry"].removeprefix("make ") for hook in repo["hooks"]]
    assert repo["repo"] == "local"
    assert f"step lint make {' '.join(targets)}" in text(".ci/run")


def test_issue_forms_are_yaml_with_the_fields_that_github_wants():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    for form in forms:
        held = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.stem != "config":
            assert {"name", "description", "body"} <= set(held)
            assert all({"type", "attributes"} <= set(part) for part in held["body"])
