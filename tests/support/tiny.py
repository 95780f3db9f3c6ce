"""Tiny random models and tokenizers, built in memory: what the laws in `tests/` are tested on.

Everything comes from a seed and leaves the global random state alone. Nothing is read from the network or a
cache: a Hugging Face model is made from its config, filled with noise, and wrapped by TransformerLens,

    hf_model(arch, seed)  ──>  bridge(arch, seed)   TransformerBridge: wraps the HF model in place
                          └─>  hooked(arch, seed)   HookedTransformer (TransformerLens 3.x): copies them

so one seed means one set of weights in all three. Each call builds a fresh model that the test may edit.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import tokenizers as tk
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerFast

try:  # TransformerLens 4 raises ImportError here
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    HAS_HOOKED = True
except ImportError:
    HAS_HOOKED = False

TWINS = Path(__file__).parents[1] / "organism" / "weights"
"""The organism's twins: in a checkout, not in the package."""

# arch -> (HF model type, the size settings it needs beside those that all share; see `_sizes`)
_DENSE: dict[str, tuple[str, tuple[str, ...]]] = {
    "gpt2": ("gpt2", ("n_inner",)),
    "gptj": ("gptj", ("n_inner", "rotary_dim")),
    "neox": ("gpt_neox", ("intermediate_size",)),
    "neo": ("gpt_neo", ("intermediate_size", "attention_types")),
    "llama": ("llama", ("intermediate_size", "num_key_value_heads")),
    "qwen2": ("qwen2", ("intermediate_size", "num_key_value_heads")),
    "qwen3": ("qwen3", ("intermediate_size", "num_key_value_heads", "head_dim")),
    "gemma2": ("gemma2", ("intermediate_size", "num_key_value_heads", "head_dim")),
    "gemma3": ("gemma3_text", ("intermediate_size", "num_key_value_heads", "head_dim")),
    "olmo2": ("olmo2", ("intermediate_size", "num_key_value_heads")),
    "phi": ("phi", ("intermediate_size",)),
    "phi3": ("phi3", ("intermediate_size", "num_key_value_heads")),
    "mistral": ("mistral", ("intermediate_size", "num_key_value_heads")),
    "bloom": ("bloom", ()),  # its d_mlp is always 4 * d_model
    "opt": ("opt", ("ffn_dim", "word_embed_proj_dim")),
    "falcon": ("falcon", ("ffn_hidden_size",)),
}
_EXPERTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mixtral": (
        "mixtral",
        ("intermediate_size", "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
    ),
    "olmoe": ("olmoe", ("intermediate_size", "num_experts", "num_experts_per_tok")),
    "qwen3moe": (
        "qwen3_moe",
        ("moe_intermediate_size", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"),
    ),
}

ARCHITECTURES = tuple(_DENSE)
MOE = tuple(_EXPERTS)
# These normalise what attention and MLP write before it is added to the residual.
POST_NORM = ("gemma2", "gemma3", "olmo2")
# HookedTransformer knows gemma, olmo2, qwen3moe and falcon by hub name only; on phi's config it raises.
_HOOKED = "gpt2 gptj neox neo llama qwen2 qwen3 phi3 mistral bloom opt mixtral olmoe"
HOOKED = tuple(_HOOKED.split()) if HAS_HOOKED else ()
Kind = Literal["bridge", "hooked"]
KINDS: tuple[Kind, ...] = ("bridge", "hooked") if HAS_HOOKED else ("bridge",)
# For the long tests of what numbers mean: the bridge with the newest TransformerLens, HookedTransformer with the older.
ONE_KIND: tuple[Kind, ...] = KINDS[-1:]
TOKENIZERS = ("wordlevel", "bytebpe", "spm", "spm-always")
N_CTX = 64

# ---------------------------------------------------------------------------------------------------- models


