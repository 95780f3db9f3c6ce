"""What a model is: TransformerLens' two classes behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformer_lens import FactoredMatrix as FactoredMatrix  # the type of Delta.matrix

from tl_factedit.core.kinds import as_whole, short

Kind: TypeAlias = Literal["hooked", "bridge"]

Component: TypeAlias = Literal["resid", "resid_pre", "resid_mid", "mlp", "attn"]

Unit: TypeAlias = Literal["head", "neuron"]

HookFn: TypeAlias = Callable[..., Any]

Place: TypeAlias = str | nn.Module  # a TransformerLens hook name, or a module whose output is meant

Hook: TypeAlias = tuple[Place, HookFn]

At: TypeAlias = Tensor | tuple[Tensor, Tensor]  # positions [row k], or a list of rows and a list of positions


@runtime_checkable
class Model(Protocol):
    """What is asked of a model: a HookedTransformer or a TransformerBridge.

    Also its blocks, in `blocks`, and its hook points by name, in `hook_points`: a check at run time
    (``isinstance(model, Model)``) doesn't see a submodule, and would build a bridge's table of hooks each time.

    Attributes:
        cfg: Its configuration: ``d_model``, ``n_ctx``, ``model_name`` …
        tokenizer: Its fast tokenizer.
    """

    cfg: Any
    tokenizer: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run token ids: logits, or the residual stream with ``stop_at_layer``."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, with their names."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All modules, hook points among them."""
        ...

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Go on from token ids."""
        ...


class UnsupportedModelError(ValueError):
    """A model, or one of its modules, that can't be traced or edited here; the message names it."""


def kind(model: Model, name: str = "model") -> Kind:
    """Which of TransformerLens' two classes a model is.

    Args:
        model: Anything.
        name: The argument's name, for the message.

    Raises:
        UnsupportedModelError: It is neither.
    """
    found = None if isinstance(model, type) else kind_of(model)
    if found is None:
        module = isinstance(model, nn.Module)
        given = type(model).__name__ if module else f"{name} is {short(model)}, a {type(model).__name__}, which"
        raise UnsupportedModelError(
            f"{given} is neither a HookedTransformer nor a TransformerBridge: "
            "load it with TransformerBridge.boot_transformers(...), or fe.models.from_hf(model, tokenizer)"
        )
    return found


def kind_of(model: object) -> Kind | None:
    """`kind` of anything; None for what isn't a model of TransformerLens."""
    if hasattr(model, "original_model") and hasattr(model, "adapter"):
        return "bridge"
    if hasattr(model, "blocks") and hasattr(model, "unembed"):
        return "hooked"
    return None


def blocks(model: Model) -> list[Any]:
    """The model's blocks, from the first.

    Raises:
        UnsupportedModelError: It has no one row of them.
    """
    kind(model)
    found = getattr(model, "blocks", None)
    if found is None:
        raise UnsupportedModelError(
            f"{model_name(model)} ({type(getattr(model, 'original_model', model)).__name__}) has no blocks: needed a "
            "causal language model with one row of them, not an encoder-decoder"
        )
    return list(found)


def hook_points(model: Model) -> dict[str, Any]:
    """The model's hook points by name."""
    return dict(getattr(model, "hook_dict"))  # noqa: B009 (see `Model`)


def n_layers(model: Model) -> int:
    """How many blocks the model has."""
    return len(blocks(model))


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
    """Whether to put BOS in front: as asked, or (None) as the model does by default.

    Raises:
        ValueError: Something else is asked than True, False or None.
        UnsupportedModelError: The model has no tokenizer, or one with words that it has no embedding for.
    """
    kind(model)
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise ValueError(f"prepend_bos is {short(prepend_bos)}, needed True, False or None (the model's default)")
    if getattr(model, "tokenizer", None) is None:
        raise UnsupportedModelError(
            f"{model_name(model)} has no tokenizer, needed its own fast one to find a subject in a prompt: load the "
            "model with it, or set model.tokenizer"
        )
    check_vocabulary(model)
    return bool(model.cfg.default_prepend_bos) if prepend_bos is None else prepend_bos


def layout(model: Model) -> str:
    """Class and weight processing in a word, e.g. ``"bridge"`` or ``"hooked"``, for records."""
    processed = bool(getattr(model, "compatibility_mode", False))
    return kind(model) + ("+compat" if processed else "")


