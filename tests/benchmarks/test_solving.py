"""How much memory ten thousand keys take: the solution of one layer and its diagnostics, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

KEYS = 10_000
SHAPES = {"SmolLM2": (1_536, 576), "GPT-2 XL": (6_400, 1_600)}
MOST = 8.0  # GiB

SOLVE = """
import resource, time
import torch
from tl_factedit.editing.delta import Delta, LayerUpdate
from tl_factedit.editing.diagnostics import diagnose
from tl_factedit.core.solve import cholesky, least_squares

torch.set_num_threads(1)

class Site:
    def __init__(self, weight):
        self.W, self.layer = weight, 0
    def value(self, keys):
        return keys.double() @ self.W.double()

keys, d_mlp, d_model = {keys}, {d_mlp}, {d_model}
draw = torch.Generator().manual_seed(0)
moment = torch.randn(2 * d_mlp, d_mlp, generator=draw)
moment = (moment.T @ moment / len(moment)).double()
k = torch.randn(keys, d_mlp, generator=draw, dtype=torch.float64)
r = torch.randn(keys, d_model, generator=draw, dtype=torch.float64)
weight = torch.randn(d_mlp, d_model, generator=draw)
began = time.process_time()
lower = cholesky(moment)
factors = least_squares(k, r, lower, 1_500.0)
solved = time.process_time() - began
delta = Delta(0, *factors)
directions = delta.left.T if delta.left.shape[1] == keys else k
found = diagnose(Site(weight), LayerUpdate(delta, k, r, directions))
assert len(found.unmet) == keys and 0 < min(found.unmet) and max(found.unmet) < 1
print(solved, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.parametrize("name", SHAPES)
def test_ten_thousand_keys_fit_into_eight_gib(name, capsys):
    d_mlp, d_model = SHAPES[name]
    code = SOLVE.format(keys=KEYS, d_mlp=d_mlp, d_model=d_model)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    solved, diagnosed, peak = map(float, out.stdout.split())
    with capsys.disabled():
        print(f"\n{KEYS:,} keys in a layer of {name}'s shape, {d_mlp:,} x {d_model:,}, and all of the process:")
        print(f"{solved:.0f} CPU-s solved, {diagnosed:.0f} with diagnostics, {peak:.1f} GiB at most")
    assert peak < MOST
