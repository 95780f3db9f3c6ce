"""Editors by their names: the one place where a name on the command line becomes a value."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tl_factedit.backend.protocol import Model, as_layers
from tl_factedit.cli.output import step
from tl_factedit.cli.statistics import add_stats_options, check_stats_options, stats_of
from tl_factedit.core.facts import Fact
from tl_factedit.editing.edit import Edit, Editor
from tl_factedit.editors.alphaedit import AlphaEdit
from tl_factedit.editors.emmet import Emmet
from tl_factedit.editors.finetune import FineTune
from tl_factedit.editors.knowledge_neurons import KnowledgeNeurons
from tl_factedit.editors.memit import Memit
from tl_factedit.editors.pmet import Pmet
from tl_factedit.editors.rome import Rome

LAYERWISE = {"memit": Memit, "emmet": Emmet, "alphaedit": AlphaEdit, "pmet": Pmet}
WITHOUT_STATISTICS = ("finetune", "knowledge-neurons")
NAMES = ("rome", *LAYERWISE, *WITHOUT_STATISTICS)


def add_editor_options(parser: argparse.ArgumentParser) -> None:
    """Which editor, where, and with what settings."""
    group = parser.add_argument_group("editor")
    group.add_argument("--editor", choices=NAMES, default="rome", help="the method (default: rome)")
    group.add_argument(
        "--layer", type=int, nargs="+", metavar="N", help="the layer to edit; several for memit and its kin"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the editor by its name in Python, such as ridge=0.01, or fit.steps=30 (may be repeated)",
    )
    add_stats_options(parser)


def check_editor_options(args: argparse.Namespace, facts: Sequence[Fact]) -> None:
    """Check what is given before a model is loaded.

    Raises:
        FileNotFoundError: A file that isn't there.
        ValueError: No layer where one is needed, more facts or layers than the method writes, no statistics.
    """
    name, layers = args.editor, list[int](args.layer or ())
    if name == "rome" and len(facts) > 1:
        raise ValueError(
            f"rome writes one fact, and {len(facts)} are given: choose one with --id or --first 1, or take memit"
        )
    if not layers and name != "knowledge-neurons":
        raise ValueError(
            f"{name} needs --layer: what a paper gives for this model, or one that `tl-factedit trace` finds to carry "
            "the subject"
        )
    if name == "rome" and len(layers) > 1:
        raise ValueError(f"rome writes one layer, and --layer names {len(layers)}: take one, or memit")
    if name not in WITHOUT_STATISTICS:
        check_stats_options(args)
        return
    given = [each for each in ("stats", "stats_texts", "stats_tokens") if getattr(args, each) is not None]
    if given:
        raise ValueError(f"{name} takes no statistics: leave --{given[0].replace('_', '-')} out")


def make_edit(args: argparse.Namespace, model: Model, facts: Sequence[Fact]) -> Edit:
    """Make the edit that is asked for; the model's weights are as before."""
    editor = editor_of(args, model)
    step(args, f"editing with {args.editor}")
    return editor(model, list(facts))


def editor_of(args: argparse.Namespace, model: Model) -> Editor:
    """The editor that is asked for, ready to be called.

    Raises:
        ValueError: Statistics that don't fit, or settings that it hasn't got.
    """
    layers, progress = None if args.layer is None else as_layers(args.layer), not args.quiet
    make: Callable[..., Editor]
    if args.editor == "knowledge-neurons":
        make = partial(KnowledgeNeurons, layers=layers, progress=progress)
    elif args.editor == "finetune":
        make = partial(FineTune, layers or (), progress=progress)
    else:
        kind = Rome if args.editor == "rome" else LAYERWISE[args.editor]
        make = partial(kind, stats_of(args, model, layers or ()), progress=progress)
    return with_settings(make, args.set)


def with_settings(make: Callable[..., Any], given: Sequence[str]) -> Any:
    """An editor with some settings.

    Args:
        make: Makes it, with the default settings or with those that are given by name.
        given: ``"name=value"``; a name with a dot is a setting of a setting. Values are JSON, or else text.

    Raises:
        ValueError: There is no such setting, or it can't be said in a word.
    """
    usual, settings = make(), dict[str, Any]()
    for each in given:
        name, equals, text = each.partition("=")
        if not equals:
            raise ValueError(f"--set {each!r} has no '=', needed NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        first, dot, rest = name.partition(".")
        if dot and first == "fit" and first in {field.name for field in dataclasses.fields(usual)}:
            fit = settings.get(first, usual.fit)
            _check_setting(fit, rest, each)
            settings[first] = dataclasses.replace(fit, **{rest: value})
        else:
            _check_setting(usual, name, each)
            settings[name] = value
    return make(**settings)


def _check_setting(holder: Any, name: str, given: str) -> None:
    """Check that a setting can be said in a word: a number, a text, true, false or null."""
    now = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder) if field.init}
    plain = [name for name, held in now.items() if held is None or isinstance(held, bool | int | float | str)]
    plain = [name for name in plain if name not in ("layers", "progress")]
    if name not in plain:
        further = ", and those of fit, such as fit.steps" if "fit" in now else ""
        raise ValueError(
            f"--set {given!r}: {type(holder).__name__} has no setting {name!r} that can be set here; there are "
            f"{', '.join(plain)}{further}"
        )
