"""Time and memory of models that don't fit here: from shapes, and from what one or two of their blocks take here.

    PYTHONPATH=. python tests/benchmarks/big_models.py [--threads 1] [--no-70b]

Measured, on this machine: the FLOP/s of one or two blocks of the real shape with random weights, run by the package
(a pass, and a step of a value's descent), those of float64's Cholesky factor and sums of outer products at two sizes,
and how fast weights are hashed. Reckoned from these: all else. It prints the tables of docs/big-models.md.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny

import tl_factedit as fe
from tl_factedit.backend.hashing import sums
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.solve import cholesky
from tl_factedit.editing.descent import FitRows

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A model's shape; `matrices` is how many of d_model × d_mlp its MLP has."""

    kind: str
    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    matrices: int
    vocab: int
    edited: int

    @property
    def block(self) -> int:
        """Weights of a block."""
        head = self.d_model // self.heads
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.kv_heads * head
        return attention + self.matrices * self.d_model * self.d_mlp

    @property
    def weights(self) -> int:
        """All weights, with an unembedding of its own."""
        return self.layers * self.block + 2 * self.vocab * self.d_model


SHAPES = {
    "GPT-J-6B": Shape("gptj", 28, 4096, 16384, 16, 16, 2, 50_400, 8),
    "Llama-3-8B": Shape("llama", 32, 4096, 14336, 32, 8, 3, 128_256, 8),
    "Llama-3-70B": Shape("llama", 80, 8192, 28672, 64, 8, 3, 128_256, 20),
}
TOKENS, SUBJECT, SAMPLES, CONTEXTS, STEPS = 12, 4, 10, 6, 25
"""A prompt's tokens, those from the subject's first on are TOKENS − 2; a subject's; noise samples; MEMIT's."""


AUDIT = 10_400
"""Tokens that an audit of one edit runs through the whole model: counted on the organism, as it comes, with 200 facts
for reference (31.0 GFLOP over twice the 1.49 million weights of its blocks)."""


def blocks(shape: Shape, count: int, dtype: torch.dtype) -> Any:
    """Some blocks of a shape with random weights, as a bridge, with a vocabulary of a hundred words."""
    tok = tiny.tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tok), "hidden_size": shape.d_model, "n_embd": shape.d_model, "num_hidden_layers": count,
        "n_layer": count, "num_attention_heads": shape.heads, "n_head": shape.heads, "n_inner": shape.d_mlp,
        "intermediate_size": shape.d_mlp, "num_key_value_heads": shape.kv_heads, "rotary_dim": 64,
        "max_position_embeddings": 512, "n_positions": 512,
        "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
    }  # fmt: skip
    names = ("n_embd", "n_layer", "n_head", "n_inner", "rotary_dim", "n_positions") if shape.kind == "gptj" else (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_key_value_heads",
        "max_position_embeddings",
    )  # fmt: skip
    every = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = transformers.AutoConfig.for_model(shape.kind, **{name: sizes[name] for name in (*every, *names)})
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    hf.config.architectures = [type(hf).__name__]
    return tiny.around(hf, tok)


def seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def best(run: Callable[[], object], times: int = 2) -> float:
    """The least of some runs: others use this machine, too."""
    return min(seconds(run) for _ in range(times))


# ------------------------------------------------------------------------------------ measured


