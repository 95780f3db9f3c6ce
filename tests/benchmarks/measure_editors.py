"""The editors on CounterFact: a table on the same facts, and how each bears more and more edits.

    python tests/benchmarks/measure_editors.py stats  --data FOLDER --out RUNS
    python tests/benchmarks/measure_editors.py tune   --data FOLDER --out RUNS --editors ft-l-2e-3,ft-l-5e-3,ft-l-1e-2
    python tests/benchmarks/measure_editors.py single --data FOLDER --out RUNS --editors rome,rome-original,memit
    python tests/benchmarks/measure_editors.py batch  --data FOLDER --out RUNS --editors memit,alphaedit
    python tests/benchmarks/measure_editors.py curve  --data FOLDER --out RUNS --editors memit,rome
    python tests/benchmarks/measure_editors.py show   --out RUNS

FOLDER holds CounterFact (`counterfact_300.json`) and its brief form of EasyEdit (`counterfact_brief_10000.json`). Every
line that is done is kept in RUNS, and a call that was killed goes on. `tune` is `single` on other facts than the
table's, and keeps its lines in RUNS/tune. Values that don't depend on the editor (of
ROME's variants; of MEMIT, EMMET and AlphaEdit) are fitted once and shared; the times are with the fits that were made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import add_line, read_lines
from tqdm.auto import tqdm

import tl_factedit as fe
from tl_factedit.core import files
from tl_factedit.editing import layerwise
from tl_factedit.editing.value_fit import Fitted
from tl_factedit.editing.values import fit_values
from tl_factedit.editors import rome as rome_module
from tl_factedit.evaluation.scores import Answer, Scores, scores_of

LAYERS = [3, 4, 5, 6, 7]
ROME_LAYER = 5
BOS = False  # as the published codes run
SIZES = (1, 10, 100, 1000)
KINDS = (Fitted,)
AT_ONCE = 40
"""Facts whose values are fitted and kept together."""


# ------------------------------------------------------------------------------------ what is edited


def known(model: Any, facts: Sequence[fe.Fact], count: int) -> list[fe.Fact]:
    """The first facts whose old object the model prefers to the new one, each of another subject."""
    found: list[fe.Fact] = []
    subjects: set[str] = set()
    for i in range(0, len(facts), 64):
        some = [fact for fact in facts[i : i + 64] if alignable(model, fact)]
        bare = [fact.but(paraphrases=[], neighbours=[], neighbour_targets=[]) for fact in some]
        scores = fe.evaluate(model, bare, prepend_bos=BOS)
        for fact, answer in zip(some, scores.answers, strict=True):
            if answer.nll_true < answer.nll_new and fact.subject not in subjects:
                subjects.add(fact.subject)
                found.append(fact)
        if len(found) >= count:
            break
    return found[:count]


def alignable(model: Any, fact: fe.Fact) -> bool:
    """Whether its subject can be found on its tokens, in the prompt and in what guards it."""
    from tl_factedit.core.tokens import align

    try:
        align(model.tokenizer, fact, prepend_bos=BOS)
        align(model.tokenizer, fact, prepend_bos=BOS, template="{} is a")
    except ValueError:
        return False
    return True


def table_facts(model: Any, data: Path) -> list[fe.Fact]:
    return known(model, fe.data.counterfact(data / "counterfact_300.json"), 100)


def tuning_facts(model: Any, data: Path) -> list[fe.Fact]:
    return known(model, fe.data.counterfact(data / "counterfact_300.json"), 120)[100:]


def curve_facts(model: Any, data: Path, out: Path) -> list[fe.Fact]:
    """In one random order; which ones is kept, as asking takes minutes."""
    facts = fe.data.counterfact_brief(data / "counterfact_brief_10000.json")
    random.Random(0).shuffle(facts)
    path = out / "curve_facts.json"
    if not path.exists():
        path.write_text(json.dumps([fact.id for fact in known(model, facts, max(SIZES))]))
    by_id = {fact.id: fact for fact in facts}
    return [by_id[i] for i in json.loads(path.read_text())]


def texts(model: Any, out: Path) -> Iterator[str]:
    """20,000 tokens of the model's own, then Python's manual."""
    path = out / "sampled.json"
    if not path.exists():
        path.write_text(json.dumps(fe.stats.sample_texts(model, 20_000, seed=0)))
    yield from json.loads(path.read_text())
    yield from fe.data.python_manual()


def key_stats(model: Any, out: Path) -> dict[int, fe.KeyStats]:
    return fe.key_stats(
        model, LAYERS, list(texts(model, out)), n_tokens=60_000, prepend_bos=BOS, path=out / "stats.safetensors"
    )


# ------------------------------------------------------------------------------------ with what

Makers = dict[str, Callable[[], Any]]


def editors(stats: dict[int, fe.KeyStats], model: Any) -> Makers:
    five = stats[ROME_LAYER]
    window = fe.FineTune.around(model, ROME_LAYER, 5)
    # Drawn once, and of the unedited model: each edit would draw the same ones again.
    drawn = fe.stats.SampledContexts().draw(model)
    few = fe.Memit(stats).contexts.draw(model)
    rome = {"contexts": drawn, "progress": False}
    silent = {"progress": False}
    # Half as many evaluations of the loss.
    lines = {"method": fe.editing.LineSearch()}
    rome_fit, memit_fit = fe.ValueFit(steps=10, **lines), replace(fe.Memit(stats).fit, steps=12, **lines)
    return {
        "rome": lambda: fe.Rome(five, **rome),
        # With as many contexts as MEMIT has, for a thousand edits one after the other.
        "rome-few": lambda: fe.Rome(five, contexts=few, **silent),
        "rome-few-lines": lambda: fe.Rome(five, contexts=few, fit=rome_fit, **silent),
        "rome-bare": lambda: fe.Rome(five, target_ref="bare", **rome),
        "rome-original": lambda: fe.Rome(five, variant="original", **rome),
        "plain": lambda: fe.Rome(fe.KeyStats.identity(model, ROME_LAYER), prepend_bos=BOS, **rome),
        "memit": lambda: fe.Memit(stats, weight=1_500.0, contexts=few, **silent),
        "memit-lines": lambda: fe.Memit(stats, weight=1_500.0, contexts=few, fit=memit_fit, **silent),
        "memit-15000": lambda: fe.Memit(stats, weight=15_000.0, contexts=few, **silent),
        "emmet": lambda: fe.Emmet(stats, contexts=few, **silent),
        "alphaedit": lambda: fe.AlphaEdit(stats, contexts=few, **silent),
        "alphaedit-light": lambda: fe.AlphaEdit(stats, weight=0.1, contexts=few, **silent),
        "alphaedit-wide": lambda: fe.AlphaEdit(stats, share=0.1, weight=0.1, contexts=few, **silent),
        "pmet": lambda: fe.Pmet(stats, weight=1_500.0, contexts=few, **silent),
        "ft": lambda: fe.FineTune(ROME_LAYER, prepend_bos=BOS, **silent),
        **{
            f"ft-l{len(layers) if len(layers) > 1 else ''}-{epsilon}": partial(
                fe.FineTune, layers, epsilon=float(epsilon), prepend_bos=BOS, **silent
            )
            for layers in ((ROME_LAYER,), window)
            for epsilon in ("5e-4", "1e-3", "2e-3", "5e-3", "1e-2")
        },
        "neurons": lambda: fe.KnowledgeNeurons(prepend_bos=BOS, **silent),
    }


def share_values(model: Any, out: Path) -> None:
    """Fit what is asked for twice once, and keep it: some facts at a time, each time in a file."""
    folder = out / "values"
    folder.mkdir(exist_ok=True)
    kept: dict[Any, Fitted] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, tensors = files.read(path, "fitted values")
        kept |= dict(files.decode(header["fitted"], "fitted", tensors, KINDS))

    def shared(_: Any, targets: Sequence[Any], layer: int, contexts: Sequence[str], **how: Any) -> list[Fitted]:
        same = (layer, tuple(contexts), how.get("where", "mlp"), repr(how["fit"]))
        keys = [(target.fact.text, target.fact.target_new, target.unlikely, *same) for target in targets]
        missing = [i for i, key in enumerate(keys) if key not in kept]
        for begin in tqdm(range(0, len(missing), AT_ONCE), desc="values", disable=len(missing) < 2):
            some = missing[begin : begin + AT_ONCE]
            began = seconds()
            found = fit_values(model, [targets[i] for i in some], layer, contexts, **how | {"progress": False})
            new = {keys[i]: each for i, each in zip(some, found, strict=True)}
            kept.update(new)
            name = hashlib.sha256(repr(sorted(map(repr, new))).encode()).hexdigest()[:16]
            tensors: dict[str, torch.Tensor] = {}
            header = {"fitted": files.encode(list(new.items()), "fitted", tensors, KINDS)}
            files.write(folder / f"{name}.safetensors", "fitted values", header, tensors)
            if len(some) > 1:
                steps = sum(len(each.losses) for each in found) / len(found)
                line = {
                    "values": len(some),
                    "seconds": seconds() - began,
                    "steps": steps,
                    "layer": layer,
                    "peak": peak(),
                }
                add_line(out / "values.log", line)
        return [kept[key] for key in keys]

    layerwise.fit_values = rome_module.fit_values = shared


def fit_ahead(model: Any, editor: Any, facts: Sequence[fe.Fact]) -> None:
    """The values of single ROME edits, many at a time."""
    if isinstance(editor, fe.Rome):
        editor.each(model, facts)
    elif isinstance(editor, (fe.Memit, fe.Emmet, fe.AlphaEdit)):
        editor(model, facts)


# ------------------------------------------------------------------------------------ what comes of it


def rows(scores: Scores, names: Sequence[int]) -> list[list[Any]]:
    return [[names[a.fact], a.ask, a.nll_true, a.nll_new, a.same_first_token] for a in scores.answers]


class Kept:
    """Lines of JSON in one file, each named."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {line["name"]: line for line in read_lines(path)}

    def add(self, name: str, **what: Any) -> None:
        self.done[name] = {"name": name, **what}
        add_line(self.path, self.done[name])


