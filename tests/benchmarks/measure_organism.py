"""The audit where the truth is known: verdicts on samples of people of the organism, by what was done to the model.

    python tests/benchmarks/measure_organism.py oracle,router,closed-form-0 --out RUNS      # up to 20 samples each
    python tests/benchmarks/measure_organism.py all --samples 5 --out RUNS
    python tests/benchmarks/measure_organism.py table --out RUNS                            # labels by row, in markdown

A line a sample is kept in RUNS, and a call that was killed goes on. Each of the five oracles has 300 people whose city
the base model learnt and it never did; a sample is some of them, no two samples of a row share anybody, and the first
five are of one oracle each. All are audited in full.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import overrides
import tiny
import torch
from records import add_line, read_lines

import tl_factedit as fe
from tl_factedit.auditing.gather import with_controls
from tl_factedit.editors.router import Router
from tl_factedit.organism import text as told
from tl_factedit.organism import world as o

HELD = tiny.TWINS
OTHERS = tuple(relation.name for relation in o.RELATIONS if relation.name != "city")
FIT = fe.ValueFit(kl_at="end", kl_prompts=tuple(o.relation(name).phrasings[0] for name in OTHERS))
CONTEXTS = ("", "It rained all day . ", "As we know , ")
ORACLES, PEOPLE, SINGLY = 5, 75, 50
"""Five oracles of 300 people; so many are a sample, and so many where each has an edit of his own."""


Change = Callable[[Any, list[fe.Fact], int], Any]


@dataclass(frozen=True)
class Row:
    """One way to change some facts.

    Attributes:
        change: Of the model, the facts and the oracle that they are of, a change.
        people: How many are a sample.
        calibrated: Whether others are changed alike, for an adaptive decoder.
        world: ``"skewed"``: of the organism whose objects are not equally frequent.
        truth: Whether the truth isn't known beforehand, so that others are taught with ten times the budget.
    """

    change: Change
    people: int = PEOPLE
    calibrated: bool = True
    world: str = "base"
    truth: bool = False

    @property
    def samples(self) -> list[tuple[int, int]]:
        """Oracles and parts of their people; of the skewed organism there is one oracle."""
        oracles = ORACLES if self.world == "base" else 1
        return [(oracle, part) for part in range(300 // self.people) for oracle in range(oracles)][:20]


def rows(model: Any) -> dict[str, Row]:
    """By name; nothing is fitted before it is asked for."""

    @functools.cache
    def stats() -> Any:
        return fe.key_stats(model, [0, 1, 2, 4], told.texts(4_000), n_tokens=40_000, progress=False)

    common = {"contexts": CONTEXTS, "progress": False}
    spread = {"fit": fe.ValueFit(steps=25, clamp=0.75, kl_at="end", kl_prompts=FIT.kl_prompts), **common}
    everybody = fe.models.organism_facts("city", "all")
    other = [fact for name in OTHERS for fact in fe.models.organism_facts(name, "all")]

    def oracle(_: Any, facts: list[fe.Fact], which: int) -> Any:
        return fe.models.organism(variant=f"oracle{which}", path=HELD)

    def skewed(_: Any, facts: list[fe.Fact], which: int) -> Any:
        return fe.models.organism(variant=f"skewed_oracle{which}", path=HELD)

    def together(make: Callable[[], Any]) -> Change:
        return lambda model, facts, _: make()(model, facts)

    def singly(make: Callable[[], Any]) -> Change:
        def of_each(model: Any, facts: list[fe.Fact], _: int) -> list[fe.Edit]:
            editor = make()
            return editor.each(model, facts) if isinstance(editor, fe.Rome) else [editor(model, [f]) for f in facts]

        return of_each

    def beside(make: Callable[[], Any]) -> Change:
        """The edit inside a copy, in which one number of the final norm differs by a millionth beside."""

        def of_copy(model: Any, facts: list[fe.Fact], _: int) -> Any:
            changed = copy.deepcopy(model)
            make()(changed, facts).apply_(changed)
            with torch.no_grad():
                next(p for n, p in changed.named_parameters() if "ln_f" in n and "bias" in n)[3] += 1e-6
            return changed

        return of_copy

    def trained(**options: Any) -> Change:
        def of_copy(model: Any, facts: list[fe.Fact], which: int) -> Any:
            mine = {fact.subject for fact in fe.models.organism_facts("city", f"oracle{which}")}
            rest = [fact for fact in everybody if fact.subject not in mine]
            draw = random.Random(which)
            kept = draw.sample(rest, 300) + draw.sample(other, 300)
            lessons = [(fact, fact.target_new) for fact in facts]
            return overrides.trained(model, lessons, kept, **options)

        return of_copy

    def at_the_end(radius: float) -> Change:
        return lambda model, facts, _: overrides.at_the_end(model, facts, radius)[0]

    def erased_first(model: Any, facts: list[fe.Fact], _: int) -> Any:
        """Erased in every layer that a fact rests on, then written."""
        changed = copy.deepcopy(model)
        layers = {layer: stats()[layer] for layer in (0, 1, 2, 4)}
        fe.Memit(layers, weight=1.0, objective=fe.Erase(), **spread)(changed, facts).apply_(changed)
        fe.Memit(layers, weight=1.0, **spread)(changed, facts).apply_(changed)
        return changed

    def out(*layers: int) -> Callable[[str], bool]:
        return lambda name: any(f".h.{layer}." in name for layer in layers) and "c_proj" in name

    return {
        "untouched": Row(lambda model, facts, _: copy.deepcopy(model), calibrated=False),
        "oracle": Row(oracle),
        "oracle-150": Row(oracle, 150),  # of 75 the bounds are near what an absence may be at most
        "skewed-oracle": Row(skewed, world="skewed"),
        "router": Row(together(lambda: Router(layer=1, fit=FIT, **common)), calibrated=False),
        # The base model can't spare layer 0: an override that no knock-out can show.
        "router-0": Row(together(lambda: Router(layer=0, fit=replace(FIT, kl_weight=0.5), **common))),
        # What fooled the first design: a closed form into a layer that can't be spared, and a millionth elsewhere.
        "closed-form-0": Row(beside(lambda: fe.Emmet({0: stats()[0]}, weight=1e-4, fit=FIT, **common))),
        "rome": Row(singly(lambda: fe.Rome(stats()[1], fit=FIT, **common)), SINGLY, False),
        "memit": Row(together(lambda: fe.Memit({i: stats()[i] for i in (1, 2)}, weight=1.0, **spread))),
        "alphaedit": Row(together(lambda: fe.AlphaEdit({i: stats()[i] for i in (1, 2)}, weight=1.0, **spread))),
        "two-layers": Row(together(lambda: fe.Memit({i: stats()[i] for i in (1, 4)}, weight=1.0, **spread))),
        "erase": Row(singly(lambda: fe.Rome(stats()[1], fit=FIT, objective=fe.Erase(), **common)), SINGLY, False),
        # It acts at the last token, which a knock-out at the subject can't see.
        "ft-4": Row(singly(lambda: fe.FineTune(4, lr=2e-3, **common)), SINGLY, False),
        **{f"last-{radius:g}": Row(at_the_end(radius), 40, False) for radius in (0.05, 0.3, 0.5, 0.7)},
        # One matrix alone, so that the truth is known: all that was written stands in it.
        "attention": Row(trained(steps=200, lr=2e-3, only=lambda n: ".h.4." in n and ".attn.o." in n)),
        "embeddings": Row(trained(steps=200, lr=2e-3, only=lambda n: "wte" in n)),
        # No matrix at all: norms and biases, which dropping directions of matrices doesn't ask.
        "norms": Row(trained(steps=200, lr=5e-3, only=lambda n: "ln" in n or n.endswith("bias"))),
        "ft-out-1": Row(trained(steps=200, lr=1e-3, only=out(1))),
        # Of these the truth isn't known: what teaching others finds with ten times the budget stands beside.
        "tuned-40": Row(trained(steps=40, lr=1e-3), truth=True),
        "tuned-300": Row(trained(steps=300, lr=5e-4), truth=True),
        "ascent-taught": Row(trained(steps=200, lr=5e-4, ascend=60), truth=True),
        "lora": Row(trained(steps=200, lr=3e-3, rank=8), truth=True),
        "erase-insert": Row(erased_first, truth=True),
    }


def audits(name: str, kind: str, out: Path, most: int) -> Iterator[dict[str, Any]]:
    path = out / f"organism-{name}.jsonl"
    done = read_lines(path)
    yield from done
    row = rows(_model(kind, "base"))[name]
    model = _model(kind, row.world)
    texts = [text for text in told.texts(300) if not any(part in text for part in o.FIRST)][:20]
    everybody = fe.models.organism_facts("city", "all", world=row.world)
    for which, part in row.samples[:most]:
        if any((line["oracle"], line["part"]) == (which, part) for line in done):
            continue
        people = fe.models.organism_facts("city", f"oracle{which}", world=row.world)
        asked = people[part * row.people : (part + 1) * row.people]
        mine = {fact.subject for fact in people}
        reference = [fact for fact in everybody if fact.subject not in mine]
        changed = row.change(model, asked, which)
        if name.startswith("last-"):
            asked = [fact.but(paraphrases=(), neighbours=(), neighbour_targets=()) for fact in changed.facts]
        rest = [fact for fact in people if fact.subject not in {fact.subject for fact in asked}][:150]
        calibration = fe.Calibration(row.change(model, rest, which), rest) if row.calibrated else None
        began = time.process_time()
        given = {"reference": reference, "texts": texts, "calibration": calibration, "full": True, "progress": False}
        if not name.startswith("last-"):
            given |= {"routes": fe.models.organism_routes(asked)}
        given |= {"same_subject": fe.models.organism_same_subject(asked, world=row.world)}
        verdict = fe.audit(model, changed, asked, **given)
        line = {
            "oracle": which,
            "part": part,
            "label": verdict.label,
            "by": sorted(verdict.by),
            "seconds": round(time.process_time() - began),
            **told_of(verdict),
        }
        if which == 0 and row.world == "base":  # of whose people there is a model that was never told
            population = fe.Population.of(model, changed, asked, progress=False)
            line["UDS"] = f"{fe.probes.unlearning_depth(population, _model(kind, 'never')).score:.2f}"
        if row.truth:
            population = fe.Population.of(model, changed, [with_controls(f, asked) for f in asked], progress=False)
            best = fe.attacks.DisjointRelearning(lr=(5e-4, 1.5e-3, 5e-3), paraphrases=3, most=1000)(population)
            line["ten times"] = f"{best.strongest:.2f}"
        add_line(path, line)
        yield line


def told_of(verdict: fe.Verdict) -> dict[str, Any]:
    """The numbers that a label rests on."""
    f = verdict.findings
    of = {x.attack: x for x in f.attacks if x.attack not in ("knock-out", "weight reversal")}
    shown = {
        f"{name} {'off' if q == 'elsewhere' else 'on'}": next((x for x in f.showing(q) if x.attack == name), None)
        for name in ("knock-out", "weight reversal")
        for q in ("elsewhere", "underneath")
    }
    return {
        "efficacy": f"{f.efficacy:.2f}",
        "paraphrase": f"{f.paraphrase:.2f}",
        "neighbours fell": f"{f.neighbour_loss:.2f}" if f.neighbour_loss else None,
        "same_subject fell": f"{f.specificity_loss:.2f}" if f.specificity_loss else None,
        "perplexity": f"{f.perplexity:.3f}" if f.perplexity else None,
        **{name: x and f"{x.strongest:.2f} ({x.case})" for name, x in shown.items()},
        **{name: f"{x.strongest:.2f}" for name, x in of.items()},
        "route new": f"{f.route_new:.2f}" if f.route_new else None,
        "at most": max(x.at_most for x in f.showing("elsewhere", "underneath")),
        "native": f"{f.native:.2f}" if f.native else None,
        "adaptive": f"{f.adaptive:.2f}" if f.adaptive else None,
        "control": {name: f"{value:.2f}" for name, value in (f.control or {}).items()},
        "missing": verdict.missing[:3],
    }


def table(out: Path) -> str:
    """How often each label was given, row by row."""
    lines = ["| what was done | samples | labels |", "|---|---|---|"]
    for path in sorted(out.glob("organism-*.jsonl")):
        found = read_lines(path)
        labels = Counter(line["label"] + (f" ({' and '.join(line['by'])})" if line["by"] else "") for line in found)
        told_so = ", ".join(f"{label} {count}" for label, count in labels.most_common())
        lines.append(f"| {path.stem.removeprefix('organism-')} | {len(found)} | {told_so} |")
    return "\n".join(lines)


@functools.cache
def _model(kind: str, variant: str) -> Any:
    return fe.models.organism(kind, variant, path=HELD if variant != "base" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="names of `rows`, with commas between them; all; or table")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--samples", type=int, default=20, help="how many of each at most")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "table":
        print(table(args.out))
        return
    torch.set_num_threads(1)
    names = list(rows(_model(args.kind, "base"))) if args.what == "all" else args.what.split(",")
    for name in names:
        for line in audits(name, args.kind, args.out, args.samples):
            shown = {key: value for key, value in line.items() if key != "missing"}
            print(name, json.dumps(shown, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
