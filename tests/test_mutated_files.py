"""What a file holds may be anything, with a right checksum: each field of each kind of file, one thing wrong at a time.

Another version or program may have written it. Such a file is refused by its name and the field's; it is never
loaded as something else, and never ends in an error that says nothing (KeyError, AttributeError …).
"""

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import laws
import pytest
import tiny
from torch import Tensor

import tl_factedit as fe
from tl_factedit.core import files

KIND = tiny.ONE_KIND[0]
NAN = math.nan
Steps = tuple[str | int, ...]


def small():
    return tiny.model(KIND, "gpt2", n_layers=3)


def edit():
    rome = fe.Rome(fe.KeyStats.identity(small(), 1), contexts=("",), fit=laws.QUICK, progress=False)
    return rome(small(), [laws.FACT])


def router():
    return fe.Router(1, contexts=("",), fit=laws.QUICK, progress=False)(small(), [laws.FACT])


def trace():
    return fe.causal_trace(small(), laws.FACT, corruption=fe.GaussianNoise(samples=2), progress=False)


def replaced():
    facts = [fe.Fact(who, "{} is in", where) for who, where in (("Anna", " Paris"), ("Bob", " Rome"))]
    return fe.causal_trace(small(), facts, corruption=fe.TokenReplacement(known=False), progress=False)


def lens():
    options: dict[str, Any] = {"n_tokens": 40, "steps": 2, "batch": 8, "progress": False, "rank": 2}
    return fe.probes.train_tuned_lens(small(), laws.texts(10), **options)


def stats():
    return fe.key_stats(small(), [1], laws.texts(3), n_tokens=10, progress=False)[1]


def scores():
    return fe.evaluate(small(), [laws.FACT, laws.OTHER])


def answers():
    said = fe.answers(small(), laws.FACT, n_tokens=2, progress=False)
    return fe.answers(small(), laws.FACT, n_tokens=2, before=said, progress=False)


def verdict():
    model = small()
    changed = edit()
    return fe.audit(model, changed, laws.FACT, texts=laws.texts(1), progress=False)


@dataclass(frozen=True)
class Saved:
    """A kind of file: what is saved and how it is read.

    Attributes:
        make: Makes it.
        what: What the file says that it is.
        load: Reads it.
        fine: Of what was done, and patterns of the places where that is as good as what was there.
    """

    make: Callable[[], Any]
    what: str
    load: Callable[[Any], Any]
    fine: dict[str, str]


FACT = r"facts\.0\.(relation|id)"
HERE = {
    "None": r"facts\.0\.(target_true|target_new)",  # one of them is needed
    "another kind": rf"{FACT}|provenance\.revision",
    "removed": r"provenance\.versions\..*",
}
# Fields that files had not from the beginning.
OLDER = HERE | {"removed": r"provenance\.(versions\..*|revision|edits|hooks|bos_in_prompt|devices)"}
# What editors say of themselves and of their fits is theirs; what others read of it is checked.
OWN = r"editor\.(?!name).*|fits\.0\.clamped"
LESS = r"fits\.0\.(losses|target_prob|stopped|same_first_token)|diagnostics\.0\.(unmet|key_cosines|off_target|weight)"
EDIT = {what: f"{where}|{OWN}" for what, where in OLDER.items()} | {"NaN": OWN}
EDIT["removed"] += f"|{LESS}"
EITHER = r"(mean|low|high)"
UNKNOWN = rf".*\.{EITHER}|.*\.nll_(true|new)"  # NaN where nothing, or too little, was there to be measured
SCORES = HERE | {"NaN": UNKNOWN}
ANSWERS = {what: rf"{where}|before\.({where})" for what, where in HERE.items()}
ANSWERS["None"] += r"|before|(before\.)?each\.0\.names_old"
FOUND = r"findings\.(neighbour_loss|perplexity)|drift|upstream|dose|.*\.cases\.0\.key|.*\.counted"
TENSORS = (
    r"verdict\..*\.(values|mean|low|high|extra\[.*|counted\[.*)|verdict\.(dose|drift|gains).*|verdict\..*details.*"
)
VERDICT = {
    "None": rf"(.*\.)?{HERE['None']}|{FOUND}|.*\.digest|.*\.details\..*",
    "another kind": rf"(.*\.)?{FACT}|(.*\.)?(provenance|model)\.revision|.*\.cases\.0\.key|.*\.details\..*",
    "removed": r".*\.details\..*",
    "NaN": rf"{UNKNOWN}|.*\.(at_most|least|predicted_error)|{TENSORS}",
    "infinite": TENSORS,
}

