"""Pictures: what is drawn is what is there, nothing is fetched, and no text can break out of its place."""

import base64
import dataclasses
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from jaxtyping import TypeCheckError

from tl_factedit import evaluation, show
from tl_factedit.auditing.audit import audit
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editors.rome import Rome
from tl_factedit.evaluation.edit_gains import gains
from tl_factedit.evaluation.in_words import answers
from tl_factedit.evaluation.scores import evaluate
from tl_factedit.locate.corruption import GaussianNoise, GivenNoise
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import ROLES
from tl_factedit.show import reports
from tl_factedit.show.heat_map import RAMPS, Scale
from tl_factedit.show.line_chart import Line, line_chart
from tl_factedit.show.markup import Html, clip, columns, number, tag, text, to_json, token
from tl_factedit.show.page import coloured_tokens
from tl_factedit.show.svg import NEUTRAL, nice, tick_text
from tl_factedit.stats.key_stats import KeyStats

EVIL = '</script><script>alert(1)</script>"><img src=x onerror=alert(2)><!--<script>'
FACT = Fact(
    "The Eiffel Tower",
    "{} is located in the city of",
    " Paris",
    " Rome",
    paraphrases=("Where is {} ? It stands in",),
    neighbours=("The Louvre is located in the city of",),
    controls=(" London", " Berlin", " Madrid"),
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page in order, with their attributes, texts and nesting checked."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attrs):
        self.elements.append((name, {key: value or "" for key, value in attrs}))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attrs):
        self.elements.append((name, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"</{name}> closes nothing"

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, name: str, **attributes: str) -> list[dict[str, str]]:
        return [
            found
            for element, found in self.elements
            if element == name and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]

    def words(self, inside: str | None = None) -> str:
        hidden = ("script", "style")
        return " ".join(data for where, data in self.texts if where == (inside or where) and where not in hidden)


def cells(page: Page) -> list[tuple[int, int, float]]:
    """(layer, position, value) of every cell's tooltip."""
    pattern = re.compile(r"^layer (\d+), .* \(position (\d+)\): (0 exactly|[+−]?[\d.e−]+)", re.DOTALL)
    found = [pattern.match(data) for where, data in page.texts if where == "title"]
    return [(int(m[1]), int(m[2]), float(m[3].replace("−", "-").replace(" exactly", ""))) for m in found if m]


def fetched(page: Page) -> list[str]:
    """Every place in a page that a browser would load something from."""
    loads = ("src", "href", "srcset", "poster", "data", "action", "background")
    named = [
        f"{element} {key}={value}" for element, found in page.elements for key, value in found.items() if key in loads
    ]
    styles = " ".join(
        [data for where, data in page.texts if where == "style"] + [f.get("style", "") for _, f in page.elements]
    )
    return named + re.findall(r"@import|url\(", styles)


@pytest.fixture(scope="module", params=tiny.KINDS)
def made(request: pytest.FixtureRequest):
    """A model of each class, and one result of each kind on it."""
    model = tiny.model(request.param, "gpt2")
    trace = causal_trace(model, FACT, corruption=GaussianNoise(samples=3), progress=False)
    rome = Rome(KeyStats.identity(model, 1), fit=ValueFit(steps=2), contexts=("",), progress=False)
    edit = rome(model, [FACT])
    return {
        "model": model,
        "trace": trace,
        "edit": edit,
        "verdict": audit(model, edit, [FACT]),
        "scores": evaluate(model, [FACT]),
        "answers": said_by(model, edit),
        "ripples": evaluation.ripples(model, edit, A_CASE, n_tokens=3),
        "elicited": evaluation.elicit(model, edit, FACT, samples=3, n_tokens=3),
    }


A_CASE = evaluation.EditCase(
    [FACT],
    [
        evaluation.Question("near", [evaluation.Query("Big Ben is in", ["Rome"], old=["Paris"])]),
        evaluation.Question(
            "far", [evaluation.Query("Big", ["x"])], conditions=[evaluation.Query("Ben", ["<nothing>"])]
        ),
    ],
)


def said_by(model, edit):
    before = answers(model, FACT, n_tokens=3)
    with edit.applied(model):
        return answers(model, FACT, n_tokens=3, before=before)


def pictures(made) -> dict[str, show.Picture]:
    return {
        "trace": show.trace(made["trace"]),
        "edit": show.edit(made["model"], made["edit"], FACT.text),
        "verdict": show.verdict(made["verdict"]),
        "scores": show.scores(made["verdict"].before, made["verdict"].after),
        "answers": show.answers(made["answers"]),
        "ripples": show.ripples(made["ripples"]),
        "elicited": show.elicited(made["elicited"]),
    }


# ------------------------------------------------------------------------------------------ every picture


def test_every_picture_is_one_valid_page_that_fetches_nothing(made):
    for name, picture in pictures(made).items():
        page = Page(picture.html)
        assert picture.html.startswith("<!DOCTYPE html>\n<html lang="), name
        assert len(page.all("html")) == len(page.all("head")) == len(page.all("body")) == 1
        assert fetched(page) == [], name
        assert page.all("meta", charset="utf-8")
        policy = next(f["content"] for f in page.all("meta") if f.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy
        assert not page.all("iframe") and not page.all("link") and not page.all("img")
        assert all(f["role"] == "img" and f["aria-label"] for f in page.all("svg") if "role" in f)


def test_only_a_picture_of_tokens_brings_a_script_and_only_one(made):
    found = {name: len(Page(p.html).all("script")) for name, p in pictures(made).items()}
    assert {name for name, scripts in found.items() if scripts} == {"edit"} and found["edit"] == 1


def test_what_a_notebook_shows_has_no_page_around_it_and_its_own_background(made):
    for picture in pictures(made).values():
        page = Page(picture._repr_html_())
        assert not page.all("html") and not page.all("body")
        assert fetched(page) == []
        assert ".tlf{background:#fff" in picture._repr_html_()
        assert picture.title in page.words("h3")


def test_a_picture_saves_what_it_is(made, tmp_path: Path):
    picture = show.trace(made["trace"])
    path = picture.save(str(tmp_path / "trace.html"))
    assert path == tmp_path / "trace.html"
    assert path.read_text(encoding="utf-8") == picture.html
    assert len(repr(picture)) < 80 and "Causal trace" in repr(picture)


def test_drawing_twice_gives_the_same_page(made):
    first, second = pictures(made), pictures(made)
    assert all(first[name].html == second[name].html for name in first)


# ------------------------------------------------------------------------------------------------ heat map


def test_a_heat_map_has_one_cell_for_each_layer_and_token_with_the_trace_s_own_numbers(made):
    trace = made["trace"]
    page = Page(show.trace(trace).html)
    _, layers, positions = trace.effect.shape
    assert len(page.all("rect", class_="cell")) == layers * positions
    found = cells(page)
    assert [(layer, p) for layer, p, _ in found] == [(layer, p) for p in range(positions) for layer in range(layers)]
    for layer, position, value in found:
        assert value == pytest.approx(float(trace.effect[0, layer, position]), abs=6e-5)


def test_a_wrong_number_would_show(made):
    trace = made["trace"]
    changed = replace(trace, effect=trace.effect.clone())
    start = trace.subject[0][0]
    changed.effect[0, 1, start] += 0.25
    value = next(v for layer, p, v in cells(Page(show.trace(changed).html)) if (layer, p) == (1, start))
    assert value == pytest.approx(float(trace.effect[0, 1, start]) + 0.25, abs=6e-5)


def test_the_subject_is_marked_and_nothing_else(made):
    trace = made["trace"]
    start, stop = trace.subject[0]
    page = Page(show.trace(trace).html)
    assert len(page.all("rect", class_="subject")) == 1
    labels = [f for f in page.all("text") if "mono" in f.get("font-family", "")]
    bold = [i for i, f in enumerate(labels) if f.get("font-weight") == "bold"]
    assert bold == list(range(start, stop))
    stars = [data for where, data in page.texts if where == "text" and data.endswith("*")]
    assert len(stars) == stop - start


def test_cells_before_the_subject_are_neutral_and_say_exactly_0(made):
    trace = made["trace"]
    start = trace.subject[0][0]
    assert start > 0  # BOS
    picture = show.trace(trace).html
    fills = [f["fill"] for f in Page(picture).all("rect", class_="cell")]
    grey = [fill == NEUTRAL for fill in fills]
    layers = trace.effect.shape[1]
    assert grey == [i < start * layers for i in range(len(fills))]
    assert picture.count("0 exactly (before the subject)") == start * layers


def test_cells_without_a_number_are_not_drawn(made):
    trace = made["trace"]
    holed = replace(trace, effect=trace.effect.clone())
    holed.effect[0, 0, -1] = math.nan
    page = Page(show.trace(holed).html)
    assert len(page.all("rect", class_="cell")) == trace.effect[0].numel() - 1
    assert "nan" not in show.trace(holed).html.lower()


def test_of_several_facts_one_is_drawn_with_its_own_tokens(made):
    short = Fact("Big Ben", "{} is in", " London")
    trace = causal_trace(made["model"], [FACT, short], corruption=GaussianNoise(samples=1), progress=False)
    page = Page(show.trace(trace, fact=1).html)
    assert len(page.all("rect", class_="cell")) == trace.effect.shape[1] * len(trace.tokens[1])
    assert "±" not in page.words("figcaption")  # one sample has no spread
    with pytest.raises(ValueError, match="fact is 2, but the trace has 2"):
        show.trace(trace, fact=2)


def test_columns_whose_window_is_cut_are_hatched_and_said_to_be(made):
    wide = replace(made["trace"], window=2)
    assert wide.partial_window
    said = "window cut by the model's end"
    assert said in Page(show.trace(wide).html).words() and said not in Page(show.trace(made["trace"]).html).words()


@pytest.mark.parametrize(
    "noise, said",
    [
        (GaussianNoise(scale=2.0, sigma=0.125), "2 × the embeddings' spread, σ = 0.125"),
        (GivenNoise(torch.zeros(3, 3, 32)), "given as numbers"),
    ],
)
def test_the_caption_says_what_the_noise_was(made, noise, said):
    assert said in Page(show.trace(replace(made["trace"], corruption=noise)).html).words("figcaption")


def test_a_fact_the_model_does_not_know_is_announced(made):
    unknown = replace(made["trace"], known=(False,))
    known = replace(made["trace"], known=(True,))
    assert "little to trace" in show.trace(unknown).html and "little to trace" not in show.trace(known).html


def test_units_follow_the_metric(made):
    assert "probability of ' Paris'" in Page(show.trace(made["trace"]).html).words()
    assert "nats" in Page(show.trace(replace(made["trace"], metric="logprob")).html).words()


# ------------------------------------------------------------------------------------------------ colours


def test_zero_is_white_and_depth_means_size_on_both_sides():
    scale = Scale.of([-0.5, 0.25, math.nan, 1.0])
    assert (scale.low, scale.high) == (-0.5, 1.0)
    assert scale.colour(0.0) == "#ffffff"
    assert scale.colour(1.0) == RAMPS["purple"][-1]
    assert scale.colour(-0.5) == RAMPS["orange"][4]  # half the limit is half the ramp
    assert Scale.of([]).colour(0.5).startswith("#") and Scale.of([-1.0]).colour(-1.0) == RAMPS["orange"][-1]


@pytest.mark.parametrize("hue", RAMPS)
def test_a_ramp_only_gets_darker(hue):
    def light(colour: str) -> float:
        r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    scale = Scale(0.0, 1.0, hue)
    shades = [light(scale.colour(i / 50)) for i in range(51)]
    assert all(a > b for a, b in pairwise(shades))


# -------------------------------------------------------------------------------------------------- tokens


def test_tokens_carry_the_edit_s_gains(made):
    fired = gains(made["model"], made["edit"], FACT.text)
    page = Page(show.edit(made["model"], made["edit"], FACT.text).html)
    (place,) = page.all("div", class_="tlf-tokens")
    props = _json(place["data-props"])
    assert props["tokens"] == [str(text(piece)) for piece in fired.tokens]
    assert props["values"] == pytest.approx(fired.strength.tolist(), abs=6e-5)
    assert props["maxValue"] == -props["minValue"] >= 1.0
    numbers = [data for where, data in page.texts if where == "td"]
    assert [number(g) for g in fired.strength.tolist()] == [n for n in numbers if re.fullmatch(r"[−\d.e]+", n)]


def test_showing_an_edit_leaves_the_weights(made):
    before = [p.detach().clone() for p in made["model"].parameters()]
    show.edit(made["model"], made["edit"], FACT.text)
    assert all(torch.equal(a, b) for a, b in zip(before, made["model"].parameters(), strict=True))


def test_tokens_are_there_without_any_script(made):
    page = Page(show.edit(made["model"], made["edit"], FACT.text).html)
    assert "Eiffel" in page.words("span") and "Tower" in page.words("span")


def test_a_gain_that_is_nan_becomes_null_and_white():
    drawn = coloured_tokens(["a", "b"], [math.nan, 0.5], limit=1.0)
    (place,) = Page(drawn).all("div")
    assert _json(place["data-props"])["values"] == [None, 0.5]
    assert "nan" not in drawn.lower()


def test_white_space_in_tokens_is_visible_and_still_breaks_lines():
    page = Page(coloured_tokens(["a\n", "\tb", " c"], [0.0, 0.0, 0.0], limit=1.0))
    assert page.words("span").split(" ") == ["a⏎", "⇥b", "\N{NO-BREAK SPACE}c"] and len(page.all("br")) == 1


@pytest.mark.parametrize(
    "piece, shown", [(" Paris", "␣Paris"), ("\n\t", "⏎⇥"), ("  ", "␣␣"), ("", "∅"), ("if ", "if␣")]
)
def test_labels_of_tokens(piece, shown):
    assert token(piece) == shown


# -------------------------------------------------------------------------------------------- hostile text


def hostile(made):
    """The results with every text of a user, tokenizer or model replaced by one that tries to break out."""
    bad = replace(FACT, subject=EVIL, target_true=EVIL, target_new=EVIL, id=None)
    origin = replace(made["trace"].provenance, model=EVIL, versions={EVIL: EVIL})
    trace, verdict = made["trace"], made["verdict"]

    def evil(score):
        answers = tuple(replace(a, prompt=EVIL, true=EVIL, new=EVIL) for a in score.answers)
        return replace(score, facts=(bad,), answers=answers, provenance=origin)

    return {
        "trace": replace(
            trace,
            tokens=((EVIL,) * len(trace.tokens[0]),),
            facts=(bad,),
            top=(EVIL,),
            known=(False,),
            provenance=origin,
        ),
        "verdict": replace(
            verdict,
            facts=(bad,),
            reasons=(EVIL,),
            missing=(EVIL,),
            before=evil(verdict.before),
            after=evil(verdict.after),
            gains=tuple(replace(g, tokens=(EVIL,) * len(g.tokens)) for g in verdict.gains),
        ),
        "scores": evil(made["scores"]),
    }


def test_text_that_looks_like_markup_stays_text(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fired = gains(made["model"], made["edit"], FACT.text)
    monkeypatch.setattr(
        "tl_factedit.show.edits.gains", lambda *a, **k: replace(fired, tokens=(EVIL,) * len(fired.tokens))
    )
    bad_edit = replace(made["edit"], facts=(Fact(EVIL, "{} is in", " Paris", EVIL),))
    edit = show.edit(made["model"], bad_edit, EVIL)
    results = hostile(made)
    path = show.report(
        tmp_path / "r.html", EVIL, (EVIL, EVIL), (EVIL, results["trace"]), *results.values(), edit, title=EVIL
    )
    for page in [
        Page(path.read_text("utf-8")),
        *(Page(reports._drawn(r).html) for r in results.values()),
        Page(edit._repr_html_()),
    ]:
        assert len(page.all("script")) == int(
            bool(page.all("div", class_="tlf-tokens")) and "data-props" in str(page.elements)
        )
        assert not page.all("img")
        assert not any(key.startswith("on") for _, found in page.elements for key in found)
        assert "alert(1)" in page.words()


def test_circuitsvis_gets_tokens_that_are_inert_as_html_too():
    """Its component writes tokens with innerHTML, so JSON alone is not enough."""
    (place,) = Page(coloured_tokens([EVIL], [1.0], limit=1.0)).all("div")
    inner = Page(_json(place["data-props"])["tokens"][0])
    assert inner.elements == [] and inner.words() == EVIL


def test_the_policy_admits_exactly_the_script_that_is_there(made):
    def policy(page: Page) -> str:
        return next(f["content"] for f in page.all("meta") if f.get("http-equiv") == "Content-Security-Policy")

    page = Page(show.edit(made["model"], made["edit"], FACT.text).html)
    (script,) = (data for where, data in page.texts if where == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy(page)
    assert "script-src 'none'" in policy(Page(show.trace(made["trace"]).html))


def test_characters_that_cannot_be_written_or_would_hide_are_replaced(tmp_path: Path):
    path = show.report(tmp_path / "r.html", "a\x00b\ud800c\u202ed\x7f")
    assert "a␀b�c�d�" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["<b>", "a & b", "</script>", "\u2028", "\ud800"])
def test_json_is_inert_and_comes_back(value):
    coded = to_json({"v": [value, math.nan, math.inf, 1.5]})
    assert not set("<>&\u2028") & set(coded)
    assert _json(coded) == {"v": [value, None, None, 1.5]}


def test_plain_strings_are_escaped_and_markup_is_not():
    assert tag("b", "<", Html("<i>"), None, title='"&') == '<b title="&quot;&amp;">&lt;<i></b>'
    assert tag("meta", name="x") == '<meta name="x">'


# ------------------------------------------------------------------------------------------------- verdict


def test_a_verdict_says_label_axes_reasons_and_what_is_missing(made):
    verdict = made["verdict"]
    words = Page(show.verdict(verdict).html).words()
    for said in (
        verdict.label,
        verdict.retained.says,
        verdict.recoverable.says,
        *verdict.reasons,
        *verdict.missing,
    ):
        assert said in words
    assert "one fact: descriptive" in words and FACT.subject in words


def test_the_axes_show_their_estimates_once_they_are_gathered(made):
    axis = replace(made["verdict"].retained, estimate=Estimate(0.5, 0.25, 0.75, 8))
    assert "0.50 [0.25, 0.75] (n = 8)" in show.verdict(replace(made["verdict"], retained=axis)).html


@pytest.mark.parametrize(
    "label", ["FAILED", "DAMAGED", "ERASED", "MOVED", "INSERTED", "LATENT", "SCARRED", "INCONCLUSIVE"]
)
def test_every_label_has_a_badge(made, label):
    page = Page(show.verdict(replace(made["verdict"], label=label)).html)
    (badge,) = page.all("span", class_="tlf-badge")
    assert badge["style"].startswith("background:#")


def test_curves_carry_their_numbers_and_the_critical_dose_is_marked(made):
    verdict = made["verdict"]
    dose = replace(verdict.dose, margin=(verdict.dose.doses - 0.3)[None])
    page = Page(show.verdict(replace(verdict, dose=dose)).html)
    assert [data for where, data in page.texts if where == "title" and data == "critical dose 0.30"]
    logp = verdict.lens.after.at(position="last", quantity="logp_old")[0]
    assert f"old object, after, 2: {number(float(logp[2]), 2)}" in page.words("title")
    assert "Share of controls below" in page.words("text")


def test_evidence_that_is_not_there_is_not_drawn(made):
    verdict = replace(made["verdict"], dose=None, upstream=None, gains=())
    words = Page(show.verdict(verdict).html).words()
    assert "Dose curve" not in words and "edited layer" not in words and "Where the edit fires" not in words
    nothing = replace(verdict.lens.before, values=torch.full_like(verdict.lens.before.values, math.nan))
    page = show.verdict(replace(verdict, lens=replace(verdict.lens, before=nothing, after=nothing))).html
    assert "no numbers" in page and "nan" not in page.lower()


def test_a_population_gets_means_intervals_and_a_row_each(made):
    model, other = made["model"], FACT.but(subject="Big Ben", paraphrases=(), neighbours=())
    verdict = audit(model, made["edit"], [FACT, other], force=True)
    page = Page(show.verdict(verdict).html)
    assert "2 facts: descriptive" in page.words() and "Big Ben" in page.words("td")
    assert "mean over 2 facts" in page.words() and "95% bootstrap interval" in page.words()


# -------------------------------------------------------------------------------------------------- scores


def test_scores_before_and_after_are_of_the_same_prompts(made):
    before, after = made["verdict"].before, made["verdict"].after
    words = Page(show.scores(before, after).html).words("td")
    for answer in after.answers:
        assert answer.prompt in words and number(math.exp(-answer.nll_new)) in words
    other = replace(after, answers=after.answers[:-1])
    with pytest.raises(ValueError, match="needed the same prompts"):
        show.scores(before, other)


def test_scores_of_one_model_have_one_column(made):
    assert "before" not in Page(show.scores(made["scores"]).html).words("th")


# ------------------------------------------------------------------------------------------ what a model says


def test_answers_stand_before_and_after_with_the_old_object_marked(made):
    found = made["answers"]
    old = FACT.target_true.strip()
    first = replace(found.each[0], said=f" in {old}, of course", names_old=True)
    page = Page(show.answers(replace(found, each=(first, *found.each[1:]))).html)
    assert (
        old in page.words("b")
        and "in" in page.words("td")
        and f"The gap after prompts is {found.gap:.2f}" in page.words()
    )
    for answer in found.before.each:
        assert (answer.said.strip() or "(nothing)").split()[0] in page.words("td")
    one = Page(show.answers(replace(found, before=None)).html)
    assert "says before" in page.words("th") and "says before" not in one.words("th")


def test_ripples_say_what_counts_and_what_was_said(made):
    found = made["ripples"]
    page = Page(show.ripples(found).html)
    assert "none of 1 questions counts" in page.words("text") and "doesn't count" in page.words("td")
    assert "near: right" in page.words("text") and "the old answer" in page.words("text")
    right = replace(found.asked[0], right=True)
    assert "yes" in Page(show.ripples(replace(found, asked=(right, found.asked[1]))).html).words("td")


def test_what_is_sampled_stands_beside_its_null(made):
    page = Page(show.elicited(made["elicited"]).html)
    assert "a control, of the samples, after" in page.words("text") and "3 samples of each prompt" in page.words()


@pytest.mark.parametrize("name", ["answers", "ripples", "elicited"])
def test_another_kind_of_result_is_refused(made, name):
    with pytest.raises((TypeError, TypeCheckError), match=r"needed|Type-check"):
        getattr(show, name)(made["scores"])


# -------------------------------------------------------------------------------------------------- report


def test_a_report_holds_everything_once_and_circuitsvis_once(made, tmp_path: Path):
    edit = show.edit(made["model"], made["edit"], FACT.text)
    items = [
        "First.\n\nSecond.",
        ("Where it is", made["trace"]),
        edit,
        edit,
        ("Again", edit),
        made["verdict"],
        made["scores"],
        made["answers"],
        made["ripples"],
        made["elicited"],
    ]
    path = show.report(str(tmp_path / "report.html"), *items, title="A fact")
    assert path == tmp_path / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert len(page.all("script")) == 1 and source.count("var CircuitsVis=") == 1
    assert len([f for f in page.all("div", class_="tlf-tokens") if "data-props" in f]) == 3
    assert "sourceMappingURL" not in source and fetched(page) == []
    heads = [data for where, data in page.texts if where == "h2"]
    assert heads[:3] == ["Where it is", "Where the edit fires", "Where the edit fires"] and "Again" in heads
    assert page.words("h1") == "A fact" and {"First.", "Second."} <= {d for w, d in page.texts if w == "p"}
    origin = made["trace"].provenance
    assert page.words("code").split().count(str(origin.weights)) == 1
    for said in (origin.model, f"torch {origin.versions['torch']}", "with BOS"):
        assert said in page.words("td")


def test_a_report_without_tokens_brings_no_script(made, tmp_path: Path):
    path = show.report(tmp_path / "report.html", made["trace"])
    assert not Page(path.read_text("utf-8")).all("script") and path.stat().st_size < 200_000


def test_a_page_takes_the_place_of_a_page_alone(made, tmp_path: Path):
    path = tmp_path / "edit.safetensors"
    made["edit"].save(path)
    before = path.read_bytes()
    for write in (lambda: show.report(path, made["scores"]), lambda: show.scores(made["scores"]).save(path)):
        with pytest.raises(FileExistsError, match="isn't a page"):
            write()
    assert path.read_bytes() == before
    for _ in range(2):
        show.report(tmp_path / "report.html", made["scores"])


def test_a_report_refuses_what_it_cannot_draw(made, tmp_path: Path):
    path = tmp_path / "report.html"
    with pytest.raises(ValueError, match="the report is empty"):
        show.report(path)
    with pytest.raises(TypeError, match=r"can't hold a Edit.*fe\.show\.edit") as caught:
        reports._drawn(made["edit"])
    assert "Picture" in str(caught.value) and not path.exists()


# --------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3e-4, 2e-4, [-3e-4, -2e-4, -1e-4, 0, 1e-4, 2e-4])],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    assert nice(low, high) == pytest.approx(ticks)


def test_ticks_are_told_apart():
    for low, high in [(0.0, 1.0), (0.0, 3e-5), (-2e6, 1e6), (0.101, 0.104)]:
        ticks = nice(low, high)
        assert len({tick_text(tick, ticks) for tick in ticks}) == len(ticks) >= 2


def test_a_line_breaks_where_there_is_no_number():
    def chart(y):
        return Page(
            line_chart(
                [Line("y", [0.0, 1.0, 2.0, 3.0, 4.0], [float(v) for v in y])], title="t", x_label="x", y_label="y"
            )
        )

    assert len(chart([1, 2, 3, 4, 5]).all("polyline")) == 1
    assert len(chart([1, 2, math.nan, 4, 5]).all("polyline")) == 2
    assert len(chart([1, 1, 1, 1, 1]).all("polyline")) == 1  # a flat line has no range of its own
    assert "no numbers" in chart([math.nan] * 5).words()


@pytest.mark.parametrize(
    "value, shown", [(-0.1234, "−0.123"), (0.0, "0.000"), (-0.0, "0.000"), (math.nan, "–"), (3e-7, "3e−07")]
)
def test_numbers_for_people(value, shown):
    assert number(value) == shown


def test_long_labels_are_cut_by_the_columns_they_take():
    assert clip("a" * 30, 24) == "a" * 23 + "…" and clip("short", 24) == "short"
    assert columns("日本") == 4 and columns(clip("日本" * 20, 24)) <= 24


def _json(coded: str):
    return json.loads(coded)


# ---------------------------------------------------------------------------------------- many facts


def with_effect(trace, cells: dict[tuple[int, int], float], total: float = 0.5):
    """A trace of one fact with some effects, all others 0."""
    effect = torch.zeros_like(trace.effect)
    for (layer, position), value in cells.items():
        effect[0, layer, position] = value
    samples = effect[..., None].expand_as(trace.sample_effect)
    return replace(trace, effect=effect, sample_effect=samples, clean=trace.corrupted + total)


def outlined(page: Page) -> tuple[int, int]:
    """(layer, position) of the cell with a box around it."""
    boxes = page.all("rect", **{"stroke": "#000", "stroke-width": "1.6"})
    box = next(box for box in boxes if float(box["width"]) > 16)  # the legend's is smaller
    places = [(f["x"], f["y"]) for f in page.all("rect", class_="cell")]
    columns = sorted({float(x) for x, _ in places})
    rows = sorted({float(y) for _, y in places})
    return columns.index(float(box["x"])), rows.index(float(box["y"]))


def test_the_box_marks_the_largest_effect_and_an_empty_last_subject_token_is_said(made):
    trace = made["trace"]
    stop, last = trace.subject[0][1], len(trace.tokens[0]) - 1
    assert last > stop
    page = Page(show.trace(with_effect(trace, {(2, stop): 0.4, (1, stop - 1): 0.01, (2, last): 0.5})).html)
    assert outlined(page) == (2, stop)  # the last token of the prompt has all of the effect in any trace
    assert "the last subject token carries next to nothing (at most 0.010, in layer 1)" in page.words()
    page = Page(show.trace(with_effect(trace, {(2, stop): 0.4, (1, stop - 1): 0.1})).html)
    assert outlined(page) == (2, stop) and "the last subject token's largest is 0.100, in layer 1" in page.words()
    page = Page(show.trace(with_effect(trace, {(2, stop): 0.1, (1, stop - 1): 0.4})).html)
    assert outlined(page) == (1, stop - 1) and "that is the last subject token" in page.words()


def test_what_is_not_a_result_is_refused_with_what_to_do(made, tmp_path: Path):
    trace, average, scores, verdict, edit = (unchecked(f) for f in (
        show.trace, show.average, show.scores, show.verdict, show.edit
    ))  # fmt: skip
    for function in (trace, average):
        with pytest.raises(TypeError, match=r"facts can't be shown here, needed a Trace: trace = fe\.causal_trace\("):
            function(FACT)
    with pytest.raises(TypeError, match=r"facts can't be shown here, needed a Scores: fe\.evaluate\("):
        scores([FACT])
    with pytest.raises(TypeError, match=r"a Scores can't be shown here, needed a Verdict: verdict = fe\.audit\("):
        verdict(made["scores"])
    with pytest.raises(TypeError, match=r"a Trace can't be shown here, needed a Edit"):
        edit(made["model"], made["trace"], FACT.text)
    with pytest.raises(TypeError, match="facts can't be shown here, needed a str: give one text"):
        edit(made["model"], made["edit"], FACT)
    with pytest.raises(TypeError, match="a report can't hold a Fact"):
        unchecked(show.report)(tmp_path / "report.html", FACT)


def unchecked(function):
    """Past the type checks of this test suite, which a user doesn't have."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def test_the_average_of_many_facts_shows_its_own_numbers_with_intervals(made):
    facts = [FACT, FACT.but(subject="The Colosseum", id="another")]
    trace = causal_trace(made["model"], facts, corruption=GaussianNoise(samples=2), progress=False)
    page = Page(show.average(trace).html)
    found, row = trace.average(), ROLES.index("last subject")
    titles = [data for where, data in page.texts if where == "title" and data.startswith("layer 2, last subject")]
    numbers = [float(each) for each in re.findall(r"-?\d[\d.]*(?:e-\d+)?", titles[0].replace("\u2212", "-"))[1:4]]
    want = [float(each[row, 2]) for each in (found.mean, found.low, found.high)]
    assert numbers == pytest.approx(want, abs=6e-5)
    assert "(2 facts)" in titles[0]
    assert "95 % bootstrap over 2 facts" in page.words()
    rows = [r for r in range(len(ROLES)) if bool(found.n[r].any())]
    earlier = found.mean[rows[:-1]].nan_to_num(-math.inf)  # all but the prompts' last token
    assert outlined(page) == divmod(int(earlier.argmax()), earlier.shape[1])[::-1]
    large = dataclasses.replace(trace, clean=trace.corrupted + 0.5)
    assert "share of the total effect" in Page(show.average(large, normalised=True).html).words()
    with pytest.raises(ValueError, match=r"no fact has a total effect of 0\.05"):
        show.average(trace, normalised=True)
    with pytest.raises(ValueError, match="the trace is of one fact, needed several"):
        show.average(made["trace"])


def test_a_report_averages_a_trace_of_several_facts(made, tmp_path):
    both = causal_trace(made["model"], [FACT, FACT.but(subject="Big Ben")], progress=False)
    page = show.report(tmp_path / "new" / "report.html", both).read_text(encoding="utf-8")
    assert show.average(both).title in page and show.trace(both).title not in page


def test_scores_of_other_objects_are_not_compared(made):
    other = evaluate(made["model"], [FACT.but(target_new=" London")])
    with pytest.raises(ValueError, match="the same prompts with the same objects"):
        show.scores(made["scores"], other)
