"""From a fact to a verdict: trace it, edit it, audit the edit, undo it, and write report.html.

python examples/quickstart.py                          SmolLM2-135M, no hub needed
python examples/quickstart.py --kind hooked            as a HookedTransformer (TransformerLens 3)
python examples/quickstart.py --model gpt2-xl          any model of the hub, where it can be reached
"""

import argparse
import sys
import time

import pandas as pd
import torch

import tl_factedit as fe

FACT = fe.Fact(
    "The Eiffel Tower",
    "{} is located in the city of",
    target_true=" Paris",
    target_new=" Rome",
    paraphrases=["{} can be found in the city of", "To see {}, tourists travel to the city of"],
    neighbours=[
        "The Louvre is located in the city of",
        "Notre-Dame is located in the city of",
        "The Prado Museum is located in the city of",
        "Big Ben is located in the city of",
        "The Brandenburg Gate is located in the city of",
    ],
    neighbour_targets=[" Paris", " Paris", " Madrid", " London", " Berlin"],
    controls=[
        " London",
        " Berlin",
        " Madrid",
        " Vienna",
        " Moscow",
        " Athens",
        " Tokyo",
        " Cairo",
        " Lisbon",
        " Prague",
    ],
    relation="city of a landmark",
)

# Layers that were edited in publications or in our own measurements; elsewhere a third of the way up.
LAYERS = {"smollm2": 5, "gpt2-medium": 8, "gpt2-large": 12, "gpt2-xl": 17, "EleutherAI/gpt-j-6b": 5}


def main() -> int:
    """Run the whole road; returns the process's exit status."""
    args = parse()
    try:
        print(f"Loading {args.model} as a {'HookedTransformer' if args.kind == 'hooked' else 'TransformerBridge'} …")
        model = fe.models.load(args.model, kind=args.kind)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"Can't load it: {error}", file=sys.stderr)
        return 1

    layer = args.layer if args.layer is not None else LAYERS.get(args.model, model.cfg.n_layers // 3)
    heading(f"1. Locate: which states, restored, bring back {FACT.target_true!r}?")
    trace = fe.causal_trace(model, FACT)
    print(trace)
    start, stop = trace.subject[0]
    for position in range(start, stop):
        effect, best = trace.effect[0, :, position].max(0)
        print(f"  {trace.tokens[0][position]!r:>10}  largest effect {float(effect):+.3f}, after layer {int(best)}")

    heading(f"2. Statistics: which keys does layer {layer} hold already?")
    stats = fe.key_stats(model, [layer], fe.data.python_manual(), n_tokens=10 * model.cfg.d_mlp)
    print(stats[layer])

    heading(f"3. Edit: {FACT.text} …{FACT.target_new}")
    weights = [p.detach().clone() for p in model.parameters()]
    logits = model(FACT.text).detach()
    edit = fe.Rome(stats)(model, [FACT])
    print(edit)
    before = fe.evaluate(model, [FACT])
    edit.apply_(model)
    after = fe.evaluate(model, [FACT])
    edit.undo_(model)
    print(before_and_after(before, after).to_string(index=False))

    heading("4. Audit: what did the edit change, and what did it leave?")
    verdict = fe.audit(model, edit, [FACT], reference=fe.data.world())
    print(verdict)

    heading("5. Undo")
    same = all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    same_logits = torch.equal(logits, model(FACT.text).detach())
    print(f"weights bit-identical to before: {same}; logits bit-identical: {same_logits}")

    fe.show.report(
        args.report,
        ("Locate", trace),
        ("What the edit changed", fe.show.scores(before, after)),
        (
            "Where the edit fires",
            fe.show.edit(model, edit, f"{FACT.text} Rome. The Louvre is located in the city of Paris."),
        ),
        ("Audit", verdict),
        title=f"{FACT.text}:{FACT.target_true} →{FACT.target_new}, {args.model} ({args.kind})",
    )
    print(f"\n{args.report} opens in any browser, offline. {time.perf_counter() - BEGAN:.0f} s in all.")
    return 0 if same and same_logits else 1


def before_and_after(before: fe.Scores, after: fe.Scores) -> pd.DataFrame:
    """Probabilities of both objects on every prompt, before and after."""
    was, now = before.table(), after.table()
    return was[["ask", "prompt", "true"]].assign(
        **{
            "p(true) before": was["p_true"].round(3),
            "after": now["p_true"].round(3),
            f"p({FACT.target_new.strip()}) before": was["p_new"].round(3),
            "after ": now["p_new"].round(3),
        }
    )


def heading(text: str) -> None:
    """Print a heading with the seconds so far."""
    print(f"\n[{time.perf_counter() - BEGAN:4.0f} s] {text}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), or a model's name on the hub")
    parser.add_argument("--kind", default="bridge", choices=["bridge", "hooked"], help="which TransformerLens class")
    parser.add_argument("--layer", type=int, help="layer to edit (default: a published one, or a third of the way up)")
    parser.add_argument("--report", default="report.html", help="where to write the report")
    return parser.parse_args()


if __name__ == "__main__":
    BEGAN = time.perf_counter()
    sys.exit(main())