TRACE = OLDER | {"None": rf"{OLDER['None']}|corruption\.sigma"}
REPLACED = OLDER | {"another kind": rf"{OLDER['another kind']}|facts\.0\.target_new"}
STATS = {"None": r"layers\.0\.provenance", "another kind": r".*\.revision", "removed": r".*\.versions\..*"}

SAVED: dict[str, Saved] = {
    "edit": Saved(edit, "edit", fe.Edit.load, EDIT),
    "router": Saved(router, "routed edit", fe.editors.RoutedEdit.load, EDIT),
    "trace": Saved(trace, "trace", fe.Trace.load, TRACE),
    "replaced": Saved(replaced, "trace", fe.Trace.load, REPLACED),
    "lens": Saved(lens, "tuned lens", fe.probes.TunedLens.load, OLDER),
    "stats": Saved(stats, "key statistics", fe.KeyStats.load, STATS),
    "scores": Saved(scores, "scores", fe.Scores.load, SCORES),
    "answers": Saved(answers, "answers", fe.evaluation.Answers.load, ANSWERS),
    "verdict": Saved(verdict, "verdict", fe.Verdict.load, VERDICT),
}

MARKS = ("result", "tuple", "class", "fields", "mapping", "set", "named", "items", "range", "tensor")
"""How `core.saved` writes kinds of values: no fields of anybody's."""


def places(value: Any, at: Steps = ()) -> Iterator[Steps]:
    """Where something stands in a header: each field, and the first of each list."""
    yield at
    if isinstance(value, dict):
        for name, each in value.items():
            yield from places(each, (*at, name))
    if isinstance(value, list) and value:
        yield from places(value[0], (*at, 0))


def found_at(header: Any, at: Steps) -> Any:
    for step in at:
        header = header[step]
    return header


def mutations(header: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Steps, Any, Any]]:
    """(what was done, where, a header, tensors) of a file with one thing wrong."""
    for at in places(header):
        if not at or "after" in at:  # what was measured after a change is of the same classes as what was before
            continue
        was = found_at(header, at)
        wrong: dict[str, Any] = {"None": None, "another kind": " text" if not isinstance(was, str) else 0.5}
        if isinstance(was, float):
            wrong["NaN"] = NAN
        for what, value in wrong.items():
            if value != was:
                changed = copy.deepcopy(header)
                found_at(changed, at[:-1])[at[-1]] = value
                yield what, at, changed, tensors
        if isinstance(at[-1], str):
            changed = copy.deepcopy(header)
            del found_at(changed, at[:-1])[at[-1]]
            yield "removed", at, changed, tensors
    for name, tensor in tensors.items():
        if ".after." in name or re.search(r"\.attacks\[[1-9]", name):
            continue
        yield "removed", (name,), header, {key: each for key, each in tensors.items() if key != name}
        other = tensor.long() if tensor.is_floating_point() else tensor.double()
        wrong = {"another type": other, "another axis": tensor[None].clone()}
        if tensor.is_floating_point() and tensor.numel():
            for what, value in (("NaN", NAN), ("infinite", math.inf)):
                wrong[what] = tensor.clone()
                wrong[what].view(-1)[0] = value
        for what, each in wrong.items():
            yield what, (name,), header, tensors | {name: each}


@pytest.mark.parametrize("name", SAVED)
def test_one_thing_wrong_is_refused_by_the_names_of_the_file_and_of_the_field(name, tmp_path):
    if name == "verdict" and not tiny.HAS_HOOKED:
        pytest.skip(
            "where each call's types are checked too it takes a minute; the other generation reads the same files"
        )
    of, path, wrong = SAVED[name], tmp_path / "a.safetensors", tmp_path / "wrong.safetensors"
    of.make().save(path)
    header, tensors = files.read(path, of.what)
    files.write(wrong, of.what, header, tensors)
    of.load(wrong)  # a file that is put together anew, with nothing wrong, is read
    done = dict.fromkeys(("None", "another kind", "removed", *(("another type", "another axis") if tensors else ())), 0)
    silent, unnamed = [], []
    for what, at, changed, others in mutations(header, tensors):
        done[what] = done.get(what, 0) + 1
        fields = [str(step) for step in at if step not in MARKS]
        where = ".".join(fields)
        files.write(wrong, of.what, changed, others)
        try:
            of.load(wrong)
        except ValueError as error:  # no other error passes
            named = [field for field in re.split(r"[.\[\]']+", where) if field and not field.isdigit()]
            said = [field for field in named[-2:] if field in str(error)]  # of tensors of one shape one is named
            if "wrong.safetensors doesn't hold a valid" not in str(error) or (named and not said):
                unnamed.append((what, where, str(error)))
        else:
            if not re.fullmatch(of.fine.get(what, "$^"), where):
                silent.append((what, where))
    assert not silent and not unnamed
    assert all(done.values())  # each was tried
