"""What edits are, on SmolLM2: audits of a hundred facts that it knows, edited in several ways.

    python tests/benchmarks/measure_audits.py rome  --data FOLDER --out RUNS
    python tests/benchmarks/measure_audits.py memit --data FOLDER --out RUNS
    python tests/benchmarks/measure_audits.py time  --data FOLDER --out RUNS

FOLDER holds CounterFact (`counterfact_300.json`) and its brief form of EasyEdit (`counterfact_brief_10000.json`), whose
records have no relation: they get that of the record of CounterFact with their prompt. RUNS holds the key statistics of
`measure_editors.py`. What is done is kept there, and a call that was killed goes on.

Edited are facts that the model knows (their old object is the first of all objects of the relation), at most a few of
each relation; the other records of these relations are what knock-outs put in place and what linear probes are trained
on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure_editors import BOS, LAYERS, ROME_LAYER, alignable, known, peak
from tqdm.auto import tqdm

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import continuation, encode
from tl_factedit.measure.likelihood import log_probs

FACTS = 110
OF_A_RELATION = 15
"""Most facts that are edited of one relation."""
REFERENCES = 60
"""A relation with fewer other records isn't taken."""
MOST_REFERENCES = 300


# ------------------------------------------------------------------------------------ what is asked


def with_relations(data: Path) -> list[fe.Fact]:
    """The brief records whose prompt is one of CounterFact's own, with its relation and its paraphrases' templates."""
    relation = {fact.prompt: fact.relation for fact in fe.data.counterfact(data / "counterfact_300.json")}
    facts = fe.data.counterfact_brief(data / "counterfact_brief_10000.json")
    found = [fact.but(relation=relation[fact.prompt]) for fact in facts if fact.prompt in relation]
    objects: dict[Any, dict[str, None]] = defaultdict(dict)
    for fact in found:
        for target in (fact.target_true, fact.target_new):
            objects[fact.relation][target] = None
    return [
        fact.but(controls=[o for o in objects[fact.relation] if o not in (fact.target_true, fact.target_new)])
        for fact in found
    ]


def first_of_all(model: Any, facts: Sequence[fe.Fact]) -> list[fe.Fact]:
    """Facts whose old object's first token comes before those of all other objects of the relation."""
    found = []
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for fact in facts:
            ids, _ = encode(model.tokenizer, fact.text, prepend_bos=BOS)
            offered = [fact.target_true, fact.target_new or "", *fact.controls]
            firsts = [continuation(model.tokenizer, fact.text, text, prepend_bos=BOS)[:1] for text in offered]
            if firsts[0][0] == firsts[1][0]:
                continue
            log_p = log_probs(runner, [(ids, first) for first in firsts])
            best = max(float(each[0]) for each in log_p)
            if float(log_p[0][0]) == best:
                found.append(fact)
    return found


def population(model: Any, data: Path, out: Path) -> tuple[list[fe.Fact], list[fe.Fact]]:
    """The facts to edit, and the references."""
    facts = with_relations(data)
    path = out / "audited.json"
    if not path.exists():
        sizes = Counter(fact.relation for fact in facts)
        order = [fact for fact in facts if sizes[fact.relation] >= REFERENCES]
        random.Random(1).shuffle(order)
        chosen: list[fe.Fact] = []
        count: Counter[Any] = Counter()
        for fact in tqdm(order, desc="known"):
            if len(chosen) == FACTS:
                break
            if count[fact.relation] < OF_A_RELATION and first_of_all(model, known(model, [fact], 1)):
                chosen.append(fact)
                count[fact.relation] += 1
        path.write_text(json.dumps([fact.id for fact in chosen]))
    ids = json.loads(path.read_text())
    by_id = {fact.id: fact for fact in facts}
    chosen = [by_id[i] for i in ids]
    subjects, relations = {fact.subject for fact in chosen}, {fact.relation for fact in chosen}
    others: dict[Any, list[fe.Fact]] = defaultdict(list)
    for fact in facts:
        some = others[fact.relation]
        if fact.subject not in subjects and fact.relation in relations and len(some) < MOST_REFERENCES:
            some += [fact] if alignable(model, fact) else []
    return chosen, [fact for some in others.values() for fact in some]


