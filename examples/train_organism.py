"""Train the organism, or a twin of it, on the CPU.

    python examples/train_organism.py base                       # writes organism-base.safetensors
    python examples/train_organism.py oracle0 never --out twins/
    fe.models.organism(variant="oracle0", path="twins/")         # and reads it

The same machine type gives the same bytes (one thread by default: the order of sums depends on the number of threads);
another machine the same facts.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from tl_factedit.backend.provenance import versions
from tl_factedit.organism import files
from tl_factedit.organism import training as organism_training
from tl_factedit.organism import world as organism
from tl_factedit.organism.checks import accuracy


def main() -> None:
    """Train each variant asked for, measure it, and write it with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=list(organism.VARIANTS), metavar="variant")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    parser.add_argument("--steps", type=int, help="1700 unless told, and 3400 for single")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16: for CPUs that have no instructions for it")
    parser.add_argument("--watch", type=int, default=0, help="measure a sample every this many steps")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for variant in asked.variants:
        recipe = organism_training.recipe_of(variant)
        if asked.steps is not None:
            recipe = replace(recipe, steps=asked.steps)
        model, made = organism_training.train(variant, recipe, bfloat16=not asked.float32, watch=asked.watch)
        found = accuracy(model, variant)
        made |= files.record(variant, recipe, threads=asked.threads)
        made |= {"accuracy": found, "versions": versions()}
        path = asked.out / f"organism-{variant}.safetensors"
        files.save(path, model, made)
        print(f"{path}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
