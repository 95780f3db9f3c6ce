"""Every editor writes its update the right way round, also where no shape tells which way that is."""

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.weights import down_proj

FIT = fe.ValueFit(steps=4, clamp=0.75)
OPTIONS = {"fit": FIT, "contexts": laws.CONTEXTS, "progress": False}
EDITORS = {
    "rome": lambda stats: fe.Rome(stats[1], **OPTIONS),
    "memit": lambda stats: fe.Memit(stats, weight=1.0, **OPTIONS),
    "emmet": lambda stats: fe.Emmet(stats, **OPTIONS),
    "alphaedit": lambda stats: fe.AlphaEdit(stats, share=0.1, weight=1e-3, **OPTIONS),
    "pmet": lambda stats: fe.Pmet(stats, weight=1.0, **OPTIONS),
    "fine-tuning": lambda stats: fe.FineTune(1, steps=4, lr=0.05, progress=False),
    "knowledge neurons": lambda stats: fe.KnowledgeNeurons(layers=1, steps=4, progress=False),
}


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("d_mlp", [16, 32], ids=["fewer keys than values", "square"])
def test_the_update_answers_keys_and_not_values(kind, arch, d_mlp, name):
    """GPT-2 stores W_out as [d_mlp, d_model], Llama as its transpose; where both are 32 no shape tells."""
    model = tiny.model(kind, arch, d_mlp=d_mlp)
    stats = {layer: laws.stats(model, layer) for layer in (1, 2)}
    edit = EDITORS[name](stats)(model, [laws.FACT])
    site, delta, key = down_proj(model, 1), edit.deltas[0], edit.keys[1]
    ids = model.to_tokens(laws.FACT.text, prepend_bos=True)[0].tolist()
    seen, before = editing.key_and_value(model, 1, ids, 3)
    was = site.value(key)
    with edit.applied(model):
        after = editing.key_and_value(model, 1, ids, 3)[1]
        moved = site.value(key) - was
    scale = float(moved.abs().max())
    assert scale > 1e-3 and (after - before).norm() > 0.01 * scale
    torch.testing.assert_close(moved, key @ delta.dense, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close((after - before).double(), seen.double() @ delta.dense, rtol=1e-3, atol=1e-3 * scale)
    if d_mlp == 32:
        assert not torch.allclose(moved, key @ delta.dense.T, atol=0.1 * scale)