def same_subject(data: Path, facts: Sequence[fe.Fact]) -> list[fe.Fact]:
    """What CounterFact's other records and ROME's known facts say of the same subjects."""
    subjects, asked = {fact.subject for fact in facts}, {fact.text for fact in facts}
    more = [
        *fe.data.counterfact_brief(data / "counterfact_brief_10000.json"),
        *fe.data.known_facts(data / "known_facts_806.json"),
    ]
    return [fact for fact in more if fact.subject in subjects and fact.text not in asked]


# ------------------------------------------------------------------------------------ with what


def changes(stats: dict[int, fe.KeyStats], model: Any) -> dict[str, tuple[Any, bool]]:
    """Editors by name, and whether each fact gets an edit of its own."""
    quietly = {"progress": False}
    five = stats[ROME_LAYER]
    few = fe.Memit(stats).contexts.draw(model)  # once: each edit would draw the same ones again
    return {
        "rome": (fe.Rome(five, contexts=few, **quietly), True),
        "erase": (fe.Rome(five, contexts=few, objective=fe.Erase(), **quietly), True),
        "ft-l": (fe.FineTune(ROME_LAYER, epsilon=5e-3, prepend_bos=BOS, **quietly), True),
        "memit": (fe.Memit(stats, weight=1_500.0, contexts=few), False),
        "alphaedit": (fe.AlphaEdit(stats, share=0.1, weight=0.1, contexts=few), False),
        "ft-l-at-once": (fe.FineTune(ROME_LAYER, epsilon=5e-3, prepend_bos=BOS), False),
    }


def made(model: Any, editor: Any, singly: bool, facts: Sequence[fe.Fact], folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    if not singly:
        path = folder / "edit.safetensors"
        if not path.exists():
            editor(model, facts).save(path)
        return fe.Edit.load(path)
    paths = {fact: folder / f"edit-{i:03}.safetensors" for i, fact in enumerate(facts)}
    left = [fact for fact in facts if not paths[fact].exists()]
    for begin in range(0, len(left), 20):
        some = left[begin : begin + 20]
        new = editor.each(model, some) if isinstance(editor, fe.Rome) else [editor(model, [fact]) for fact in some]
        for fact, edit in zip(some, new, strict=True):
            edit.save(paths[fact])
    return [fe.Edit.load(path) for path in paths.values()]


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.monotonic(), time.process_time()
    found = run()
    return found, time.monotonic() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = fe.models.smollm2(args.kind)
    stats = {layer: fe.KeyStats.load(args.out / "stats.safetensors", layer=layer) for layer in LAYERS}
    facts, reference = population(model, args.data, args.out)
    beside = same_subject(args.data, facts)
    texts = fe.stats.sample_texts(model, 400, length=50, seed=7, progress=False)  # other ones than the statistics'
    sizes = Counter(fact.relation for fact in facts)
    print(f"{len(facts)} facts of {dict(sizes)}, {len(reference)} references, {len(beside)} same_subject")
    editor, singly = changes(stats, model)["rome" if args.what == "time" else args.what]
    folder = args.out / f"audit-{args.what}"
    if args.what == "time":
        edits = made(model, editor, True, facts[:1], folder)
        verdict, wall, cpu = timed(lambda: fe.audit(model, edits[0], facts[:1], reference=reference, texts=texts))
    else:
        changed = made(model, editor, singly, facts, folder)
        verdict, wall, cpu = timed(
            lambda: fe.audit(
                model, changed, facts, reference=reference, texts=texts, same_subject=beside, folder=folder / "kept"
            )
        )
    print(verdict)
    print(f"{wall:.0f} s, {cpu:.0f} CPU-s, {peak():.1f} GiB")
    for what in ("erasure_success", "attacks", "retention", "specificity", "drift"):
        print(what, getattr(verdict, what))
    for recovery in verdict.attacks:
        print(recovery.table().round(3).to_string())
    (args.out / f"verdict-{args.what}.txt").write_text(f"{verdict}\n{wall:.0f} s, {cpu:.0f} CPU-s\n")


if __name__ == "__main__":
    main()
