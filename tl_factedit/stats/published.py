"""Second moments as the codes of ROME, MEMIT and EasyEdit keep them: ``.npz`` files of sums.

    mom2.mom2   Σ k kᵀ, [d_mlp, d_mlp]          mom2.count   tokens

The files don't say which weights they are of. Only their size can be checked against a model, beside what any second
moment has to be: symmetric, finite, without negative numbers on its diagonal.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SYMMETRIC = 1e-3
"""How much C and Cᵀ may differ, over the largest number of C: their sums are in float32."""


def read_npz(path: Path, size: int) -> tuple[Float[Tensor, "d_mlp d_mlp"], int]:
    """The second moment C = E[k kᵀ] in a published file, float64, and over how many tokens it is.

    Args:
        path: The file.
        size: d_mlp of the layer that it is meant for.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It isn't such a file, or its moment can't be one of this layer.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} doesn't exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, needed an .npz file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} isn't an .npz file (an archive of arrays), or is cut short")
    try:
        with np.load(path, allow_pickle=False) as found:
            if not {"mom2.mom2", "mom2.count"} <= set(found.files):
                raise ValueError(f"it holds {found.files}, needed 'mom2.mom2' and 'mom2.count'")
            total, count = found["mom2.mom2"], found["mom2.count"]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} isn't a file of second moments ({error})") from error
    if total.shape != (size, size):
        raise ValueError(
            f"{path} holds a moment of {total.shape}, but the layer has d_mlp = {size}: it is of another model"
        )
    if count.size != 1 or not np.issubdtype(count.dtype, np.number) or not float(count.item()) >= 1:
        raise ValueError(f"{path} has mom2.count = {count!r}, needed a number of tokens")
    if not np.issubdtype(total.dtype, np.floating) or not np.isfinite(total).all() or (np.diagonal(total) < 0).any():
        raise ValueError(f"{path} holds a moment that is not finite, or has negative numbers on its diagonal")
    moment = torch.from_numpy(total.astype(np.float64)) / float(count.item())
    if float((moment - moment.T).abs().max()) > SYMMETRIC * float(moment.abs().max()):
        raise ValueError(f"{path} holds a matrix that isn't symmetric, which no second moment is")
    return (moment + moment.T) / 2, int(count.item())