def seconds() -> float:
    return time.process_time()


def peak() -> float:
    """GiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def edit_sizes(edit: fe.Edit) -> dict[str, Any]:
    return {
        "relative_norm": [d.relative_norm for d in edit.diagnostics],
        "unmet": [sum(d.unmet) / len(d.unmet) if d.unmet else 0.0 for d in edit.diagnostics],
        "off_target": [max(d.off_target, default=0.0) for d in edit.diagnostics],
        "held": [fit.get("held") for fit in edit.fits][:3],
        "stopped": [str(fit.get("stopped")) for fit in edit.fits].count("loss"),
    }


def single(
    model: Any, facts: Sequence[fe.Fact], make: dict[str, Callable[[], Any]], names: list[str], out: Path
) -> None:
    """One edit a fact, each scored alone."""
    share_values(model, out)
    before = Kept(out / "before.jsonl")
    if "before" not in before.done:
        before.add("before", answers=rows(fe.evaluate(model, facts, prepend_bos=BOS), range(len(facts))))
    for name in names:
        kept = Kept(out / f"single-{name}.jsonl")
        left = [i for i in range(len(facts)) if str(i) not in kept.done]
        editor = make[name]()
        if left:
            began = seconds()
            fit_ahead(model, editor, [facts[i] for i in left])
            print(f"{name}: values of {len(left)} facts in {seconds() - began:.0f} CPU-s", flush=True)
        for i in tqdm(left, desc=name):
            began = seconds()
            try:
                edit = editor(model, [facts[i]])
            except ValueError as error:  # knowledge neurons: where prompts share none. Nothing is written, so it fails
                print(f"{name}, {facts[i].name}: {error}", flush=True)
                scores = fe.evaluate(model, facts[i], prepend_bos=BOS)
                kept.add(str(i), answers=rows(scores, [i]), seconds=seconds() - began, refused=str(error))
                continue
            made = seconds() - began
            with edit.applied(model):
                scores = fe.evaluate(model, facts[i], prepend_bos=BOS)
            kept.add(str(i), answers=rows(scores, [i]), seconds=made, **edit_sizes(edit))


def batch(
    model: Any, facts: Sequence[fe.Fact], make: dict[str, Callable[[], Any]], names: list[str], out: Path
) -> None:
    """One edit of all facts."""
    share_values(model, out)
    for name in names:
        kept = Kept(out / "batch.jsonl")
        if name in kept.done:
            continue
        began = seconds()
        edit = make[name]()(model, facts)
        made = seconds() - began
        with edit.applied(model):
            scores = fe.evaluate(model, facts, prepend_bos=BOS)
        kept.add(name, answers=rows(scores, range(len(facts))), seconds=made, peak=peak(), **edit_sizes(edit))
        print(name, scores, f"{made:.0f} CPU-s", flush=True)


def curve(
    model: Any, facts: Sequence[fe.Fact], make: dict[str, Callable[[], Any]], names: list[str], out: Path
) -> None:
    """1, 10, 100, 1,000 edits: at once, or for ROME one after the other; scored on what was edited."""
    for name in names:
        kept = Kept(out / f"curve-{name}.jsonl")
        if name == "before":
            if name not in kept.done:
                kept.add(name, answers=rows(fe.evaluate(model, facts, prepend_bos=BOS), range(len(facts))))
        elif name.startswith("rome"):
            one_by_one(model, facts, make[name](), kept, out / f"curve-{name}")
        else:
            began = seconds()
            share_values(model, out)
            for size in sorted(SIZES, reverse=True):  # the largest makes all values
                if str(size) in kept.done:
                    continue
                edit = make[name]()(model, facts[:size])
                made = seconds() - began
                with edit.applied(model):
                    scores = fe.evaluate(model, facts[:size], prepend_bos=BOS)
                kept.add(str(size), answers=rows(scores, range(size)), seconds=made, peak=peak(), **edit_sizes(edit))
                print(name, size, scores, f"{made:.0f} CPU-s so far, {peak():.1f} GiB", flush=True)


def one_by_one(model: Any, facts: Sequence[fe.Fact], editor: fe.Rome, kept: Kept, folder: Path) -> None:
    """Each edit on the weights as the ones before have left them."""
    folder.mkdir(exist_ok=True)
    edits: list[fe.Edit] = []
    spent = 0.0
    try:
        for i, fact in enumerate(tqdm(facts, desc="edits")):
            path = folder / f"{i:04}.safetensors"
            if path.exists():
                edit = fe.Edit.load(path)
            else:
                began = seconds()
                edit = editor(model, [fact])
                spent += seconds() - began
                edit.save(path)
            edit.apply_(model)
            edits.append(edit)
            if i + 1 in SIZES and str(i + 1) not in kept.done:
                scores = fe.evaluate(model, facts[: i + 1], prepend_bos=BOS)
                kept.add(str(i + 1), answers=rows(scores, range(i + 1)), seconds=spent, peak=peak())
                print("one by one", i + 1, scores, f"{spent:.0f} CPU-s, {peak():.1f} GiB", flush=True)
    finally:
        fe.undo_all_(model)


# ------------------------------------------------------------------------------------ tables


def scores_in(lines: Sequence[dict[str, Any]]) -> Scores:
    """Scores from kept answers; facts and provenance don't matter to the numbers."""
    found = [answer for line in lines for answer in line["answers"]]
    place = {fact: i for i, fact in enumerate(sorted({row[0] for row in found}))}
    answers = tuple(Answer(place[f], ask, "", "old", "new", true, new, same, 1, 1) for f, ask, true, new, same in found)
    return scores_of((fe.Fact("x", "{}", " a", " b"),) * len(place), answers, None)  # type: ignore[arg-type]


