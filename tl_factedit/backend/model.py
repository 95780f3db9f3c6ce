"""The one file that knows TransformerLens: weights, hook names and partial forwards on both classes.

`HookedTransformer` (TransformerLens 3.x, "hooked") and `TransformerBridge` (3.x and 4.x, "bridge")
differ in where ``W_out`` lives, in which hook sees its output and in whether a forward can begin
in the middle. Every other module asks here, by TransformerLens' own hook names.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix  # noqa: F401  (the type of Delta.matrix)

Kind: TypeAlias = Literal["hooked", "bridge"]
Component: TypeAlias = Literal["resid", "resid_pre", "resid_mid", "mlp", "attn"]
Unit: TypeAlias = Literal["head", "neuron"]
HookFn: TypeAlias = Callable[..., Any]
Place: TypeAlias = str | nn.Module  # a TransformerLens hook name, or a module whose output is meant
Hook: TypeAlias = tuple[Place, HookFn]
At: TypeAlias = Tensor | tuple[Tensor, Tensor]  # positions [row k], or a list of rows and a list of positions


@runtime_checkable
class Model(Protocol):
    """What is asked of a model: a HookedTransformer or a TransformerBridge."""

    cfg: Any
    tokenizer: Any

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Add hooks for the length of a ``with`` block."""
        ...

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenise text."""
        ...


class UnsupportedModelError(ValueError):
    """A model, or one of its modules, that can't be traced or edited here; the message names it."""


# ------------------------------------------------------------------------------------ what a model is


def kind(model: Model) -> Kind:
    """Which of TransformerLens' two classes a model is."""
    found = kind_of(model)
    if found is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is neither a HookedTransformer nor a TransformerBridge: "
            "load it with TransformerBridge.boot_transformers(...), or fe.models.from_hf(model, tokenizer)"
        )
    return found


def kind_of(model: object) -> Kind | None:
    """`kind` of anything; None for what is no model of TransformerLens."""
    if hasattr(model, "original_model") and hasattr(model, "adapter"):
        return "bridge"
    if hasattr(model, "blocks") and hasattr(model, "unembed"):
        return "hooked"
    return None


def n_layers(model: Model) -> int:
    """How many blocks the model has."""
    kind(model)
    return len(model.blocks)  # type: ignore[attr-defined]


def check_layer(model: Model, layer: int) -> int:
    """The layer itself; ValueError if the model has no such block."""
    if not 0 <= layer < n_layers(model):
        raise ValueError(
            f"layer {layer} is outside the model: {model_name(model)} has layers 0 to {n_layers(model) - 1}"
        )
    return layer


def model_name(model: Model) -> str:
    """The name the model was loaded under, for records and messages."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def bos_policy(model: Model, prepend_bos: bool | None = None) -> bool:
    """Whether to put BOS in front: as asked, or (None) as the model does by default."""
    kind(model)
    return bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos


def layout(model: Model) -> str:
    """Class and weight processing in a word, e.g. ``"bridge"`` or ``"hooked"``, for records."""
    processed = bool(getattr(model, "compatibility_mode", False))
    return kind(model) + ("+compat" if processed else "")


def device(model: Model) -> torch.device:
    """Where the model's inputs go."""
    return torch.device(model.cfg.device or "cpu")


def resid_post(layer: int) -> str:
    """Hook name of the residual stream after a block, h^(l)."""
    return f"blocks.{layer}.hook_resid_post"


def resid_pre(layer: int) -> str:
    """Hook name of the residual stream before a block."""
    return f"blocks.{layer}.hook_resid_pre"


def component_hook(component: Component, layer: int) -> str:
    """Hook name of what a component hands to the residual stream (for ``resid``: the stream after the block)."""
    names = {
        "resid": "hook_resid_post",
        "resid_pre": "hook_resid_pre",
        "resid_mid": "hook_resid_mid",
        "mlp": "hook_mlp_out",
        "attn": "hook_attn_out",
    }
    if component not in names:
        raise ValueError(f"component {component!r} is unknown, needed one of {sorted(names)}")
    return f"blocks.{layer}.{names[component]}"


def unit_hook(unit: Unit, layer: int) -> str:
    """Hook name of the values of single heads (z) or neurons (the input of W_out)."""
    names = {"head": "attn.hook_z", "neuron": "mlp.hook_post"}
    if unit not in names:
        raise ValueError(f"unit {unit!r} is unknown, needed one of {sorted(names)}")
    return f"blocks.{layer}.{names[unit]}"


def n_units(model: Model, unit: Unit) -> int:
    """How many heads, or neurons, a layer has."""
    return int(model.cfg.n_heads) if unit == "head" else len(down_proj(model, 0).W)


EMBED = "hook_embed"
"""Hook name of the token embeddings, before any positional embedding."""


