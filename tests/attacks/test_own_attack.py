"""An attack of one's own: one frozen value, seen in the verdict, in its table and in its picture."""

from dataclasses import dataclass

import attacking_facts
import laws
import tiny
import torch

import tl_factedit as fe
from tl_factedit.attacks import Case, Recovery
from tl_factedit.core.tokens import encode
from tl_factedit.measure.first_tokens import at_the_ends


@dataclass(frozen=True)
class Politely:
    """Asks once more, politely."""

    words: str = "Please say it again . "

    def __call__(self, population: fe.Population, /) -> Recovery:
        asked, tokenizer = population.first_tokens, population.model.tokenizer
        rows = [encode(tokenizer, self.words + f.text, prepend_bos=population.prepend_bos)[0] for f in population.facts]

        def read(runner, indices):
            found = torch.full((len(indices), 1, 3), torch.nan)
            for row, logits in at_the_ends(runner, [rows[i] for i in indices], 4096):
                found[row, 0] = asked[indices[row]].first(logits)
            return found

        before, after = population.read("politely", read, settings=repr(self))
        return Recovery.of("politely", population, [Case("please", "asked politely", "underneath")], before, after)


def test_it_is_an_attack_and_resumes(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    assert isinstance(Politely(), fe.attacks.Attack)
    unchanged = fe.Population.of(model, model, facts, progress=False)
    with laws.untouched(model):
        found = Politely()(unchanged)
    assert torch.equal(found.before.values, found.after.values) and found.known.all()
    other = fe.Population.of(model, tiny.model(kind, "gpt2", seed=1), facts, folder=tmp_path, progress=False)
    first, again = (Politely()(other) for _ in range(2))
    assert torch.equal(first.after.values, again.after.values) and len(list(tmp_path.iterdir())) == 3


def test_it_is_in_the_verdict_its_table_and_its_picture(kind, tmp_path):
    model = tiny.model(kind, "gpt2")
    facts = attacking_facts.known_facts(model)
    verdict = fe.audit(model, model, facts, attacks=[Politely()], objective=fe.Inject(), progress=False)
    own = verdict.attack("politely")
    assert own is not None and own in verdict.attacks
    finding = next(found for found in verdict.findings.attacks if found.attack == "politely")
    assert finding.shows == "underneath" and finding.strongest == own.strongest
    # An unchanged model still says the old object, also when asked politely: the one thing that counts here.
    forced = fe.auditing.judge(
        fe.auditing.Findings(fe.Estimate(1.0, 0.9, 1.0, 3), fe.Estimate(1.0, 0.9, 1.0, 3), attacks=(finding,))
    )
    back = own.strongest.low > fe.Thresholds().present
    assert (forced.label == "INSERTED") is back
    assert own.table()["case"].tolist() == ["asked politely"]
    picture = fe.show.verdict(verdict).html
    assert "Politely" in picture and "asked politely" in picture
    assert "asked politely" in fe.show.attack(own).html
    fe.show.report(tmp_path / "report.html", own)
    assert "asked politely" in (tmp_path / "report.html").read_text()


def test_one_of_the_same_type_takes_the_place_of_the_default_one(kind):
    model = tiny.model(kind, "gpt2")
    verdict = fe.audit(
        model, model, attacking_facts.known_facts(model), attacks=[fe.attacks.ReadOut(k=3)], progress=False
    )
    read = [recovery for recovery in verdict.attacks if recovery.attack == "read-out"]
    assert len(read) == 1 and read[0].extra["candidates"].max() > 1