def show(out: Path) -> None:
    for path in sorted(
        path for name in ("before", "single-*", "batch", "curve-*") for path in out.glob(f"{name}.jsonl")
    ):
        done = Kept(path).done
        groups = (
            {path.stem: list(done.values())}
            if path.stem.startswith("single-")
            else {f"{path.stem} {name}": [line] for name, line in done.items()}
        )
        for name, lines in groups.items():
            s = scores_in(lines)
            spent = sum(line.get("seconds", 0.0) for line in lines)
            norms = [max(line["relative_norm"]) for line in lines if line.get("relative_norm")]
            refused = sum("refused" in line for line in lines)
            print(
                f"{name:28} n {s.efficacy.n:4} | {s.efficacy:.3f} | {s.paraphrase:.3f} | {s.neighbourhood:.3f} | "
                f"{s.score:.3f} | p(new) {s.p_new:.3f} p(old) {s.p_old:.3f} | {spent:.0f} s | "
                f"norm {max(norms, default=0):.3f} | refused {refused} | "
                f"peak {max(line.get('peak', 0.0) for line in lines):.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stats", "tune", "single", "batch", "curve", "show"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--editors", default="")
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "show":
        show(args.out)
        return
    torch.set_num_threads(args.threads)
    model = fe.models.smollm2(args.kind)
    stats = key_stats(model, args.out)
    make = editors(stats, model)
    names = [name for name in args.editors.split(",") if name]
    if args.what == "single":
        single(model, table_facts(model, args.data), make, names, args.out)
    elif args.what == "tune":
        (args.out / "tune").mkdir(exist_ok=True)
        single(model, tuning_facts(model, args.data), make, names, args.out / "tune")
    elif args.what == "batch":
        batch(model, table_facts(model, args.data), make, names, args.out)
    elif args.what == "curve":
        curve(model, curve_facts(model, args.data, args.out), make, names, args.out)


if __name__ == "__main__":
    main()