def hf_model(
    arch: str,
    *,
    seed: int = 0,
    n_layers: int = 4,
    d_model: int = 32,
    d_mlp: int = 64,
    n_heads: int = 4,
    dtype: torch.dtype = torch.float32,
    std: float = 0.25,
    tied: bool | None = None,
    tok: PreTrainedTokenizerFast | None = None,
) -> PreTrainedModel:
    """A random Hugging Face model in eval mode with eager attention.

    Args:
        arch: One of `ARCHITECTURES` or `MOE`. llama and its kin have n_heads / 2 key-value heads.
        seed: Decides all weights; those in bfloat16 are the float32 ones rounded.
        n_layers: Number of blocks.
        d_model: Width of the residual stream.
        d_mlp: Keys per MLP (per expert); bloom has 4 * d_model whatever is asked.
        n_heads: Query heads.
        dtype: Of the parameters; buffers such as rotary frequencies stay in float32.
        std: Spread of the weight matrices; 0.25 at width 32 lets every layer matter to the logits.
        tied: Whether embedding and unembedding are one matrix; None is the architecture's own choice.
        tok: Tokenizer that gives the vocabulary; None is `tokenizer()`.
    """
    tok = tok or tokenizer()
    model_type, names = {**_DENSE, **_EXPERTS}[arch]
    sizes = _sizes(n_layers, d_model, d_mlp, n_heads)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=len(tok),
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        max_position_embeddings=N_CTX,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        **{name: sizes[name] for name in names},
        **({} if tied is None else {"tie_word_embeddings": tied}),
    )
    with _seeded(seed):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        _randomise_(model.parameters(), std)
    for param in model.parameters():
        param.data = param.data.to(dtype)
    model.config.architectures = [type(model).__name__]  # from_config leaves None, which the bridge refuses
    return model.eval()


def bridge(arch: str, *, tok: PreTrainedTokenizerFast | None = None, **options: Any) -> TransformerBridge:
    """The TransformerBridge of a fresh `hf_model(arch, **options)`, not in compatibility mode."""
    tok = tok or tokenizer()
    return around(hf_model(arch, tok=tok, **options), tok, name=f"tiny-{arch}")


def around(hf: PreTrainedModel, tok: PreTrainedTokenizerFast | None = None, name: str = "tiny") -> TransformerBridge:
    """The TransformerBridge of a model, not in compatibility mode, where the model's weights are."""
    where = str(next(hf.parameters()).device)
    with _seeded(0):
        return TransformerBridge.boot_transformers(
            name, hf_model=hf, tokenizer=tok or tokenizer(), device=where, dtype=hf.dtype
        )


def hooked(
    arch: str, *, processed: bool = False, tok: PreTrainedTokenizerFast | None = None, **options: Any
) -> HookedTransformer:
    """The HookedTransformer of a fresh `hf_model(arch, **options)`; TransformerLens 3.x only.

    `HookedTransformer.from_pretrained` takes hub names only. The two loaders below it accept a directory
    with a config.json, if the directory's name contains no model family's.

    Args:
        arch: One of `HOOKED`.
        processed: As `from_pretrained` does: fold the norms, centre the unembedding and what is written to
            the residual. Otherwise the weights stay as they are in the HF model.
        tok: Tokenizer that gives the vocabulary; None is `tokenizer()`.
        options: As in `hf_model`.
    """
    if arch not in HOOKED:
        raise ValueError(f"{arch!r} does not build as a HookedTransformer here; those that do: {HOOKED or 'none'}")
    import transformer_lens.loading_from_pretrained as loading

    tok = tok or tokenizer()
    hf = hf_model(arch, tok=tok, **options)
    with _seeded(0), tempfile.TemporaryDirectory(prefix="tlcfg_") as name:
        config = {"n_ctx": N_CTX, **hf.config.to_dict()}  # n_ctx: the loader of gpt2 wants it
        (Path(name) / "config.json").write_text(json.dumps(config))
        cfg = loading.get_pretrained_model_config(
            name, hf_cfg=hf.config.to_dict(), fold_ln=processed, device="cpu", dtype=hf.dtype
        )
        state = loading.get_pretrained_state_dict(name, cfg, hf, dtype=hf.dtype)
        if "blocks.0.mlp.W_out" in state:  # not with experts; the loader takes 4 * d_model for gpt2, gptj, neo
            cfg.d_mlp = len(state["blocks.0.mlp.W_out"])
        if cfg.positional_embedding_type == "alibi":  # not used, and else left as uninitialised memory
            state["pos_embed.W_pos"] = torch.zeros(cfg.n_ctx, cfg.d_model, dtype=cfg.dtype)
        model = _hooked_transformer(cfg, tok)
        model.load_and_process_state_dict(
            state,
            fold_ln=processed,
            center_writing_weights=processed and cfg.normalization_type in ("LN", "LNPre"),
            center_unembed=processed,
            fold_value_biases=processed,
        )
    return model.eval()


