"""Causal tracing as published, with its settings in one place each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tl_factedit.backend.protocol import Component, Model
from tl_factedit.core.facts import Fact
from tl_factedit.locate.corruption import GaussianNoise
from tl_factedit.locate.replacement import TokenReplacement
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import Trace


def meng2022(
    model: Model,
    facts: Fact | Sequence[Fact],
    component: Component = "resid",
    *,
    prepend_bos: bool | None = False,
    memory: float = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Meng et al. 2022 (arXiv:2202.05262): noise of 3 σ, ten samples of their seed, windows of 10 MLPs or attentions.

    They trace facts that the model answers (`Trace.known` says which) and, with GPT-2's tokenizer, run no BOS.
    """
    return causal_trace(
        model,
        facts,
        component=component,
        window=10 if component in ("mlp", "attn") else 1,
        corruption=GaussianNoise(3.0, samples=10, seed=1),
        prepend_bos=prepend_bos,
        memory=memory,
        folder=folder,
        progress=progress,
    )


def hase2023(
    model: Model,
    facts: Fact | Sequence[Fact],
    component: Component = "mlp",
    *,
    prepend_bos: bool | None = False,
    memory: float = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Hase et al. 2023 (arXiv:2301.04213): as Meng et al., with windows of 5 MLPs.

    What they relate to editing is the largest share of the effect over tokens, `Trace.best_fraction`.
    """
    return causal_trace(
        model,
        facts,
        component=component,
        window=5 if component in ("mlp", "attn") else 1,
        corruption=GaussianNoise(3.0, samples=10, seed=1),
        prepend_bos=prepend_bos,
        memory=memory,
        folder=folder,
        progress=progress,
    )


def zhang2023(
    model: Model,
    facts: Fact | Sequence[Fact],
    component: Component = "mlp",
    *,
    samples: int = 1,
    prepend_bos: bool | None = None,
    memory: float = 2.0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Trace:
    """Zhang and Nanda 2023 (arXiv:2309.16042): symmetric token replacement, logit difference, single layers."""
    return causal_trace(
        model,
        facts,
        component=component,
        corruption=TokenReplacement(samples=samples),
        metric="logit_diff",
        prepend_bos=prepend_bos,
        memory=memory,
        folder=folder,
        progress=progress,
    )
