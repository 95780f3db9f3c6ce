"""Imports come from lower ranks only, one folder knows TransformerLens, and importing the package does no work."""

import ast
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tl_factedit

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib

ROOT = Path(tl_factedit.__file__).parent
# A folder imports from the rows above its own; folders of one row never from each other.
RANKS = (
    ("core",),
    ("backend",),
    ("stats", "locate", "measure"),
    ("editing",),
    ("editors", "probes", "attacks", "evaluation"),
    ("auditing",),
    ("organism", "data"),
    ("models",),
    ("show",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(RANKS) for name in row}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = [name for name in FILES if name.rpartition(".")[2] != "__init__"]


def imported(source: str) -> set[str]:
    """Full names of everything a source imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}"} if node.level else set()
            found |= {f"{node.module}.{alias.name}" for alias in node.names if not node.level}
    return found


def inside(source: str) -> set[str]:
    """The package's folders that a source imports from."""
    names = {name.split(".")[1] for name in imported(source) if name.startswith("tl_factedit.")}
    return {name for name in names if name in RANK}


def outside(source: str) -> set[str]:
    """Top-level names of other packages that a source imports."""
    return {name.split(".")[0] for name in imported(source)} - {"tl_factedit"}


def unit(name: str) -> str:
    return name.split(".")[0]


def not_above(name: str, source: str) -> set[str]:
    """The folders that a module imports from though they stand in its own row or below it, its own folder left out."""
    own = unit(name)
    return {other for other in inside(source) if other != own and RANK[other] >= RANK[own]}


# ---------------------------------------------------------------------------------------- direction


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_its_place_in_the_ranks(name):
    assert unit(name) in RANK, f"put {unit(name)} into RANKS, where it may be imported from"


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_lower_ranks_only(name):
    assert not_above(name, FILES[name].read_text()) == set()


def test_an_import_of_the_same_rank_or_a_higher_one_is_seen_wherever_it_stands():
    assert not_above("core.tokens", "def f():\n    from tl_factedit.locate.trace import Trace") == {"locate"}
    assert not_above("core.solve", "from tl_factedit import models") == {"models"}
    assert not_above("editing.edit", "import tl_factedit.editors.rome") == {"editors"}
    assert not_above("probes.lens", "from tl_factedit.attacks import knockout") == {"attacks"}
    assert not_above("locate.trace", "from tl_factedit.core.tokens import align") == set()
    assert not_above("locate.trace", "from tl_factedit.locate.cells import Cell") == set()


def modules_of(source: str) -> set[str]:
    """The package's own modules that a source imports when it is run: not for types only."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = {
        name.removeprefix("tl_factedit.") for name in imported(ast.unparse(tree)) if name.startswith("tl_factedit")
    }
    return {name for full in names for name in (full, full.rpartition(".")[0]) if name in MODULES}


def test_no_module_imports_itself_by_a_detour():
    graph = {name: modules_of(path.read_text()) - {name} for name, path in FILES.items() if name in MODULES}
    assert cycle(graph) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def cycle(graph: dict[str, set[str]]) -> set[str] | None:
    """Nodes that are left when those without imports are taken away again and again."""
    left = {node: set(edges) for node, edges in graph.items()}
    while free := {node for node, edges in left.items() if not edges & set(left)}:
        left = {node: edges for node, edges in left.items() if node not in free}
    return set(left) or None


@pytest.mark.parametrize("name", MODULES)
def test_only_the_backend_knows_transformer_lens(name):
    assert "transformer_lens" not in outside(FILES[name].read_text()) or unit(name) == "backend"


def test_the_mathematics_of_edits_needs_torch_alone():
    beside = outside(FILES["core.solve"].read_text()) - set(sys.stdlib_module_names)
    assert beside == {"torch", "jaxtyping"}  # jaxtyping: the shapes in the signatures
    assert inside(FILES["core.solve"].read_text()) == set()


@pytest.mark.parametrize("name", FILES)
def test_there_are_no_relative_and_no_star_imports(name):
    names = imported(FILES[name].read_text())
    assert not [n for n in names if n.startswith(".") or n.endswith("*")]


# ---------------------------------------------------------------------------------------- dependencies


DECLARED_FOR_USERS = ("smollm2", "probes")


def undeclared(source: str) -> set[str]:
    """Packages that a source imports though pyproject.toml declares no distribution that has them."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = [text for extra in DECLARED_FOR_USERS for text in project["optional-dependencies"][extra]]
    declared = {canonicalize_name(Requirement(text).name) for text in [*project["dependencies"], *extras]}
    owners = importlib.metadata.packages_distributions()
    others = outside(source) - set(sys.stdlib_module_names)
    return {name for name in others if not {canonicalize_name(owner) for owner in owners.get(name, ())} & declared}


def test_every_package_that_is_imported_is_declared():
    assert undeclared("\n".join(path.read_text() for path in FILES.values())) == set()


def test_a_package_that_comes_only_through_another_one_is_seen():
    assert undeclared("import torch, json, scipy.stats\nfrom beartype import beartype") == {"scipy", "beartype"}


# ---------------------------------------------------------------------------------------- the public face

NAMESPACES = [name for name in tl_factedit.__all__ if isinstance(getattr(tl_factedit, name), ModuleType)]


def test_dir_shows_the_face_and_the_namespaces_and_nothing_else():
    assert dir(tl_factedit) == sorted([*tl_factedit.__all__, "__version__"])
    assert tl_factedit.__version__ == importlib.metadata.version("tl-factedit")
    assert set(NAMESPACES) == {
        *("attacks", "auditing", "data", "editing", "editors", "evaluation"),
        *("locate", "models", "probes", "show", "stats"),
    }


@pytest.mark.parametrize("name", NAMESPACES)
def test_dir_shows_a_namespace_without_how_it_is_put_together(name):
    space = getattr(tl_factedit, name)
    assert dir(space) == sorted(space.__all__)
    # What isn't shown is there all the same.
    hidden = [each for each in MODULES if each.startswith(f"{name}.") and each.count(".") == 1]
    for each in hidden:
        assert importlib.import_module(f"tl_factedit.{each}") is sys.modules[f"tl_factedit.{each}"]
        assert hasattr(space, each.rpartition(".")[2])


def test_every_public_name_is_there_and_listed_once():
    listed = [(tl_factedit, name) for name in tl_factedit.__all__]
    listed += [(space, name) for n in NAMESPACES for space in [getattr(tl_factedit, n)] for name in space.__all__]
    assert all(hasattr(place, name) for place, name in listed)
    # A picture may have the name of what it shows.
    names = [name for place, name in listed if place is not tl_factedit.show]
    assert [name for name in set(names) if names.count(name) > 1] == []
    things = [id(getattr(place, name)) for place, name in listed]
    assert len(things) == len(set(things)), "one thing under two names"


def test_no_module_hides_behind_a_public_name_of_its_folder():
    """`import tl_factedit.x.y as y` takes what `x` calls y: it has to be the module."""
    for name in MODULES:
        folder, _, stem = f"tl_factedit.{name}".rpartition(".")
        module = importlib.import_module(f"tl_factedit.{name}")
        assert getattr(importlib.import_module(folder), stem) is module, name


# ---------------------------------------------------------------------------------------- no work at import

PROGRAM = """
import contextlib, io, json, logging, os, random, sys, warnings
import numpy, torch
exec(sys.argv[2])

def world():
    return {
        "torch": torch.get_rng_state().tolist(),
        "random": repr(random.getstate()),
        "numpy": repr(numpy.random.get_state()),
        "root logger": (logging.root.level, len(logging.root.handlers), logging.root.disabled),
        "loggers": sorted(n for n, l in logging.root.manager.loggerDict.items()
                          if n.startswith("tl_factedit") and getattr(l, "handlers", ())),
        "warnings": len(warnings.filters),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }

events = []
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "urllib.")):
        events.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        events.append(f"writes {args[0]}")

before = world()
sys.addaudithook(watch)
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    exec(sys.argv[1])
after = world()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps({"changed": changed, "events": events, "said": said.getvalue()}))
"""


def effects(statement: str, given: str = "") -> dict:
    """What a statement did to a fresh Python (in which `given` was run before) beside binding names."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", PROGRAM, statement, given],
        env={**os.environ, "PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_runs_seeds_logs_prints_and_opens_nothing():
    found = effects(
        "import tl_factedit", given="import transformer_lens, pandas, tqdm.auto, circuitsvis, safetensors.torch"
    )
    assert found["changed"] == []
    assert found["events"] == []
    assert found["said"] == ""


def test_an_import_that_works_is_caught():
    found = effects(
        "import torch, logging, socket, warnings; torch.manual_seed(3); logging.basicConfig();"
        "socket.socket().close(); print('hello'); warnings.simplefilter('ignore')"
    )
    assert set(found["changed"]) == {"torch", "root logger", "warnings"}
    assert found["events"]
    assert found["said"] == "hello\n"