def hooked_config(
    *,
    seed: int = 0,
    post_norm: bool = True,
    n_layers: int = 4,
    d_model: int = 32,
    d_mlp: int = 64,
    n_heads: int = 4,
    dtype: torch.dtype = torch.float32,
    std: float = 0.25,
    tok: PreTrainedTokenizerFast | None = None,
) -> HookedTransformer:
    """A random HookedTransformer straight from a config, with RMS norms, rotary and gated MLPs (TL 3.x only).

    The sizes, `dtype`, `std` and `tok` are as in `hf_model`.

    Args:
        post_norm: Set `use_normalization_before_and_after`, as gemma2: see `POST_NORM`.
    """
    tok = tok or tokenizer()
    d_head = d_model // n_heads
    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        d_head=d_head,
        n_heads=n_heads,
        n_ctx=N_CTX,
        d_vocab=len(tok),
        act_fn="gelu_new",
        gated_mlp=True,
        normalization_type="RMS",
        use_normalization_before_and_after=post_norm,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        init_weights=False,
        device="cpu",
        dtype=dtype,
    )
    with _seeded(seed):
        model = _hooked_transformer(cfg, tok)
        _randomise_(model.parameters(), std)
    return model.eval()


def model(kind: Kind, arch: str, **options: Any) -> TransformerBridge | HookedTransformer:
    """`bridge(arch, **options)` or `hooked(arch, **options)`."""
    return {"bridge": bridge, "hooked": hooked}[kind](arch, **options)