# ------------------------------------------------------------------------------------ W_out


@dataclass(frozen=True)
class DownProj:
    """The output matrix of one MLP, live: ``value = key @ W + bias``.

    Attributes:
        layer: The block.
        param: The parameter itself, in the orientation it is stored in.
        transposed: Whether it is stored as [d_model, d_mlp] (an ``nn.Linear``).
        bias: [d_model], or None.
        key_hook: Hook name of its input (the key).
        value_at: Where its output (the value) can be hooked: a hook name, or the module that
            returns it where no hook sees it (a HookedTransformer with norms after the MLP).
    """

    layer: int
    param: nn.Parameter
    transposed: bool
    bias: Tensor | None
    key_hook: str
    value_at: Place

    @property
    def W(self) -> Float[Tensor, "d_mlp d_model"]:
        """A live view of the weight, rows = d_mlp; writing to it writes to the model."""
        data = self.param.detach()
        return data.T if self.transposed else data

    def write_(self, weight: Float[Tensor, "d_mlp d_model"]) -> None:
        """Overwrite the weight in place."""
        with torch.no_grad():
            self.W.copy_(weight)

    def reaches_stream(self, found: Mapping[str, Tensor]) -> bool:
        """Whether what it answers is added to the stream as it is: no norm and no multiplier stands between.

        Args:
            found: What stood at `value_at`, if that is a hook, and at the block's ``hook_mlp_out``, on any tokens.
        """
        straight = component_hook("mlp", self.layer)
        return isinstance(self.value_at, str) and torch.equal(found[self.value_at], found[straight])

    def value(self, key: Float[Tensor, "*row d_mlp"]) -> Float[Tensor, "*row d_model"]:
        """What the matrix answers to a key, in float64."""
        out = key.double() @ self.W.double()
        return out if self.bias is None else out + self.bias.detach().double()


def down_proj(model: Model, layer: int) -> DownProj:
    """The live ``W_out`` of a block (never ``model.W_out[layer]``, which is a copy).

    Raises:
        ValueError: No such layer.
        UnsupportedModelError: Mixture of experts, no MLP, quantised or offloaded weights, or a
            parameter made inside ``torch.inference_mode``.
    """
    check_layer(model, layer)
    block = model.blocks[layer]  # type: ignore[attr-defined]
    where = f"blocks.{layer}.mlp"
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        raise UnsupportedModelError(f"{where}: this block has no MLP, needed one with a W_out")
    if kind(model) == "bridge":
        out = getattr(mlp, "out", None)
        inner = getattr(out, "original_component", None)
        if inner is None:
            raise UnsupportedModelError(_no_single_w_out(where, mlp))
        param, bias = getattr(inner, "weight", None), getattr(inner, "bias", None)
        transposed = type(inner).__name__ != "Conv1D"  # GPT-2 stores Conv1D weights as [d_mlp, d_model]
        value_at: Place = f"{where}.out.hook_out"
    else:
        param, bias = mlp._parameters.get("W_out"), mlp._parameters.get("b_out")
        if param is None:
            raise UnsupportedModelError(_no_single_w_out(where, mlp))
        transposed = False
        post_norm = bool(getattr(model.cfg, "use_normalization_before_and_after", False))
        value_at = mlp if post_norm else f"blocks.{layer}.hook_mlp_out"
    _check_weight(param, where, model.cfg.d_model, transposed)
    return DownProj(layer, param, transposed, bias, f"{where}.hook_post", value_at)  # type: ignore[arg-type]


def insist(finish: Callable[[], None]) -> None:
    """Run what puts something back; if it is interrupted, once more, and only then does the interrupt go on.

    Args:
        finish: May be run twice, and does the rest the second time.
    """
    try:
        finish()
    except BaseException:
        finish()
        raise


def write_all(sites: Sequence[DownProj], weights: Sequence[Float[Tensor, "d_mlp d_model"]]) -> None:
    """Write several weights; what interrupts it is raised once all are written."""

    def write() -> None:
        for site, weight in zip(sites, weights, strict=True):
            site.write_(weight)

    insist(write)


def as_layers(layers: int | Iterable[int]) -> tuple[int, ...]:
    """One layer or several (of any kind of integer), ascending, each once."""
    if isinstance(layers, Iterable):
        return tuple(sorted({operator.index(layer) for layer in layers}))
    return (operator.index(layers),)


def check_own(model: Model, layers: Iterable[int]) -> None:
    """See that each of some blocks has a ``W_out`` to itself.

    Raises:
        UnsupportedModelError: Another block uses the same one (shared layers), so that writing one writes both.
    """
    users: dict[int, list[int]] = {}
    for layer in range(n_layers(model)):
        with suppress(UnsupportedModelError):
            users.setdefault(down_proj(model, layer).param.data_ptr(), []).append(layer)
    for layer in layers:
        shared = users.get(down_proj(model, layer).param.data_ptr(), [layer])
        if len(shared) > 1:
            raise UnsupportedModelError(
                f"layers {shared} share one W_out, needed one for layer {layer} alone: what is written in one would be "
                "written in all of them"
            )


