"""Try an installed package outside any checkout: import it, and go from a fact to a report with its command line."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tl_factedit as fe

PROGRAM = Path(sys.executable).parent / "tl-factedit"


def run(*words: str) -> dict:
    """Run the installed script; its JSON."""
    done = subprocess.run([PROGRAM, *words, "--json", "--quiet"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Raises if anything isn't as it should be."""
    where = Path(fe.__file__).resolve()
    assert "site-packages" in where.parts, f"{where} isn't an installed package"
    fact = fe.models.organism_facts("city", "oracle0", 1)[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "fact.json").write_text(json.dumps([fact.to_dict()]))
        model = ("--model", "organism")
        facts, edit = ("--facts", str(folder / "fact.json")), str(folder / "edit.safetensors")
        trace = run("trace", *model, *facts, "--samples", "3")
        made = run("edit", *model, *facts, "--layer", "1", "--stats", "identity", "--out", edit)
        audit = run("audit", *model, "--edit", edit)
        report = run("report", *model, "--edit", edit, "--out", str(folder / "report.html"))
        assert trace["trace"]["known"] == [True]
        assert made["before"]["p_new"]["mean"] < 0.1 < 0.9 < made["after"]["p_new"]["mean"]
        assert audit["label"] == report["label"] != "FAILED"
        assert (folder / "report.html").stat().st_size > 10_000
    versions = trace["trace"]["provenance"]["versions"]
    print(f"{where.parent} works with {versions}: {audit['label']}")


if __name__ == "__main__":
    main()
