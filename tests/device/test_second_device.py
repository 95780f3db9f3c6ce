"""The second device itself: it refuses planted mix-ups, takes what CUDA takes, and computes what the CPU computes."""

import copy
from contextlib import suppress

import pytest
import second_device
import torch
from torch import nn

DEVICE = second_device.install_or_skip()


def test_values_views_and_what_is_written_in_place():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    d = x.to(DEVICE)
    assert d.device == DEVICE and copy.deepcopy(d).device == DEVICE
    assert torch.equal((d @ d.T).cpu(), x @ x.T)
    for t in (d, x):
        t[1:3].T[0] = 7.0
        t.view(-1)[::2].mul_(2)
    assert torch.equal(d.cpu(), x)
    assert torch.equal(d[d > 0].cpu(), x[x > 0])
    for t in (d, x):
        t[t > 1] = 0
    assert torch.equal(d.cpu(), x)
    assert d.sum().item() == x.sum().item() and d.tolist() == x.tolist()
    assert torch.equal(torch.cat([d, d]).cpu(), torch.cat([x, x]))
    square = x @ x.T + torch.eye(4)
    assert torch.equal(torch.linalg.inv(square.to(DEVICE)).cpu(), torch.linalg.inv(square))
    both = zip(torch.linalg.eigh(square.to(DEVICE)), torch.linalg.eigh(square), strict=True)
    assert all(torch.equal(a.cpu(), b) for a, b in both)
    out = torch.empty(0, device=DEVICE)
    torch.add(d, d, out=out)
    assert torch.equal(out.cpu(), x + x)
    assert torch.equal(d.topk(2).indices.cpu(), x.topk(2).indices)


def zeros(n: int = 3) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, c: d + c,
        lambda d, c: c + d,
        lambda d, c: d @ c,
        lambda d, c: torch.cat([d, c]),
        lambda d, c: torch.where(c > 0, d, d),
        lambda d, c: d.masked_fill(c > 0, 0.0),
        lambda d, c: d.masked_fill_(c > 0, 0.0),
        lambda d, c: d.gather(1, torch.zeros(3, 3, dtype=torch.long)),
        lambda d, c: nn.functional.embedding(zeros(2), d),
        lambda d, c: c[zeros(2).to(DEVICE)],
        lambda d, c: c.add_(d),
        lambda d, c: c[0, 0].add_(d[0, 0]),
        lambda d, c: torch.stack([d[0, 0], c[0, 0]]),
        lambda d, c: torch.randn(3, generator=torch.Generator(), device=DEVICE),
        lambda d, c: d.long() @ d.long(),
        lambda d, c: d + d.to("fakegpu:1"),
        lambda d, c: torch.linalg.solve(d, c),
        lambda d, c: d.index_add(0, zeros(), d),
        lambda d, c: torch.allclose(d, c),
        lambda d, c: torch.equal(d, c),
        lambda d, c: d.index_select(0, zeros()),
        lambda d, c: nn.functional.cross_entropy(d, zeros()),
    ],
)
def test_a_mix_up_is_refused(mix):
    with second_device.watch() as seen, pytest.raises((RuntimeError, TypeError)):
        mix(torch.eye(3, device=DEVICE), torch.eye(3))
    assert seen.refused


def test_numpy_takes_nothing_of_a_device():
    with pytest.raises(TypeError, match="convert"):
        torch.eye(3, device=DEVICE).numpy()


@pytest.mark.parametrize(
    "fine",
    [
        lambda d: d + torch.tensor(2.0),
        lambda d: torch.tensor(2.0) * d,
        lambda d: d[zeros(2)],
        lambda d: d[torch.tensor([True, False, True])],
        lambda d: torch.where(d > 0, d, torch.tensor(1.0)),
        lambda d: d.copy_(torch.zeros(3, 3)),
        lambda d: d.__setitem__(0, torch.ones(3)),
        lambda d: d.masked_fill(d > 0, torch.tensor(2.0)),
        lambda d: torch.randn(3, device=DEVICE),
        lambda d: torch.randn(3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)),
        lambda d: torch.linalg.norm(d) < 1e9,
    ],
)
def test_what_cuda_takes_passes(fine):
    fine(torch.eye(3, device=DEVICE))


def test_gradients_and_an_optimizer():
    def trained(where):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).to(where)
        ids = torch.arange(10, device=where)
        adam = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(5):
            adam.zero_grad()
            nn.functional.cross_entropy(net(ids), ids % 3).backward()
            adam.step()
        return [p.detach().cpu() for p in net.parameters()]

    # Adam goes tensor by tensor on a CPU and by torch._foreach on a device: alike to rounding.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(trained("cpu"), trained(DEVICE), strict=True))


def test_moving_keeps_parameters_themselves_and_tied():
    net = nn.ModuleDict({"a": nn.Embedding(3, 4), "b": nn.Linear(4, 3)})
    net["b"].weight = net["a"].weight
    weight = net["a"].weight
    net.to("fakegpu:1")
    assert net["a"].weight is net["b"].weight is weight and str(weight.device) == "fakegpu:1"


def test_what_happens_is_counted_where_it_happens(tmp_path):
    with second_device.watch("test_second_device") as seen:
        d = torch.eye(3).to(DEVICE)
        float(d.sum())
        d.nonzero()
        d.cpu()
        other = d.to("fakegpu:1")
        with suppress(RuntimeError):
            d + torch.eye(3)  # swallowed, and seen all the same
    assert other.device.index == 1
    assert {kind: seen.count[kind] for kind in ("h2d", "d2h", "p2p", "sync", "refused")} == {
        "h2d": 1, "d2h": 1, "p2p": 1, "sync": 2, "refused": 1,
    }  # fmt: skip
    assert seen.bytes["h2d"] == 36 and seen.operators["aten::nonzero"] == 1
    ((where, why),) = seen.refused
    assert where.endswith("test_what_happens_is_counted_where_it_happens") and "cpu" in why
    torch.save({"a": d}, tmp_path / "x.pt")
    assert torch.equal(torch.load(tmp_path / "x.pt", map_location="cpu")["a"], torch.eye(3))


def test_operators_that_cuda_has_are_known():
    assert {"aten::mm", "aten::index_select", "aten::_softmax"} <= second_device.cuda_operators()
    assert "aten::mkldnn_linear" not in second_device.cuda_operators()
