"""Probes: values that turn (model, facts) into a `Reading`. One method a file."""

from tl_factedit.core.namespaces import shows
from tl_factedit.measure.reading import Comparison
from tl_factedit.probes.attributes import AttributeRate, Attributes, attributes_by_object
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.crossed import CrossedPatchscope, crossed_patchscope
from tl_factedit.probes.erasure import Erasure, erase_states
from tl_factedit.probes.linear import LinearProbe, ProbeReadout, fit_linear_probe
from tl_factedit.probes.nulls import (
    RandomWeights,
    excess_over_nulls,
    name_ngrams,
    one_hot_objects,
    states_of_others,
    subject_embeddings,
)
from tl_factedit.probes.patchscope import Patchscope
from tl_factedit.probes.permutation import Permutation, permutation_test
from tl_factedit.probes.refitted_lens import FixedAndRefitted, fixed_and_refitted
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.probes.scrubbing import Eraser, leace, random_subspace
from tl_factedit.probes.selectivity import ControlTask, control_task
from tl_factedit.probes.states import HiddenStates, read_states, read_states_edited
from tl_factedit.probes.tuned_lens import TunedLens, train_tuned_lens
from tl_factedit.probes.unlearning import UnlearningDepth, unlearning_depth

__all__ = [
    "Comparison",
    "HiddenStates",
    "read_states",
    "read_states_edited",
    "LinearClassifier",
    "LinearProbe",
    "fit_linear_probe",
    "ProbeReadout",
    "Residual",
    "residual_knowledge",
    "RandomWeights",
    "excess_over_nulls",
    "name_ngrams",
    "one_hot_objects",
    "states_of_others",
    "subject_embeddings",
    "ControlTask",
    "control_task",
    "Permutation",
    "permutation_test",
    "Eraser",
    "leace",
    "random_subspace",
    "Erasure",
    "erase_states",
    "TunedLens",
    "train_tuned_lens",
    "FixedAndRefitted",
    "fixed_and_refitted",
    "AttributeRate",
    "Attributes",
    "attributes_by_object",
    "Patchscope",
    "CrossedPatchscope",
    "crossed_patchscope",
    "UnlearningDepth",
    "unlearning_depth",
]

__dir__ = shows(__all__)