def centred(model: Model) -> bool:
    """Whether what is written to the residual stream was centred (``center_writing_weights``), by the embeddings.

    Only a bridge says of itself how its weights were processed. Folding norms or centring the unembedding leaves the
    stream and the probabilities as they are; centring takes the mean over d_model out of the stream.
    """
    tokens: Any = model
    table = tokens.W_E.detach()
    mean = table.mean(-1, dtype=torch.float32).square().mean()
    size = table.square().mean(dtype=torch.float32)
    # Means of unrelated numbers come to 1 here; rounding in bfloat16 to 1e-6.
    return bool(mean * table.shape[1] < 1e-4 * size)


def device(model: Model) -> torch.device:
    """Where the model's inputs go: where its embeddings are (``cfg.device`` isn't told of every move)."""
    tokens: Any = model
    return tokens.W_E.device


def device_from(model: Model, layer: int) -> torch.device:
    """Where what is run from a block on begins: on the block's device; for ``n_layers`` where the head is."""
    found, whole = blocks(model), cast(Any, model)
    parts = found[layer : layer + 1] or [getattr(whole, name, None) for name in ("ln_final", "unembed")]
    return next((param.device for part in parts if part is not None for param in part.parameters()), device(model))


def check_in_memory(model: Model) -> None:
    """Check that all weights are in memory.

    Raises:
        UnsupportedModelError: Some are on the meta device, which is where accelerate leaves what it offloads.
    """
    away = [param for param in model.parameters() if param.is_meta]
    if away:
        raise UnsupportedModelError(
            f"{len(away)} of the parameters of {model_name(model)} are on the meta device (offloaded), needed weights "
            "in memory: load without offloading"
        )


def check_unquantised(module: nn.Module) -> None:
    """Check that no layer is one of PyTorch's quantised ones, which have no weight and let no gradient through.

    Raises:
        UnsupportedModelError: Some are; the first is named.
    """
    found = [name for name, each in module.named_modules() if "quantized" in type(each).__module__.split(".")]
    if found:
        raise UnsupportedModelError(
            f"{found[0].replace('._original_component', '')} of {type(module).__name__} is quantised by PyTorch "
            f"({type(module.get_submodule(found[0])).__module__}), needed floating-point weights, which can be written "
            "and let gradients through: load the model unquantised"
        )


def check_vocabulary(model: Model) -> None:
    """Check that the model has an embedding for every word of its tokenizer; control tokens may have none.

    Raises:
        UnsupportedModelError: Words lie beyond: the tokenizer is another model's, or words were added to it.
    """
    tokenizer = model.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    control = {i for i, token in added.items() if getattr(token, "special", False)} | set(tokenizer.all_special_ids)
    words = [(i, word) for i, word in beyond(model) if i not in control]
    if words:
        raise UnsupportedModelError(
            f"the tokenizer has {len(words)} tokens that {model_name(model)} has no embedding for, such as "
            f"{words[0][1]!r} (token {words[0][0]} of {n_embedded(model)}): take the model's own tokenizer or, if "
            "tokens were added to it, resize the model (hf_model.resize_token_embeddings(len(tokenizer))) and train it "
            "on them"
        )


def check_embedded(model: Model, texts: Iterable[str]) -> None:
    """Check that no text holds a control token that the model has no embedding for.

    Raises:
        ValueError: One does; the message names both.
    """
    tokens = [token for _, token in beyond(model)]
    for text in texts if tokens else ():
        found = [token for token in tokens if token in text]
        if found:
            raise ValueError(
                f"{short(text)} holds {found[0]!r}, a token that {model_name(model)} has no embedding for (it has "
                f"{n_embedded(model)}): leave it out, or resize the model and train it on it"
            )


def n_embedded(model: Model) -> int:
    """How many tokens the model has an embedding for."""
    tokens: Any = model
    return len(tokens.W_E)


def beyond(model: Model) -> list[tuple[int, str]]:
    """The tokens that a tokenizer has and its model has no embedding for, ascending; none of nearly all models."""
    tokenizer, rows = getattr(model, "tokenizer", None), n_embedded(model)
    if tokenizer is None or len(tokenizer) <= rows:
        return []
    return sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)


@contextmanager
def told_where_it_is(model: Model) -> Iterator[None]:
    """``cfg.device`` is `device` for the length of a block: for what TransformerLens itself does by it."""
    told: Any = model.cfg
    before = told.device
    told.device = str(device(model))
    try:
        yield
    finally:
        told.device = before


def as_layers(layers: int | Iterable[int]) -> tuple[int, ...]:
    """One layer or several (of any kind of integer), ascending, each once."""
    if isinstance(layers, Iterable) and not isinstance(layers, str):
        return tuple(sorted({as_whole(layer, "layer", None) for layer in layers}))
    return (as_whole(layers, "layer", None),)