def measure_blocks(name: str, shape: Shape, count: int, dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of a pass of 256 tokens, and of a value's step (12 tokens a context), and what both are of."""
    model = blocks(shape, count, dtype)
    flop = 2 * count * shape.block

    def forward() -> None:
        with frozen(model), torch.no_grad():
            Runner(model).logits(torch.randint(4, 100, (4, 64)), at=torch.full((4, 1), 63))

    fact = fe.Fact("The Eiffel Tower", "{} is in the city of", " Paris", " Rome")
    contexts = ("", *("John lives in Rome . ",) * (CONTEXTS - 1))

    def fit(steps: int) -> Callable[[], object]:
        how = fe.ValueFit(steps=steps, stop_below=0.0, kl_prompts=())
        return lambda: fe.editing.fit_values(
            model, [fact], 0, contexts, where="mlp", fit=how, prepend_bos=True, progress=False
        )

    found = {"forward": 256 * flop / best(forward) / 1e9}
    if count > 1:
        rows = FitRows.of(model, fe.editing.EditTarget(fact), contexts, fe.ValueFit(kl_prompts=()), True)
        queries = sum(rows.queries)  # the tokens from the subject's last one on
        a_step = (best(fit(4)) - best(fit(2))) / 2
        found["step"] = 2 * queries * flop * (count - 1) / count / a_step / 1e9
    print(f"{name}, {count} blocks, {str(dtype)[6:]}: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in found.items()))
    del model
    gc.collect()
    return found


def measure_algebra() -> dict[str, float]:
    """GFLOP/s of float64's Cholesky factor and of sums of outer products, and GB/s of hashing."""
    found: dict[str, float] = {}
    for size in (4096, 8192):
        keys = torch.randn(1024, size, dtype=torch.float64)
        total = torch.zeros(size, size, dtype=torch.float64)
        sum_time = best(lambda total=total, keys=keys: total.addmm_(keys.T, keys))
        total.diagonal().add_(size)
        time_ = best(lambda total=total: cholesky(total), 1)
        found[f"cholesky {size}"] = size**3 / 3 / time_ / 1e9
        found[f"sums {size}"] = 2 * 1024 * size**2 / sum_time / 1e9
        print(f"d_mlp {size:,}: factor {time_:.1f} CPU-s, {found[f'cholesky {size}']:.1f} GFLOP/s; "
              f"a thousand keys {sum_time:.1f} CPU-s, {found[f'sums {size}']:.1f} GFLOP/s")  # fmt: skip
    weight = torch.randn(64 << 20)
    found["hash"] = weight.nbytes / best(lambda: sums([weight])) / 1e9
    print(f"hashing {found['hash']:.1f} GB/s")
    return found


# ------------------------------------------------------------------------------------ reckoned


def reckon(shape: Shape, rate: float, step: float, algebra: dict[str, float]) -> dict[str, str]:
    """A row of the page: times with these rates (GFLOP/s), and memory, from the shape alone."""
    above, layer = shape.layers - shape.edited - 1, shape.edited
    cells = (TOKENS - 2) * (TOKENS - 1) / 2 * SAMPLES  # tokens that all cells of one layer run
    trace = 2 * shape.block * cells * shape.layers * (shape.layers - 1) / 2
    moment = 8 * shape.d_mlp**2
    stats = 100_000 * 2 * (layer + 1) * shape.block
    outer = 100_000 * 2 * shape.d_mlp**2
    queries = CONTEXTS * (TOKENS - SUBJECT)
    value = (2 * STEPS - 1) * 2 * queries * above * shape.block + 2 * CONTEXTS * TOKENS * shape.layers * shape.block
    factor = shape.d_mlp**3 / 3 / algebra["cholesky 8192"] / 1e9

    def time_of(flop: float, at: float) -> str:
        spent = flop / at / 1e9
        return f"{spent:,.0f} s" if spent < 600 else f"{spent / 3600:,.1f} h"

    return {
        "weights in bf16": f"{2 * shape.weights / 1e9:,.0f} GB",
        "C of a layer": f"{moment / 1e9:.2f} GB",
        "C and its factors, five layers": f"{10 * moment / 1e9:.0f} GB",
        "a trace": f"{trace / 1e12:,.0f} TFLOP, {time_of(trace, rate)}",
        "100,000 tokens, one layer": f"{(stats + outer) / 1e12:,.0f} TFLOP, "
        f"{time_of(stats, rate)} + {time_of(outer, algebra['sums 8192'])}",
        "a MEMIT value": f"{value / 1e12:.1f} TFLOP, {time_of(value, step)}",
        "an audit": f"{2 * AUDIT * shape.layers * shape.block / 1e12:,.0f} TFLOP, "
        f"{time_of(2 * AUDIT * shape.layers * shape.block, rate)}",
        "a factor": f"{shape.d_mlp**3 / 3e12:.2f} TFLOP, {factor:,.0f} s",
        "a fingerprint": f"{2 * shape.weights / 1e9 / algebra['hash']:,.0f} s",
        "a pass of 4,096 tokens": f"{2 * 4096 * shape.layers * shape.block / 1e12:,.0f} TFLOP, "
        f"{time_of(2 * 4096 * shape.layers * shape.block, rate)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-70b", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    algebra = measure_algebra()
    rows: dict[str, dict[str, str]] = {}
    share = 0.0
    for name, shape in SHAPES.items():
        large = name.endswith("70B")
        if large and args.no_70b:
            continue
        # Two blocks, so that there is one above the edit; of the largest one, as two take 8 GiB in float32.
        measured = measure_blocks(name, shape, 1 if large else 2, torch.bfloat16)
        exact = {} if large else measure_blocks(name, shape, 2, torch.float32)
        rate = max(measured["forward"], exact.get("forward", 0.0))
        share = max(measured["step"], exact["step"]) / rate if not large else share  # of the model before
        step = share * rate
        rows[name] = reckon(shape, rate, step, algebra)
        print(f"{name}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most", flush=True)
    print("\n| | " + " | ".join(rows) + " |\n|---" * 1 + "|---" * len(rows) + "|")
    for what in next(iter(rows.values())):
        print(f"| {what} | " + " | ".join(row[what] for row in rows.values()) + " |")


if __name__ == "__main__":
    main()