def _no_single_w_out(where: str, mlp: nn.Module) -> str:
    return (
        f"{where} ({type(mlp).__name__}) has no single W_out: mixture-of-experts layers have one for each "
        "expert, and a token has no single key; choose a dense layer or model"
    )


def _check_weight(param: Tensor | None, where: str, d_model: int, transposed: bool) -> None:
    if not isinstance(param, nn.Parameter) or not param.is_floating_point() or param.ndim != 2:
        given = type(param).__name__ if not isinstance(param, Tensor) else f"{param.dtype} {tuple(param.shape)}"
        raise UnsupportedModelError(
            f"{where}: W_out is {given}, needed a two-dimensional floating-point parameter "
            "(quantised weights can't be edited in place: load the model unquantised)"
        )
    if param.is_meta:
        raise UnsupportedModelError(
            f"{where}: W_out is on the meta device (offloaded), needed weights in memory: load without offloading"
        )
    if param.is_inference():
        raise UnsupportedModelError(
            f"{where}: W_out was made inside torch.inference_mode(), needed an ordinary parameter: "
            "load the model outside of it"
        )
    # Not cfg.d_mlp: TransformerLens takes 4 * d_model for OPT and Falcon, whatever the weights are.
    if param.shape[0 if transposed else 1] != d_model:
        needed = f"[{d_model}, d_mlp]" if transposed else f"[d_mlp, {d_model}]"
        raise UnsupportedModelError(f"{where}: W_out is {tuple(param.shape)}, needed {needed}")


# ------------------------------------------------------------------------------------ fingerprint


@dataclass(frozen=True)
class Fingerprint:
    """Which weights a model has, as hashes.

    Attributes:
        w_out: One hash a layer, of ``W_out`` as [d_mlp, d_model] (the same on both classes).
        rest: One hash of all other parameters, in the order of this layout.
        layout: Class and processing (see `layout`); `rest` can only be compared within one layout.
    """

    w_out: tuple[str, ...]
    rest: str
    layout: str

    def matches(self, other: Fingerprint) -> bool:
        """Whether these are the same weights.

        Across the two classes only the ``W_out`` of all layers are compared, as the other
        parameters are stored differently there.
        """
        return self.w_out == other.w_out and (self.layout != other.layout or self.rest == other.rest)

    def __str__(self) -> str:
        """A short form for messages."""
        return hashlib.sha256("".join((*self.w_out, self.rest)).encode()).hexdigest()[:12]


LARGEST_BIAS = 1 << 20
"""Parameters with more numbers than this are no biases."""


def fingerprint(model: Model) -> Fingerprint:
    """Hash every parameter of a model (about 0.05 s for 135 M parameters; against mix-ups, not against malice)."""
    w_out, seen = [], set()
    for layer in range(n_layers(model)):
        try:
            site = down_proj(model, layer)
        except UnsupportedModelError:
            w_out.append("none")  # a block that can't be edited; its parameters count in `rest`
            continue
        seen.add(id(site.param))
        w_out.append(hash_weight(site.W))
    rest = xxhash.xxh3_64()
    for param in model.parameters():  # type: ignore[attr-defined]
        if id(param) in seen or param.is_meta:
            continue
        # Zeros (biases that one release of TransformerLens adds and the next does not) say nothing.
        if param.numel() > LARGEST_BIAS or bool(param.detach().any()):
            _update(rest, param.detach())
    return Fingerprint(tuple(w_out), rest.hexdigest(), layout(model))


def hash_weight(weight: Float[Tensor, "d_mlp d_model"]) -> str:
    """Hash of one weight's dtype, shape and bits."""
    digest = xxhash.xxh3_64()
    _update(digest, weight)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    raw = tensor.contiguous().cpu().reshape(-1)
    digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")


# ------------------------------------------------------------------------------------ running


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
def quiet(model: Model) -> Iterator[None]:
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

        insist(put_back)


def drop_graphs(model: Model) -> None:
    """Detach what the model's modules keep of the last forward pass.

    The attention of a TransformerBridge keeps its last pattern, with the whole graph behind it: memory
    that is never freed, and a model that ``copy.deepcopy`` refuses.
    """
    for module in model.modules():  # type: ignore[attr-defined]
        for name, kept in list(vars(module).items()):
            if isinstance(kept, Tensor) and kept.grad_fn is not None:
                vars(module)[name] = kept.detach()


