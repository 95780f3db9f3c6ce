"""Batched, shared and padded likelihoods are those of one prompt and one target at a time."""

import functools

import pytest
import tiny
import torch

from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.measure.likelihood import log_probs

# float32 log-probabilities of size 1 to 10, from batches of another shape
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "bloom", "gemma2")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


REQUESTS = [
    (ids(0, 5, 9), ids(20)),
    (ids(0, 5, 9), ids(21)),  # shares the row of the first
    (ids(0, 5, 9), ids(20, 7, 30)),
    (ids(0, 5, 9, 20), ids(7, 30)),  # the same row again: 0 5 9 20 7
    (ids(0, 44, 45, 46, 47, 48, 49, 50), ids(8)),
    (ids(0), ids(9, 9)),
    (ids(6), ids(5)),  # one token, no BOS
    (ids(0, 5, 9), ids(20)),  # asked twice
]


def loop(model, requests) -> list[torch.Tensor]:
    """Each target token alone: softmax after all that stands before it."""
    found = []
    for prompt, target in requests:
        whole, values = prompt, []
        for token in target:
            with torch.no_grad():
                values.append(model(whole[None])[0, -1].log_softmax(-1)[token])
            whole = torch.cat([whole, token[None]])
        found.append(torch.stack(values))
    return found


def batched(model, requests, **options) -> list[torch.Tensor]:
    with frozen(model), torch.no_grad():
        return log_probs(Runner(model), requests, **options)


@on_models
def test_ragged_requests_are_the_loop_over_prompts_and_tokens(kind, arch):
    model = shared(kind, arch)
    found, want = batched(model, REQUESTS), loop(model, REQUESTS)
    assert [len(values) for values in found] == [len(target) for _, target in REQUESTS]
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert not torch.allclose(found[0], found[1], **CLOSE)


@pytest.mark.parametrize("batch_tokens", [1, 7, 12, 10_000])
@on_models
def test_the_size_of_a_batch_changes_no_number(kind, arch, batch_tokens):
    model = shared(kind, arch)
    for mine, theirs in zip(batched(model, REQUESTS, batch_tokens=batch_tokens), batched(model, REQUESTS), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize(("batch_tokens", "largest"), [(1, 8), (10, 10), (16, 16)])
def test_no_batch_is_larger_than_asked_unless_one_row_is(batch_tokens, largest, monkeypatch):
    sizes, run = [], Runner.logits
    monkeypatch.setattr(
        Runner, "logits", lambda self, tokens, **k: sizes.append(tokens.numel()) or run(self, tokens, **k)
    )
    batched(shared("bridge", "gpt2"), REQUESTS, batch_tokens=batch_tokens)
    assert max(sizes) <= largest
    assert len(sizes) > 1


def test_equal_rows_are_run_once(monkeypatch):
    rows, run = [], Runner.logits
    monkeypatch.setattr(Runner, "logits", lambda self, tokens, **k: rows.append(len(tokens)) or run(self, tokens, **k))
    batched(shared("bridge", "gpt2"), REQUESTS)
    assert sum(rows) == 5  # 8 requests; 0 5 9 is one row for three of them, 0 5 9 20 7 for two
    rows.clear()
    batched(shared("bridge", "gpt2"), [REQUESTS[0], REQUESTS[4]])
    assert sum(rows) == 2


@on_models
def test_the_order_of_requests_is_kept(kind, arch):
    model = shared(kind, arch)
    forward, backward = batched(model, REQUESTS), batched(model, REQUESTS[::-1])
    for mine, theirs in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@on_models
def test_hooks_are_active_during_the_passes_and_gone_after(kind, arch):
    model = shared(kind, arch)
    plain = batched(model, REQUESTS)
    place = "blocks.2.hook_resid_post"
    hooked = batched(model, REQUESTS, hooks=[(place, lambda value, hook: value * 0.5)])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, hooked, strict=True))
    assert torch.equal(batched(model, REQUESTS)[0], plain[0])


def test_no_request_is_no_answer():
    assert batched(shared("bridge", "gpt2"), []) == []
