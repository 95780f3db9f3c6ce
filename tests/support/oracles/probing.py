"""Probes as written: one row, one object, one label at a time, with plain inverses.

Discriminant analysis (Friedman 1989, γ alone; uniform priors): with m_k the mean of class k, and Σ the mean of the
classes' covariances, each divided by its number of rows::

    Σ_α = (1 − α) Σ + α tr(Σ)/d · 1
    δ_k(x) = xᵀ Σ_α⁻¹ m_k − ½ m_kᵀ Σ_α⁻¹ m_k + log 1/K

LEACE (Belrose et al. 2023, arXiv:2306.03819, theorem 4.3)::

    r(x) = x − W⁺ P W (x − E x),   W = (Σ_xx^½)⁺,   P = (W Σ_xz)(W Σ_xz)⁺

A permutation test: the share of all labellings that permute the labels and call no fact's new object its old one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def states(model: Any, ids: Tensor, positions: Sequence[int], names: Sequence[str]) -> Tensor:
    """What TransformerLens itself keeps of one prompt, [name position d_model]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(ids[None], names_filter=list(names))
    return torch.stack([cache[name][0, list(positions)] for name in names])


def standardised(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, as if every class had as many rows."""
    classes = range(int(y.max()) + 1)
    mean = np.mean([x[y == k].mean(0) for k in classes], 0)
    variance = np.mean([((x[y == k] - mean) ** 2).mean(0) for k in classes], 0)
    return mean, np.sqrt(variance)


def discriminants(x: np.ndarray, y: np.ndarray, alpha: float, queries: np.ndarray) -> np.ndarray:
    """δ_k of each query, [query class]; inputs are used as they are."""
    classes = range(int(y.max()) + 1)
    d = x.shape[1]
    means = [x[y == k].mean(0) for k in classes]
    covariance = np.zeros((d, d))
    for k in classes:
        apart = x[y == k] - means[k]
        covariance += apart.T @ apart / (y == k).sum() / len(classes)
    shrunk = (1 - alpha) * covariance + alpha * np.trace(covariance) / d * np.eye(d)
    inverse = np.linalg.inv(shrunk)
    return np.array(
        [[q @ inverse @ m - 0.5 * m @ inverse @ m + np.log(1 / len(classes)) for m in means] for q in queries]
    )


def percentile(scores: Sequence[float], old: int, new: int | None) -> float:
    """Share of the objects that are neither old nor new which have a lower score; ties count half."""
    points = [
        1.0 if score < scores[old] else 0.5 if score == scores[old] else 0.0
        for k, score in enumerate(scores)
        if k not in (old, new)
    ]
    return sum(points) / len(points)


def permutation_p(scores: np.ndarray, old: Sequence[int], new: Sequence[int | None]) -> np.ndarray:
    """For each cell, the share of all labellings whose best cell's mean percentile is as good as this cell's.

    Args:
        scores: [fact cell object].
        old: Of each fact.
        new: Of each fact.
    """
    cells = range(scores.shape[1])

    def means(labels: Sequence[int]) -> list[float]:
        return [
            float(np.mean([percentile(scores[i, c], labels[i], new[i]) for i in range(len(labels))])) for c in cells
        ]

    here = means(old)
    allowed = [
        labels
        for order in itertools.permutations(range(len(old)))
        if all((labels := [old[j] for j in order])[i] != new[i] for i in range(len(old)))
    ]
    best = [max(means(labels)) for labels in allowed]
    return np.array([np.mean([b >= h - 1e-9 for b in best]) for h in here])


def leace(x: np.ndarray, z: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """r(x) of some queries, fitted on rows x with one-hot objects z."""
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    white = np.linalg.pinv(root, rcond=1e-10)
    cross = white @ ((x - mean).T @ (z - z.mean(0)) / (len(x) - 1))
    onto = cross @ np.linalg.pinv(cross, rcond=1e-6)
    return queries - (queries - mean) @ (np.linalg.pinv(white, rcond=1e-10) @ onto @ white).T


def residual(before: np.ndarray, after: np.ndarray, least: float) -> tuple[float, np.ndarray]:
    """ρ pooled and by cell, from percentiles [fact cell]; NaN where a cell doesn't count."""
    cells = [c for c in range(before.shape[1]) if before[:, c].mean() - 0.5 >= least]
    by_cell = np.full(before.shape[1], np.nan)
    for c in cells:
        by_cell[c] = (after[:, c].mean() - 0.5) / (before[:, c].mean() - 0.5)
    pooled = (np.mean([after[:, c].mean() for c in cells]) - 0.5) / (
        np.mean([before[:, c].mean() for c in cells]) - 0.5
    )
    return float(pooled), by_cell
