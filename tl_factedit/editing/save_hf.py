"""A model of TransformerLens, edited or not, as a folder that transformers loads."""

from __future__ import annotations

import copy
import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from tl_factedit.backend.protocol import Model, bos_policy, device, kind, model_name
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch, users_hooks
from tl_factedit.backend.unwrapped import unwrapped
from tl_factedit.core import files
from tl_factedit.editing.export import write_edits_
from tl_factedit.editing.ledger import edits_on

ROUNDINGS = 4
"""By how many roundings of the largest one the folder's log-probabilities may be off: it adds in another order."""
LEAST = 1e-3
"""And how far at least, in nats."""
PROBE_TOKENS = 16


@plain_torch()
def save_hf(model: Model, folder: str | Path, *, hf_model: Any = None) -> None:
    """Write a model, with the edits that are on it, as a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Weights, config and the tokenizer are written. Before the folder takes its place it is loaded once, and has to give
    the model's own log-probabilities; otherwise nothing is left behind.

    Args:
        model: A TransformerBridge, whose transformers model is written under its own names; or a HookedTransformer,
            which holds converted copies of weights, and needs `hf_model`.
        folder: A new or empty folder.
        hf_model: For a HookedTransformer: the transformers model that it was made of, unedited. A copy of it with the
            edits that are applied to `model` is what is written; it stays as it is. Leave it out for a bridge.

    Raises:
        ValueError: The folder holds files; hooks are on the model (those of a `Router` are no weights); a
            HookedTransformer without `hf_model`, or a bridge with one; or the folder would say something else than the
            model: it was changed by more than edits.
        OSError: It can't be written, e.g. as the disk is full; nothing is left of it.
        UnsupportedModelError: A bridge in compatibility mode.

    Example:
        >>> edit.apply_(model)                                    # doctest: +SKIP
        >>> fe.save_hf(model, "edited/")                          # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("edited/")       # doctest: +SKIP
    """
    folder = files.pinned_folder(folder)
    bos_policy(model)  # it has a tokenizer
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files already, needed a new or empty folder: those of two models would mix there"
        )
    if hooks := users_hooks(model):
        raise ValueError(
            f"hooks are on {model_name(model)} at {', '.join(hooks[:3])}, which a folder of weights can't hold: take "
            "them off first (model.reset_hooks(); an edit of a Router is made by hooks and can't be saved like this)"
        )
    plain = _of_bridge(model, hf_model) if kind(model) == "bridge" else _of_hooked(model, hf_model)
    with _named(folder), _in_one_move(folder) as draft, _no_bars():
        plain.save_pretrained(draft)
        model.tokenizer.save_pretrained(draft)
        _check_same(model, draft, plain)


def _of_bridge(model: Model, hf_model: Any) -> Any:
    if hf_model is not None:
        raise ValueError("hf_model is for a HookedTransformer; a TransformerBridge holds its own: leave it out")
    return unwrapped(model)


def _of_hooked(model: Model, hf_model: Any) -> Any:
    if hf_model is None:
        raise ValueError(
            f"{model_name(model)} is a HookedTransformer, which holds converted copies of the weights, and no names or "
            "config of transformers: give the model that it was made of, save_hf(model, folder, hf_model="
            "AutoModelForCausalLM.from_pretrained(...)), into a copy of which its edits are written"
        )
    plain = copy.deepcopy(hf_model)
    if edits := edits_on(model):
        write_edits_(edits, plain)
    return plain


def _check_same(model: Model, draft: Path, plain: Any) -> None:
    """Check that what was written says what the model says.

    Raises:
        ValueError: It doesn't.
    """
    from transformers import AutoModelForCausalLM

    attention = getattr(plain.config, "_attn_implementation", None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        draft, dtype="auto", local_files_only=True, attn_implementation=attention
    )
    loaded = loaded.to(device(model)).eval()
    vocabulary = min(len(model.tokenizer), int(model.cfg.d_vocab))
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with frozen(model), torch.no_grad():
        wanted = _log_probs(Runner(model).logits(ids))
        found = _log_probs(loaded(ids.to(device(model))).logits)
    off = float((wanted - found[..., : wanted.shape[-1]]).abs().max())
    spread = float(wanted.max() - wanted.min())
    eps = max(torch.finfo(each.dtype).eps for each in (next(iter(model.parameters())), next(plain.parameters())))
    if not off <= max(LEAST, ROUNDINGS * eps * spread):
        raise ValueError(
            f"what would be written answers otherwise than {model_name(model)} (log-probabilities up to {off:.2g} "
            "apart), so that the model was changed by more than the edits that are on it, or hf_model isn't the one it "
            "was made of: nothing was written"
        )


def _log_probs(logits: Tensor) -> Float[Tensor, "1 pos vocab"]:
    # Processing moves all logits of a token by the same amount, which log-probabilities don't see.
    return logits.float().cpu().log_softmax(-1)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Let errors of the disk name the folder, whatever file of the draft, or none, they name."""
    try:
        yield
    except (OSError, SafetensorError) as given:
        error = files.as_os_error(given) if isinstance(given, SafetensorError) else given
        why = error.strerror or str(error)
        number = error.errno or errno.EIO
        raise OSError(number, f"it can't be written ({why}); nothing is left of it", str(folder)) from given


@contextmanager
def _in_one_move(folder: Path) -> Iterator[Path]:
    """A draft of a folder beside it, that takes its place once it is whole, and is removed otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".draft", dir=folder.parent))
    try:
        inner = draft / "model"
        inner.mkdir()  # with the mode of the umask, which mkdtemp's hasn't
        yield inner
        inner.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
