"""From measurements to a verdict."""

from tl_factedit.auditing.findings import AttackFinding, Findings, Judgement
from tl_factedit.auditing.provenance import AuditProvenance, ChangeProvenance
from tl_factedit.auditing.retained import Retention, retention
from tl_factedit.auditing.rules import judge
from tl_factedit.core.namespaces import shows

__all__ = [
    "AttackFinding",
    "AuditProvenance",
    "ChangeProvenance",
    "Findings",
    "Judgement",
    "Retention",
    "judge",
    "retention",
]

__dir__ = shows(__all__)