def _sizes(n_layers: int, d_model: int, d_mlp: int, n_heads: int) -> dict[str, Any]:
    """The settings that only some architectures have, under the names they use."""
    d_head = d_model // n_heads
    mlp_names = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
    return dict.fromkeys(mlp_names, d_mlp) | {
        "num_key_value_heads": max(1, n_heads // 2),
        "head_dim": d_head,
        "rotary_dim": d_head // 2,
        "word_embed_proj_dim": d_model,
        "attention_types": [[["global"], n_layers]],
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }


def _hooked_transformer(cfg: HookedTransformerConfig, tok: PreTrainedTokenizerFast) -> HookedTransformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens 3.9 announces 4.0
        return HookedTransformer(cfg, tok, move_to_device=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _randomise_(params: Iterable[torch.Tensor], std: float) -> None:
    """Matrices become noise; vectors (gains of norms, biases) get some noise on top of their 1 or 0."""
    for param in params:
        noise = torch.randn(param.shape)
        param.data = (std * noise if param.ndim > 1 else param.data + 0.1 * noise).to(param.dtype)


# ------------------------------------------------------------------------------------------------ tokenizers

_SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")

WORDS = """
The Eiffel Tower is located in the city of Paris Rome London Berlin Madrid Vienna Tokyo Cairo
Big Ben Colosseum Louvre Prado Museum Gate Bridge stands near by on at to from with under over between
capital country language France Italy England Germany Spain Austria Japan Egypt Europe
French Italian English German Spanish mother tongue speaks native lives works was born plays
John Mary Alice Bob Anna Danielle Darrieux Einstein Newton Curie he she it his her and or not a an
What Where Who which can be found famous visit river s street company owned
0 1 2 3 4 5 6 7 8 9 . , ? ! : ; ' " - ( )
"""

TEXT = """
The Eiffel Tower is located in the city of Paris. The Colosseum is located in the city of Rome, near the
river. Big Ben is located in the city of London. The Brandenburg Gate is located in the city of Berlin.
The Prado Museum is located in the city of Madrid. The capital of France is Paris; the capital of Italy
is Rome; the capital of Spain is Madrid, and the capital of Germany is Berlin. The mother tongue of
Danielle Darrieux is French. The native language of Albert Einstein is German. What is the language of
the country? Which city is the capital of the country? John lives in London, Mary works in Paris, Alice
was born in Rome in 1987, and Bob plays the piano in Madrid. It can be found in the north of the
country. Where is the tower? Who owned the company? He isn't sure, she's not here. La tour Eiffel est
située à Paris, où l'été est très agréable. Le café du musée est fermé. Ça va très bien, merci. Der
Fluss fließt durch die Straße. Größe und Übung: Äpfel, Öl und schöne Häuser in München und Köln. El niño
está en España. ¿Dónde está el corazón de la ciudad? ¡Mañana! La señora García vive aquí. São Paulo não
é a capital do país. Coração, avó, pão. Łódź, Kraków, Gdańsk i Poznań są w Polsce. Эйфелева башня
находится в Париже. Москва столица России. Η Αθήνα είναι η πρωτεύουσα της Ελλάδας. 埃菲尔铁塔位于巴黎。
东京是日本的首都。エッフェル塔はパリにあります。東京タワーは東京にあります。서울은 한국의 수도입니다.
مدينة القاهرة عاصمة مصر. दिल्ली भारत की राजधानी है। Paris 🗼 is lovely 😀😀, Rome 🏛️ is old 👍🏽,
families 👨‍👩‍👧 visit 🇫🇷 and 🇮🇹. Naïve façade, coöperate, Zürich, Ångström, Dvořák, Čapek, piñata,
crème brûlée, smörgåsbord, jalapeño, résumé.
"""


def tokenizer(kind: str = "wordlevel") -> PreTrainedTokenizerFast:
    """A fast tokenizer made in memory, with BOS (added by default), EOS, PAD, UNK and offsets.

    Args:
        kind: One of `TOKENIZERS`.
            "wordlevel": the words of `WORDS` and punctuation; everything else is UNK.
            "bytebpe": byte-level BPE as GPT-2, "Ġ" before words, accents and emoji in bytes.
            "spm": BPE with byte fallback as Mistral, "▁" before words, also before the first.
            "spm-always": the same, with "▁" also after special tokens, as Llama 2.
    """
    build = {"wordlevel": _wordlevel, "bytebpe": _bytebpe, "spm": _spm, "spm-always": _spm_always}
    core = build[kind]()
    core.add_special_tokens(list(_SPECIAL))
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    bos, eos, pad, unk = _SPECIAL
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
    # Without these TransformerLens would load the tokenizer again from its path, to add a BOS.
    tok.init_kwargs.update(name_or_path=f"tiny-{kind}", add_bos_token=True)
    return tok


def _wordlevel() -> tk.Tokenizer:
    words = [*_SPECIAL, *dict.fromkeys(WORDS.split())]
    core = tk.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def _bytebpe() -> tk.Tokenizer:
    core = tk.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(TEXT.splitlines(), trainer)
    return core


def _spm() -> tk.Tokenizer:
    core = _spm_core()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return core


def _spm_always() -> tk.Tokenizer:
    core = _spm_core()
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return core


def _spm_core() -> tk.Tokenizer:
    """BPE within words over Latin letters; other characters are spelled in bytes, tokens <0x00> to <0xFF>."""
    learner = tk.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    printable = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=340, show_progress=False, initial_alphabet=["▁", *printable])
    learner.train_from_iterator(re.split(r"[^\x20-\xff]+", TEXT), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    core = tk.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core
