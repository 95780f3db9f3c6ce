"""A model's state outside its weights: modes, flags, hooks and kept graphs, put back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tl_factedit.backend.protocol import Model, kind


def finish_despite_interrupt(finish: Callable[[], None]) -> None:
    """Run what puts something back; if it is interrupted, once more, and only then does the interrupt go on.

    Args:
        finish: May be run twice, and does the rest the second time.
    """
    try:
        finish()
    except BaseException:
        finish()
        raise


def carries_hooks(model: Model) -> bool:
    """Whether anything is hooked into the model, a user's or another tool's: it isn't what its weights make it."""
    roots: list[Any] = [model, *([model.original_model] if kind(model) == "bridge" else [])]  # type: ignore[attr-defined]
    for module in (m for root in roots for m in root.modules()):
        if getattr(module, "fwd_hooks", None):  # a HookPoint's
            return True
        # A bridge wires some of its own modules together with hooks of torch once it has run, and transformers gets
        # hidden states out in that way.
        fns = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not getattr(fn, "__module__", "").startswith(("transformer_lens", "transformers")) for fn in fns):
            return True
    return False


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode and frozen parameters for the length of a block, then everything as it was.

    Dropout would make a trace random and gradients would be kept for weights nobody asks for;
    a user's training mode and ``requires_grad`` flags are put back, module by module. A caller's
    ``torch.inference_mode()`` becomes ``torch.no_grad()``, in which an optimisation can enable gradients.
    """
    # A bridge's own modules() leaves out what it didn't wrap, such as GPT-2's dropout of the embeddings.
    roots: list[Any] = [model, *([model.original_model] if kind(model) == "bridge" else [])]  # type: ignore[attr-defined]
    modules: list[nn.Module] = list(dict.fromkeys(m for root in roots for m in root.modules()))
    params: list[nn.Parameter] = list({id(p): p for root in roots for p in root.parameters()}.values())
    training = [m.training for m in modules]
    wanted = [p.requires_grad for p in params]
    try:
        for m in modules:
            m.training = False
        for p in params:
            p.requires_grad_(False)
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            yield
    finally:

        def put_back() -> None:
            for m, flag in zip(modules, training, strict=True):
                m.training = flag
            for p, flag in zip(params, wanted, strict=True):
                p.requires_grad_(flag)

        finish_despite_interrupt(put_back)


def detach_caches(model: Model) -> None:
    """Detach what the model's modules keep of the last forward pass.

    The attention of a TransformerBridge keeps its last pattern, with the whole graph behind it: memory
    that is never freed, and a model that ``copy.deepcopy`` refuses.
    """
    for module in model.modules():  # type: ignore[attr-defined]
        for name, kept in list(vars(module).items()):
            if isinstance(kept, Tensor) and kept.grad_fn is not None:
                vars(module)[name] = kept.detach()


@contextmanager
def unhooked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Without the hooks that are on some hook points now."""
    hooked = [m for m in modules if getattr(m, "fwd_hooks", None)]
    kept = [vars(m)["_forward_hooks"] for m in hooked]

    def put_back() -> None:
        for m, hooks in zip(hooked, kept, strict=True):
            vars(m)["_forward_hooks"] = hooks

    try:
        for m in hooked:
            vars(m)["_forward_hooks"] = type(vars(m)["_forward_hooks"])()
        yield
    finally:
        finish_despite_interrupt(put_back)