Past: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Attention keys and values of tokens already read, a pair for each layer, [row pos head d_head] each."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Pieces of several sequences side by side in one row, behind a past that they share.

    A cell of a trace changes one token of a sequence: only that token and those after it have to be run again, and
    the pieces that this leaves, one for each cell, fit into one row if none sees another.

    Attributes:
        positions: Each token's place in its own sequence, [row query].
        visible: What each token attends to: the past first, then the row's own tokens, [row query key].
        past: Keys and values of the tokens before; None for none.
        joined: How many of the rows, from the first, each block runs: the others join at a later block, with what is
            given as their residual stream, and `past` has as many rows there. None: all rows run in all blocks.
    """

    positions: Int[Tensor, "row query"]
    visible: Bool[Tensor, "row query key"]
    past: Past | None = None
    joined: tuple[int, ...] | None = None

    def rows(self, count: int) -> Packing:
        """The first `count` rows, without a past."""
        return self if count == len(self.positions) else Packing(self.positions[:count], self.visible[:count])


def past_at(past: Sequence[tuple[Tensor, Tensor]], rows: Int[Tensor, "row"], length: int) -> Past:
    """The first `length` positions of some rows of a past."""
    return tuple((keys[rows, :length], values[rows, :length]) for keys, values in past)


class Runner:
    """Forward passes of one model: whole, from a layer on, up to a layer, packed, logits only where wanted.

    Rows of unequal length are padded on the right, which is exact for a causal model; ask for
    logits at each row's own positions. Gradients flow if they are enabled.

    Args:
        model: Either class. It is used as it is: call inside `quiet`.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kind = kind(model)
        self.n_layers = n_layers(model)
        self._points: dict[str, Any] | None = None
        self._arity = self._probe_arity() if self.kind == "bridge" else 0

    def logits(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        at: At | None = None,
        start: tuple[int, Tensor] | None = None,
        hooks: Sequence[Hook] = (),
        packing: Packing | None = None,
    ) -> Float[Tensor, "_ k vocab"]:
        """Logits of a batch.

        Args:
            tokens: Token ids, padded on the right.
            at: Positions whose logits are wanted, k for each row; or a pair of equally long lists, of rows and of
                positions, whose logits come as one row; None for all.
            start: (layer, residual [row pos d_model]): begin before that block with this residual
                stream instead of running the blocks below; ``n_layers`` runs the head alone.
            hooks: (place, function) pairs, active during this pass only.
            packing: Where the tokens stand, if rows are no plain sequences; needs `start`.

        Raises:
            ValueError: The rows are longer than the model's context.
        """
        tokens = tokens.to(device(self.model))
        if packing is None:
            self._check_length(tokens)
        with self._hooked(hooks):
            if self.kind == "bridge":
                return self._bridge_logits(tokens, at, start, packing)
            return self._hooked_logits(tokens, at, start, packing)

    def capture(
        self,
        tokens: Int[Tensor, "row pos"],
        places: Sequence[str],
        *,
        start: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        hooks: Sequence[Hook] = (),
    ) -> dict[str, Tensor]:
        """Activations at hook names, [row pos …] each, detached.

        Args:
            tokens: Token ids, padded on the right.
            places: TransformerLens hook names.
            start: As in `logits`.
            stop: Run only the blocks below this one; None for all of them.
            hooks: Active during this pass; they run before the capture.

        Raises:
            UnsupportedModelError: The model has no such hook, or it never fired.
            ValueError: The rows are longer than the model's context.
        """
        kept: dict[str, Tensor] = {}
        tokens = tokens.to(device(self.model))
        self._check_length(tokens)
        last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        with self._hooked([*hooks, *_keepers(places, kept)]):
            if self.kind == "bridge":
                if stop is None or stop >= self.n_layers:
                    self._bridge_logits(tokens, last, start)
                else:
                    with self._from(start):
                        self.model(tokens, stop_at_layer=stop)  # type: ignore[operator]
            else:
                stop = self.n_layers if stop is None else stop
                resid = self._hooked_resid(tokens, start, stop)
                if resid_pre(stop) in places:  # fires on a bridge that stops there, but not here
                    kept[resid_pre(stop)] = resid.detach()
        return self._all_kept(places, kept)

    def remember(
        self, tokens: Int[Tensor, "row query"], places: Sequence[str], *, resid: Tensor, packing: Packing
    ) -> tuple[dict[str, Tensor], Past]:
        """Run all blocks on packed rows: activations at hook names, and the past that the rows' own tokens make.

        Args:
            tokens: Token ids.
            places: TransformerLens hook names.
            resid: The residual stream before the first block, [row query d_model].
            packing: Where the tokens stand.
        """
        kept: dict[str, Tensor] = {}
        tokens = tokens.to(device(self.model))
        with self._hooked(_keepers(places, kept)):
            if self.kind == "bridge":
                last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
                cache = self._bridge_packed(tokens, last, (0, resid), packing)[1]
                before = packing.visible.shape[-1] - packing.visible.shape[-2]
                past = tuple(
                    (layer.keys[:, :, before:].transpose(1, 2), layer.values[:, :, before:].transpose(1, 2))
                    for layer in cache.layers
                )
            else:
                past = self._hooked_packed((0, resid), packing)[1]
        return self._all_kept(places, kept), past

    def _check_length(self, tokens: Int[Tensor, "row pos"]) -> None:
        room = getattr(self.model.cfg, "n_ctx", None)
        if room is not None and tokens.shape[1] > room:
            raise ValueError(
                f"a text has {tokens.shape[1]} tokens, and {model_name(self.model)} was made for {room} (cfg.n_ctx): "
                "shorten the prompt, or the context before it"
            )

    def _all_kept(self, places: Sequence[str], kept: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in places if name not in kept]
        if missing:
            raise UnsupportedModelError(f"hooks {missing} never fired in {model_name(self.model)}")
        return kept

    def packs(self, tokens: Int[Tensor, "pos"], longest: int) -> str:
        """Why this model can't be run packed, or ``""`` if it can: tried on the tokens given, against a plain run.

        Some attentions ask for more than positions and a mask (ALiBi) or see no further than a window.

        Args:
            tokens: Some tokens, two at least.
            longest: How many tokens rows will have.
        """
        if carries_hooks(self.model):
            return "the model carries hooks of its own, which may count tokens from the beginning of a row"
        window = self._window()
        if window is not None and longest > window:
            return f"rows of {longest} tokens are longer than the attention window of {window}"
        tokens = tokens[None].to(device(self.model))
        n = tokens.shape[1]
        here = torch.arange(n, device=tokens.device)
        cut = n // 2
        try:
            stream = self.capture(tokens, [resid_pre(0)], stop=0)[resid_pre(0)]
            causal = Packing(here[None], (here[:, None] >= here)[None])
            _, past = self.remember(tokens, [], resid=stream, packing=causal)
            # The whole sequence and its second half side by side, behind the first half and all of it.
            places = torch.cat([here[cut:], here[-1:]])
            whole = torch.arange(len(places), device=tokens.device) < n - cut
            own = (whole[:, None] == whole) & (places[:, None] >= places)
            behind = here[: n - 1] < torch.where(whole, cut, n - 1)[:, None]
            # Twice: the second row joins after the first block, with what that block made of the first.
            after = self.capture(tokens, [resid_pre(1)], stop=1)[resid_pre(1)] if self.n_layers > 1 else stream
            visible = torch.cat([behind, own], 1)
            joined = (1 if self.n_layers > 1 else 2, *(2,) * (self.n_layers - 1))
            packing = Packing(
                places.repeat(2, 1),
                visible.repeat(2, 1, 1),
                tuple(
                    past_at([each], torch.zeros(count, dtype=torch.long), n - 1)[0]
                    for each, count in zip(past, joined, strict=True)
                ),
                joined,
            )
            both = self.logits(
                tokens[:, places].repeat(2, 1),
                start=(0, torch.cat([stream[:, places], after[:, places]])),
                packing=packing,
                at=torch.tensor([[n - cut - 1, -1]]).repeat(2, 1),
            ).flatten(0, 1)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        plain = self.logits(tokens, at=torch.tensor([[n - 1]]))[0]
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(plain.dtype, 0.1)
        if not bool((both - plain).abs().max() < tolerance * plain.std()):
            return "its logits differ from those of a plain run"
        return ""

    def _window(self) -> int | None:
        """The shortest attention window of the model, if it has one."""
        configs = [self.model.cfg, getattr(getattr(self.model, "original_model", None), "config", None)]
        names = ("sliding_window", "window_size", "attention_chunk_size")
        found = [getattr(config, name, None) for config in configs for name in names]
        return min((int(each) for each in found if isinstance(each, int) and each > 0), default=None)

    # -- hooks

    @contextmanager
    def _hooked(self, hooks: Sequence[Hook]) -> Iterator[None]:
        """Hooks for the length of a block.

        Put up and taken down at their hook points: a bridge of TransformerLens 3 looks all its names up anew in each
        ``model.hooks``, for each hook, which takes longer than a short pass.
        """
        named = [(self._point(place), fn) for place, fn in hooks if isinstance(place, str)]
        own: Any = object()  # a level that is nobody else's: theirs are numbers
        with ExitStack() as stack:
            for place, fn in hooks:
                if not isinstance(place, str):
                    handle = place.register_forward_hook(lambda _m, _a, out, fn=fn: fn(out, hook=None))
                    stack.callback(handle.remove)
            try:
                for point, fn in named:
                    point.add_hook(fn, level=own)
                yield
            finally:

                def take_down() -> None:
                    for point, _ in named:
                        point.remove_hooks(level=own)

                insist(take_down)

    def _point(self, place: str) -> Any:
        """The hook point of a name."""
        if self._points is None:
            self._points = dict(self.model.hook_dict)  # type: ignore[attr-defined]
        if place not in self._points:
            raise UnsupportedModelError(f"{model_name(self.model)} has no hook {place!r}")
        return self._points[place]

    # -- HookedTransformer

    def _hooked_resid(self, tokens: Tensor, start: tuple[int, Tensor] | None, stop: int) -> Tensor:
        model: Any = self.model
        # The mask is all ones: rows are padded on the right, whatever side the tokenizer pads on.
        mask = torch.ones_like(tokens)
        if start is None:
            return model(tokens, stop_at_layer=stop, attention_mask=mask)
        layer, resid = start
        if layer >= self.n_layers:
            return resid
        if any(getattr(getattr(model, name, None), "fwd_hooks", None) for name in (EMBED, "hook_pos_embed")):
            model.input_to_embed(tokens, attention_mask=mask)  # for these hooks, as a bridge's see every pass
        return model(resid, start_at_layer=layer, stop_at_layer=stop, tokens=tokens, attention_mask=mask)

    def _hooked_packed(self, start: tuple[int, Tensor], packing: Packing) -> tuple[Tensor, Past]:
        """The stream after the last block, and the past that the rows' own tokens make (from `start` on)."""
        layer, resid = start
        entries = []
        for i, block in enumerate(list(self.model.blocks)[layer:], layer):  # type: ignore[attr-defined]
            before = packing.past[i] if packing.past else None
            count = packing.joined[i] if packing.joined else len(resid)
            entries.append(_PastEntry(before, count, block.attn))
            with _packed_attention(block.attn, packing.rows(count)):
                run = block(
                    resid[:count], past_kv_cache_entry=entries[-1], shortformer_pos_embed=None, attention_mask=None
                )
            resid = run if count == len(resid) else torch.cat([run, resid[count:]])
        return resid, tuple(entry.new for entry in entries)

    def _hooked_logits(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None, packing: Packing | None = None
    ) -> Tensor:
        model: Any = self.model
        if packing is not None and start is not None:
            resid = self._hooked_packed(start, packing)[0]
        else:
            resid = self._hooked_resid(tokens, start, self.n_layers)
        if at is not None:
            resid = gather(resid, at)
        if model.cfg.normalization_type is not None:
            resid = model.ln_final(resid)
        logits = model.unembed(resid)
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    # -- TransformerBridge

    def _bridge_logits(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None, packing: Packing | None = None
    ) -> Tensor:
        if packing is not None and start is not None:
            return self._bridge_packed(tokens, at, start, packing)[0]
        with self._from(start), self._picked(at):
            return self.model(tokens)  # type: ignore[operator]

    def _bridge_packed(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor], packing: Packing
    ) -> tuple[Tensor, Any]:
        """Logits and the cache afterwards, past and new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(packing.past or ()):
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        resid = start[1]
        seen = packing.visible[:, None].to(resid.device)
        mask = torch.zeros(seen.shape, dtype=resid.dtype, device=resid.device)
        mask.masked_fill_(~seen, torch.finfo(resid.dtype).min)
        with self._from(start), self._joining(packing.joined, len(resid), start[0]), self._picked(at):
            # The wrapped model itself, as the bridge's forward makes masks and positions of its own.
            out = self.model.original_model(  # type: ignore[attr-defined]
                input_ids=tokens,
                attention_mask=mask,
                position_ids=packing.positions.to(tokens.device),
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits, cache

    @contextmanager
    def _picked(self, at: At | None) -> Iterator[None]:
        """Unembed some positions only."""
        if at is None:
            yield
            return
        # At the unembedding and not at ln_final, after which GPT-2, GPT-J and NeoX reshape.
        pick = [("unembed.hook_in", lambda resid, hook: gather(resid, at))]
        with self._hooked(pick):
            yield

    @contextmanager
    def _from(self, start: tuple[int, Tensor] | None) -> Iterator[None]:
        """Let the blocks below `layer` pass through, and the block before it return the residual.

        The token ids are still given, so that masks and positions are made as always. Hooks at their embeddings see
        them where a block is run, but nothing reads what they return.
        """
        if start is None:
            yield
            return
        layer, resid = start
        blocks: Any = self.model.blocks  # type: ignore[attr-defined]
        skipped = list(blocks)[:layer]
        handle = None
        names = ("embed", "pos_embed") if layer >= self.n_layers else ()
        parts = [getattr(self.model, name, None) for name in names]
        with _unhooked(m for part in parts if part is not None for m in part.modules()):
            try:
                if layer == 0:
                    handle = blocks[0].register_forward_pre_hook(
                        lambda _m, args, kw: _swap_input(resid, args, kw), with_kwargs=True
                    )
                for block in skipped:
                    given = resid if block is skipped[-1] else None
                    object.__setattr__(block, "forward", self._pass_through(given))
                yield
            finally:

                def put_back() -> None:
                    if handle is not None:
                        handle.remove()
                    for block in skipped:
                        block.__dict__.pop("forward", None)

                insist(put_back)

    @contextmanager
    def _joining(self, joined: Sequence[int] | None, rows: int, first: int) -> Iterator[None]:
        """Let each block run the first of the rows only, and hand on the others as they are."""
        if joined is None:
            yield
            return
        blocks = list(self.model.blocks)[first:]  # type: ignore[attr-defined]
        try:
            for block, count in zip(blocks, joined[first:], strict=True):
                if count < rows:
                    object.__setattr__(block, "forward", _of_first_rows(block.forward, count, rows))
            yield
        finally:

            def put_back() -> None:
                for block in blocks:
                    block.__dict__.pop("forward", None)

            insist(put_back)

    def _pass_through(self, given: Tensor | None) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden_states if given is None else given
            return (out,) + (None,) * (self._arity - 1) if self._arity else out

        return forward

    def _probe_arity(self) -> int:
        """Whether this model's blocks return a tensor (0) or a tuple (its length)."""
        model: Any = self.model
        seen: list[int] = []
        handle = model.blocks[0].register_forward_hook(
            lambda _m, _a, out: seen.append(len(out) if isinstance(out, tuple) else 0)
        )
        try:
            with torch.no_grad(), _unhooked(model.modules()):  # a user's hooks may want more tokens than one
                model(torch.zeros(1, 1, dtype=torch.long, device=device(model)), stop_at_layer=1)
        finally:
            handle.remove()
        return seen[0]


