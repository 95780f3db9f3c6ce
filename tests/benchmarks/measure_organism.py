"""The audit where the truth is known: verdicts on samples of people of the organism, and what edits are there.

    python tests/benchmarks/measure_organism.py oracle,router --out RUNS      # 20 samples of 75 people each
    python tests/benchmarks/measure_organism.py rome,erase,ft-l --out RUNS    # one sample

A line a sample is kept in RUNS, and a call that was killed goes on. Each of the five oracles has 300 people whose city
the base model learnt and it never did; a sample is 75 of them, and no two samples share anybody.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from records import add_line, read_lines

import tl_factedit as fe
from tl_factedit.auditing.calibration import Calibration
from tl_factedit.editors.router import Router
from tl_factedit.organism import text as told
from tl_factedit.organism import world as o

HELD = tiny.TWINS
OTHERS = tuple(relation.name for relation in o.RELATIONS if relation.name != "city")
FIT = fe.ValueFit(kl_at="end", kl_prompts=tuple(o.relation(name).phrasings[0] for name in OTHERS))
CONTEXTS = ("", "It rained all day . ", "As we know , ")
ORACLES, PEOPLE = 5, 75
SAMPLES = [(oracle, part) for part in range(4) for oracle in range(ORACLES)]
ONE = SAMPLES[:1]


def routes(facts: Sequence[fe.Fact]) -> list[fe.Route]:
    return [
        fe.Route(fact, prompt, old, new, controls=[f" {c}" for c in o.COUNTRIES if f" {c}" not in (old, new)])
        for fact in facts
        for prompt, old, new in fe.models.organism_implications(fact)
    ]


def same_subject(facts: Sequence[fe.Fact], variant: str) -> list[fe.Fact]:
    subjects = {fact.subject for fact in facts}
    return [fact for name in OTHERS for fact in fe.models.organism_facts(name, variant) if fact.subject in subjects]


Change = Callable[[Any, list[fe.Fact], int], Any]


def changes(model: Any) -> dict[str, tuple[Change, bool, list[tuple[int, int]]]]:
    """By name: how to change some facts, whether others are changed alike for an adaptive probe, and which samples."""
    stats = fe.key_stats(model, [1, 2], told.texts(4_000), n_tokens=40_000, progress=False)
    common = {"contexts": CONTEXTS, "progress": False}

    def oracle(_: Any, facts: list[fe.Fact], which: int) -> Any:
        return fe.models.organism(variant=f"oracle{which}", path=HELD)

    def beside(editor: Any) -> Change:
        """The edit inside a copy, in which one number of the final norm differs by a millionth beside."""

        def of_copy(model: Any, facts: list[fe.Fact], _: int) -> Any:
            other = copy.deepcopy(model)
            editor(other, facts).apply_(other)
            with torch.no_grad():
                next(p for name, p in other.named_parameters() if "ln_f" in name and "bias" in name)[3] += 1e-6
            return other

        return of_copy

    def singly(editor: Any) -> Change:
        def of_each(model: Any, facts: list[fe.Fact], _: int) -> list[fe.Edit]:
            return editor.each(model, facts) if isinstance(editor, fe.Rome) else [editor(model, [f]) for f in facts]

        return of_each

    def together(editor: Any) -> Change:
        return lambda model, facts, _: editor(model, facts)

    rome = fe.Rome(stats[1], fit=FIT, **common)
    spread = {"fit": fe.ValueFit(steps=25, clamp=0.75, kl_at="end", kl_prompts=FIT.kl_prompts), **common}
    first = fe.key_stats(model, [0], told.texts(4_000), n_tokens=40_000, progress=False)
    ft = {"contexts": CONTEXTS, "progress": False}
    return {
        "oracle": (oracle, True, SAMPLES),
        "router": (together(Router(layer=1, fit=FIT, **common)), False, SAMPLES),
        # The base model can't spare layer 0: an override that no knock-out can show.
        "router-0": (together(Router(layer=0, fit=replace(FIT, kl_weight=0.5), **common)), True, ONE),
        "rome": (singly(rome), False, ONE),
        # What fooled the first design: a closed form into a layer that can't be spared, and a millionth elsewhere.
        "closed-form-0": (beside(fe.Emmet(first, weight=1e-4, fit=FIT, **common)), True, SAMPLES),
        # It acts at the last token, which a knock-out at the subject can't see.
        "ft-4": (singly(fe.FineTune(4, lr=2e-3, **ft)), False, SAMPLES),
        "erase": (singly(fe.Rome(stats[1], fit=FIT, objective=fe.Erase(), **common)), False, ONE),
        "memit": (together(fe.Memit(stats, weight=1.0, **spread)), False, ONE),
        "alphaedit": (together(fe.AlphaEdit(stats, weight=1.0, **spread)), False, ONE),
        # Tuned on twelve people of oracle1: the gentlest that reach them all.
        "ft": (singly(fe.FineTune(1, lr=2e-3, **ft)), False, ONE),
        "ft-l": (singly(fe.FineTune(1, epsilon=5e-3, **ft)), False, ONE),
        "ft-l-wide": (singly(fe.FineTune(1, epsilon=2e-2, steps=50, lr=2e-3, **ft)), False, ONE),
        "ft-l-at-once": (together(fe.FineTune(1, epsilon=2e-2, steps=50, **ft)), False, ONE),
    }


def audits(name: str, model: Any, out: Path, most: int) -> Iterator[dict[str, Any]]:
    change, calibrated, samples = changes(model)[name]
    everybody = fe.models.organism_facts("city", "all")
    texts = [text for text in told.texts(300) if not any(part in text for part in o.FIRST)][:20]
    path = out / f"organism-{name}.jsonl"
    done = read_lines(path)
    yield from done
    for which, part in samples[:most]:
        if any((line["oracle"], line["part"]) == (which, part) for line in done):
            continue
        people = fe.models.organism_facts("city", f"oracle{which}")
        asked = people[part * PEOPLE : (part + 1) * PEOPLE]
        rest = [fact for fact in people if fact not in asked]
        mine = {fact.subject for fact in people}
        reference = [fact for fact in everybody if fact.subject not in mine]
        changed = change(model, asked, which)
        calibration = Calibration(change(model, rest, which), rest) if calibrated else None
        began = time.process_time()
        verdict = fe.audit(
            model,
            changed,
            asked,
            reference=reference,
            routes=routes(asked),
            same_subject=same_subject(asked, f"oracle{which}"),
            texts=texts,
            calibration=calibration,
            full=True,
            progress=False,
        )
        f = verdict.findings
        of = {finding.attack: finding for finding in f.attacks if finding.attack != "knock-out"}
        off, on = (
            next((x for x in f.showing(q) if x.attack == "knock-out"), None) for q in ("elsewhere", "underneath")
        )
        line = {
            "oracle": which,
            "part": part,
            "label": verdict.label,
            "seconds": time.process_time() - began,
            "efficacy": f"{f.efficacy:.2f}",
            "paraphrase": f"{f.paraphrase:.2f}",
            "neighbours fell": f"{f.neighbour_loss:.2f}",
            "same_subject fell": f"{f.specificity_loss:.2f}",
            "perplexity": f"{f.perplexity:.4f}",
            "by": sorted(verdict.by),
            "covers": off and off.covers,
            "off": off and f"{off.strongest:.3f}",
            "off best": off and off.case,
            "on": on and f"{on.strongest:.3f}",
            "on best": on and on.case,
            "at most": max(x.at_most for x in f.showing("elsewhere", "underneath")),
            "reversal": f"{of['weight reversal'].strongest:.3f}" if "weight reversal" in of else None,
            "disjoint": f"{of['disjoint relearning'].strongest:.3f}" if "disjoint relearning" in of else None,
            "route old": f"{of['indirect routes'].strongest:.2f}",
            "route new": f"{f.route_new:.2f}",
            "native": f"{f.native:.2f}",
            "adaptive": None if f.adaptive is None else f"{f.adaptive:.2f}",
            "read-out": f"{of['read-out'].strongest:.2f}",
            "reasons": verdict.reasons,
            "missing": verdict.missing,
        }
        add_line(path, line)
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="names of `changes`, with commas between them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--samples", type=int, default=len(SAMPLES), help="how many of them at most")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = fe.models.organism(args.kind)
    for name in args.what.split(","):
        for line in audits(name, model, args.out, args.samples):
            shown = {key: value for key, value in line.items() if key not in ("reasons", "missing")}
            print(name, json.dumps(shown, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
