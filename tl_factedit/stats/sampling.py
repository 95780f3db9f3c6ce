"""Text sampled from the model itself: prefixes that an edit is made to hold under, and corpora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.protocol import Model, bos_policy, device, model_name, told_where_it_is
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.kinds import as_finite, as_several, as_whole
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import encode


@dataclass(frozen=True)
class SampledContexts:
    """Prefixes x_j drawn from the model, so that a key and a value don't depend on one wording.

    As in Meng et al. 2022 (app. E.5): short samples, each followed by a full stop and the prompt.
    The bare prompt is always the first context.

    Attributes:
        lengths: (how many, how many tokens each), as drawn one after another.
        top_k: Sample among this many likeliest tokens.
        seed: Seed of the draw; nothing else is random.
        starts: Words to begin the samples with, in turn, which count among their tokens (Meng et al. 2023 take ``The``,
            ``Therefore``, ``Because``, ``I``, ``You``); none: samples begin after BOS.
    """

    lengths: Sequence[tuple[int, int]] = ((10, 5), (10, 10))
    top_k: int = 5
    seed: int = 0
    starts: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_settings(self, least={"top_k": 1})
        given: tuple[Any, ...] = as_several(self.lengths, object, "lengths", "a pair of numbers")
        for each in given:
            pair = isinstance(each, Sequence) and not isinstance(each, str) and len(each) == 2
            if not pair or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in each):
                raise ValueError(
                    f"lengths has {each!r}, needed pairs of how many samples and of how many tokens each: ((10, 5),)"
                )

    @plain_torch()
    def draw(self, model: Model) -> tuple[str, ...]:
        """The prefixes, the bare (empty) one first."""
        prefixes = [""]
        generator = torch.Generator().manual_seed(self.seed)
        with frozen(model), torch.no_grad():
            runner = Runner(model)
            for count, length in self.lengths:
                for texts in self._starts(model, count):
                    rows = _sample(runner, texts, length, self.top_k, generator)
                    # A brace would be taken for the place of the subject.
                    plain = [text.replace("{", " ").replace("}", " ").strip() for text in _decode(model, rows)]
                    prefixes += [text + ". " for text in plain]
        return tuple(prefixes)

    def _starts(self, model: Model, count: int) -> list[Int[Tensor, "row pos"]]:
        """Token ids to begin `count` samples with, those that are of one length together."""
        bos = torch.tensor([_start_token(model)])
        if not self.starts:
            return [bos.repeat(count, 1)]
        begun = [encode(model.tokenizer, self.starts[i % len(self.starts)], prepend_bos=False)[0] for i in range(count)]
        together: dict[int, list[Tensor]] = {}
        for ids in begun:
            together.setdefault(len(ids), []).append(torch.cat([bos, ids]))
        return [torch.stack(rows) for rows in together.values()]


@plain_torch()
def sample_texts(
    model: Model,
    n_tokens: int,
    *,
    length: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
) -> list[str]:
    """Texts drawn from the model itself: a corpus for `key_stats` that needs no download.

    Args:
        model: Either class.
        n_tokens: About how many tokens to draw in all.
        length: Tokens a text.
        temperature: Temperature of the draw; 1 is the model's own distribution.
        seed: Seed of the draw; torch's global generator is left as it was.
        batch: Texts drawn at once.
        progress: Whether to show a bar on what takes longer than a second.

    Returns:
        ``ceil(n_tokens / length)`` texts.

    Raises:
        ValueError: A length or batch below 1, or longer texts than the model reads.
        UnsupportedModelError: The model isn't causal.
    """
    room = getattr(model.cfg, "n_ctx", None)
    bos_policy(model)  # it has a tokenizer
    for name, given in (("n_tokens", n_tokens), ("length", length), ("batch", batch)):
        as_whole(given, name, 0 if name == "n_tokens" else 1)
    as_whole(seed, "seed", None)
    if not as_finite(temperature, "temperature", "a finite number above 0") > 0:
        raise ValueError(f"temperature is {temperature}, needed a finite number above 0")
    if length < 1 or batch < 1 or (room is not None and length > room):
        raise ValueError(
            f"length is {length} and batch {batch}, needed 1 or more, and a length that {model_name(model)} reads: "
            f"{room} tokens at most"
        )
    texts: list[str] = []
    wanted = -(-n_tokens // length)
    start, where = _start_token(model), device(model)
    with (
        frozen(model),
        torch.no_grad(),
        told_where_it_is(model),
        _left_alone(where),
        tqdm(total=wanted, unit="text", desc="sampling text", delay=1, disable=not progress) as bar,
    ):
        if wanted > 0:
            Runner(model)  # which refuses a model that isn't causal
        torch.manual_seed(seed)
        while len(texts) < wanted:
            count = min(batch, wanted - len(texts))
            begin = torch.full((count, 1), start, device=where)
            made: Any = model.generate(
                begin,
                max_new_tokens=length,
                stop_at_eos=False,
                do_sample=True,
                temperature=temperature,
                prepend_bos=False,
                return_type="tokens",
                verbose=False,
            )
            texts += _decode(model, made[:, 1:])
            bar.update(count)
    return texts


def _left_alone(where: torch.device) -> Any:
    """PyTorch's generators of the CPU and of a device are afterwards as they were (Apple's MPS has no way to do so)."""
    if where.type in ("cpu", "mps"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[where], device_type=where.type)


def _sample(runner: Runner, rows: Tensor, length: int, top_k: int, generator: torch.Generator) -> Tensor:
    count = len(rows)
    while rows.shape[1] < length + 1:
        at = torch.full((count, 1), rows.shape[1] - 1)
        likely = runner.logits(rows, at=at)[:, 0].float().cpu().topk(top_k)
        # One uniform number a row: both classes then draw the same tokens, as their logits agree.
        ladder = likely.values.softmax(-1).cumsum(-1)
        dice = torch.rand(count, 1, generator=generator) * ladder[:, -1:]
        choice = (dice > ladder).sum(-1, keepdim=True).clamp(max=top_k - 1)
        rows = torch.cat([rows, likely.indices.gather(-1, choice)], dim=1)
    return rows[:, 1:]


def _start_token(model: Model) -> int:
    tokenizer = model.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither BOS nor EOS to begin a sample with: give your own contexts")
    return int(start)


def _decode(model: Model, rows: Tensor) -> list[str]:
    return [model.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]