@contextmanager
def _unhooked(modules: Iterable[nn.Module]) -> Iterator[None]:
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
        insist(put_back)


def gather(values: Float[Tensor, "row pos *rest"], at: At) -> Float[Tensor, "row_ k *rest"]:
    """The values at each row's own positions, or (for a pair) at a list of rows and positions, as one row."""
    if isinstance(at, tuple):
        rows, places = at
        return values[rows.to(values.device), places.to(values.device)][None]
    return values[torch.arange(len(values), device=values.device)[:, None], at.to(values.device)]


def _keepers(places: Sequence[str], kept: dict[str, Tensor]) -> list[Hook]:
    """Hooks that put what passes into `kept`."""

    def keep(name: str) -> HookFn:
        def hook_fn(value: Tensor, hook: Any = None) -> None:
            kept[name] = value.detach().clone()

        return hook_fn

    return [(name, keep(name)) for name in places]


def _of_first_rows(forward: Callable[..., Any], count: int, rows: int) -> Callable[..., Any]:
    """A block's forward for `count` of `rows` rows; masks and positions (all that has so many rows) are cut alike."""

    def cut(value: Any) -> Any:
        if torch.is_tensor(value):
            return value[:count] if value.ndim > 1 and len(value) == rows else value
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    def of_first(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(hidden_states[:count], *map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
        run, *rest = out if isinstance(out, tuple) else (out,)
        whole = torch.cat([run, hidden_states[count:]])
        return (whole, *rest) if isinstance(out, tuple) else whole

    return of_first


class _PastEntry:
    """What a HookedTransformer's attention asks of its cache; keeps the new keys and values apart."""

    def __init__(self, past: tuple[Tensor, Tensor] | None, rows: int, attn: Any) -> None:
        self.new: tuple[Tensor, Tensor]
        if past is None:
            heads = attn.cfg.n_key_value_heads or attn.cfg.n_heads
            past = (attn.W_Q.new_zeros(rows, 0, heads, attn.cfg.d_head),) * 2
        self.past_keys, self.past_values = past

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.new = (keys, values)
        return torch.cat([self.past_keys, keys], 1), torch.cat([self.past_values, values], 1)


@contextmanager
def _packed_attention(attn: Any, packing: Packing) -> Iterator[None]:
    """Let a HookedTransformer's attention rotate and mask by the packing instead of by the order in the row."""
    query = packing.positions
    before = packing.visible.shape[-1] - packing.visible.shape[-2]
    key = torch.cat([torch.arange(before, device=query.device).expand(len(query), -1), query], 1)

    def rotate(x: Tensor, past_kv_pos_offset: int = 0, attention_mask: Any = None) -> Tensor:  # noqa: ARG001
        # Keys come with those of the past, and with an offset of 0; without a past both are the same.
        places = (query if x.shape[1] == query.shape[1] else key).to(attn.rotary_cos.device)
        if int(places.max()) >= len(attn.rotary_cos):
            raise ValueError(f"position {int(places.max())} is beyond the model's {len(attn.rotary_cos)} rotations")
        turned, rest = x[..., : attn.cfg.rotary_dim], x[..., attn.cfg.rotary_dim :]
        cos, sin = attn.rotary_cos[places, None], attn.rotary_sin[places, None]
        return torch.cat([turned * cos + attn.rotate_every_two(turned) * sin, rest], -1)

    def mask(scores: Tensor, past_kv_pos_offset: int = 0, attention_mask: Any = None) -> Tensor:  # noqa: ARG001
        return torch.where(packing.visible[:, None].to(scores.device), scores, attn.IGNORE.to(scores))

    try:
        object.__setattr__(attn, "apply_rotary", rotate)
        object.__setattr__(attn, "apply_causal_mask", mask)
        yield
    finally:
        attn.__dict__.pop("apply_rotary", None)
        attn.__dict__.pop("apply_causal_mask", None)


def _swap_input(resid: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args and torch.is_tensor(args[0]):
        return (resid, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": resid}


# ------------------------------------------------------------------------------------ making models


def from_hf(hf_model: Any, tokenizer: Any, *, kind: Kind = "bridge", name: str | None = None) -> Model:
    """A transformers model in memory as a TransformerLens model with raw weights; no hub is asked.

    A bridge *wraps* `hf_model` (edits show in both); a HookedTransformer holds copies.

    Args:
        hf_model: A causal language model of transformers.
        tokenizer: Its fast tokenizer.
        kind: ``"bridge"`` or ``"hooked"``.
        name: What to call it in records; None for the config's own name.

    Raises:
        ValueError: ``kind="hooked"`` where TransformerLens has no HookedTransformer.
    """
    name = str(name or hf_model.config._name_or_path or type(hf_model).__name__)
    if hf_model.config.architectures is None:
        hf_model.config.architectures = [type(hf_model).__name__]
    tokenizer.init_kwargs.setdefault("name_or_path", name)
    if kind == "bridge":
        model = _boot_bridge(hf_model, tokenizer, name)
    elif kind == "hooked":
        model = _boot_hooked(hf_model, tokenizer)
    else:
        raise ValueError(f"kind {kind!r} is unknown, needed 'bridge' or 'hooked'")
    model.cfg.model_name = name
    return model


def from_hub(name: str, *, kind: Kind = "bridge") -> Model:
    """A hub's model by name, with raw weights.

    Raises:
        OSError: The hub can't be reached, or has no such model.
    """
    try:
        if kind == "hooked":
            return _hooked_transformer().from_pretrained_no_processing(name)
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(name)
    except OSError as error:
        raise OSError(
            f"{name!r} could not be had from the model hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): check the name and the network, or take 'smollm2', which needs no hub"
        ) from error


def _hooked_transformer() -> Any:
    # TransformerLens 4 raises an ImportError of its own for this name, also from hasattr.
    try:
        from transformer_lens import HookedTransformer
    except ImportError as error:
        raise ValueError(
            "kind='hooked' needs HookedTransformer, which TransformerLens 4 no longer has: "
            "take kind='bridge', or install 'transformer-lens<4'"
        ) from error
    return HookedTransformer


def _boot_bridge(hf_model: Any, tokenizer: Any, name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    dtype = next(hf_model.parameters()).dtype
    where = str(next(hf_model.parameters()).device)
    # TransformerLens re-reads a tokenizer from its path unless it adds BOS itself; ours has no path.
    tokenizer.init_kwargs["add_bos_token"] = True
    return TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer, device=where, dtype=dtype)


def _boot_hooked(hf_model: Any, tokenizer: Any) -> Any:
    import json
    import tempfile
    from pathlib import Path

    hooked_transformer = _hooked_transformer()
    # By its name, as TransformerLens 4 has no such module to be typed by.
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")

    dtype = next(hf_model.parameters()).dtype
    # from_pretrained takes hub names only; the two loaders below it also take a folder with a config.
    with tempfile.TemporaryDirectory(prefix="tl_") as folder:
        hf_model.config.save_pretrained(folder)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text())
        config.setdefault("n_ctx", config.get("n_positions"))
        file.write_text(json.dumps(config))
        where = str(next(hf_model.parameters()).device)
        cfg = loading.get_pretrained_model_config(
            folder, hf_cfg=hf_model.config.to_dict(), fold_ln=False, device=where, dtype=dtype
        )
        weights = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
    if "blocks.0.mlp.W_out" in weights:  # the config says 4 * d_model for GPT-2, GPT-J and GPT-Neo, whatever they have
        cfg.d_mlp = len(weights["blocks.0.mlp.W_out"])
    if cfg.positional_embedding_type == "alibi":  # never read, but otherwise left as uninitialised memory
        weights["pos_embed.W_pos"] = torch.zeros(cfg.n_ctx, cfg.d_model, dtype=dtype)
    model = hooked_transformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.to(where, print_details=False).eval()
