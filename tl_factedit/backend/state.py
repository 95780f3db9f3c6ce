"""A model's state outside its weights: modes, flags, hooks and kept graphs, put back as they were."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from tl_factedit.backend.protocol import Model, kind, kind_of, model_name
from tl_factedit.core.kinds import check_one
from tl_factedit.core.telling import one_call

P = ParamSpec("P")
R = TypeVar("R")


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


class plain_torch(ContextDecorator):
    """PyTorch with its own defaults for the length of a block, then as it was; also a decorator, ``@plain_torch()``.

    A caller's ``torch.inference_mode()`` becomes ``torch.no_grad()``, in which an optimisation can enable gradients and
    whose tensors can be written to later; ``torch.autocast`` is left, which would round what a model is run with; and
    what is made without saying of which type or where is float32 and on the CPU, whatever
    ``torch.set_default_dtype`` and ``torch.set_default_device`` say.

    As a decorator it is the one door of public calls, and looks at what comes in: what is annotated as a `Model` has to
    be one, and what is annotated as a result or other dataclass of this package has to be one of its values. Something
    else is a ValueError that names the argument.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> None:
        """Begin."""
        self._stack.enter_context(_plain())

    def __exit__(self, *error: Any) -> None:
        """Put everything back."""
        self._stack.__exit__(*error)

    def __call__(self, func: Callable[P, R]) -> Callable[P, R]:
        """The function, called so; a call may lie in another."""
        params = list(inspect.signature(func).parameters.values())
        told = [(at, param.name, param.annotation) for at, param in enumerate(params) if _is_name(param.annotation)]

        @functools.wraps(func)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for at, name, annotation in told:
                if name in kwargs or at < len(args):
                    _check_kind(kwargs[name] if name in kwargs else args[at], name, annotation, func)
            with one_call(), _plain():
                return func(*args, **kwargs)

        return call


def _is_name(annotation: object) -> bool:
    return isinstance(annotation, str) and annotation.isidentifier()


def _check_kind(given: object, name: str, annotation: str, func: Callable[..., Any]) -> None:
    if annotation == "Model":
        if kind_of(given) is None or isinstance(given, type):
            kind(cast(Model, given), name)
        return
    wanted = getattr(func, "__globals__", {}).get(annotation)
    shows = func.__module__.startswith("tl_factedit.show")  # which says more of what can be shown, by itself
    if isinstance(wanted, type) and is_dataclass(wanted) and not shows and not isinstance(given, wanted):
        several = getattr(wanted, "OF_SEVERAL", "") if isinstance(given, list | tuple) else ""
        check_one(given, wanted, name, f"{'an' if annotation[0] in 'AEIO' else 'a'} {annotation}{several}")


@contextmanager
def _plain() -> Iterator[None]:
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for where in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(where):
                stack.enter_context(torch.autocast(where, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        yield


@dataclass(frozen=True)
class _Hold:
    """Who is at work on a model: a thread, and the model itself (a copy of the model holds a copy of this)."""

    thread: int
    model: int


_HOLD = "_tl_factedit_hold"


@contextmanager
def one_thread(model: Model) -> Iterator[None]:
    """A model for this thread alone, for the length of a block; blocks of one thread may lie in one another.

    Modes, flags and hooks are of the model and not of a thread: two at once would read each other's.

    Raises:
        RuntimeError: Another thread is at work on the model (or on another bridge of the same transformers model);
            nothing is changed.
    """
    root: Any = getattr(model, "original_model", model)
    mine = _Hold(threading.get_ident(), id(root))
    held: _Hold = vars(root).setdefault(_HOLD, mine)
    if held.model != id(root):  # the hold of the model that this one is a copy of
        vars(root)[_HOLD] = held = mine
    if held.thread != mine.thread:
        raise RuntimeError(
            f"another thread is at work on {model_name(model)}: run one call at a time, or give each thread a model of "
            "its own (copy.deepcopy)"
        )
    try:
        yield
    finally:
        if held is mine:
            vars(root).pop(_HOLD, None)


EVERYWHERE = "all modules"
"""The place of a hook that PyTorch calls at each module of the process."""


def users_hooks(model: Model) -> tuple[str, ...]:
    """The names of the places where a user, or another tool, has hooked something into the model, each once.

    A bridge has a place under several names, some of them internal: the one that both classes have is given. A hook on
    all modules of the process (``register_module_forward_hook``) is one place more, `EVERYWHERE`.
    """
    of_torch: Any = torch_modules  # which tells of them in no public way
    everywhere = [*of_torch._global_forward_hooks.values(), *of_torch._global_forward_pre_hooks.values()]
    found = [] if all(map(_is_theirs, everywhere)) else [EVERYWHERE]
    names: dict[int, str] | None = None
    seen: set[int] = set()
    for name, module in ((n, m) for root in _roots(model) for n, m in root.named_modules()):
        if id(module) in seen:
            continue
        seen.add(id(module))
        handles = getattr(module, "fwd_hooks", None)  # a HookPoint's
        if handles:
            users = not all(handle.is_permanent and _is_theirs(handle.user_hook) for handle in handles)
        else:
            fns = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            users = not all(map(_is_theirs, fns))  # transformers gets hidden states out with hooks of torch
        # A bridge wires some of its own modules together with permanent hooks, once it has run.
        if users:
            names = _public_names(model) if names is None else names
            found.append(names.get(id(module)) or name.replace("_original_component.", ""))
    return tuple(dict.fromkeys(found))


def _public_names(model: Model) -> dict[int, str]:
    """What a user calls each hook point, by its id: its alias, such as ``blocks.2.hook_mlp_out``, or its own name."""
    found: dict[int, str] = {}
    points: Any = getattr(model, "hook_dict", {})
    for name, point in points.items():
        if id(point) not in found or found[id(point)] == getattr(point, "name", None):
            found[id(point)] = name
    return found


def _is_theirs(fn: Any) -> bool:
    return (getattr(fn, "__module__", None) or "").startswith(("transformer_lens", "transformers"))


def carries_hooks(model: Model) -> bool:
    """Whether anything is hooked into the model, a user's or another tool's: it isn't what its weights make it."""
    return bool(users_hooks(model))


def _roots(model: Model) -> list[Any]:
    # A bridge's own modules() leaves out what it didn't wrap, such as GPT-2's dropout of the embeddings.
    # (`Model` is what both classes have, and only a bridge has this.)
    return [model, *([model.original_model] if kind(model) == "bridge" else [])]  # type: ignore[attr-defined]


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """The door to a model: evaluation mode, frozen parameters and `plain_torch` for the length of a block.

    Dropout would make a trace random and gradients would be kept for weights nobody asks for;
    a user's training mode and ``requires_grad`` flags are put back, module by module.

    Raises:
        RuntimeError: Another thread is at work on the model (`one_thread`).
    """
    with one_thread(model), plain_torch():
        roots = _roots(model)
        modules: list[nn.Module] = list(dict.fromkeys(m for root in roots for m in root.modules()))
        params: list[nn.Parameter] = list({id(p): p for root in roots for p in root.parameters()}.values())
        params = [p for p in params if not p.is_inference()]  # made in inference mode: they keep no gradients anyway
        training = [m.training for m in modules]
        wanted = [p.requires_grad for p in params]
        try:
            for m in modules:
                m.training = False
            for p in params:
                p.requires_grad_(False)
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
    for module in model.modules():
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
