"""Probes: values that turn (model, facts) into a `Reading`. One method a file."""

from tl_factedit.measure.reading import Comparison
from tl_factedit.probes.attributes import AttributeRate, Attributes, attributes_by_object
from tl_factedit.probes.classifier import LinearClassifier
from tl_factedit.probes.linear import Decoded, LinearProbe, OwnLinearProbe, Ruler, decode, train_ruler
from tl_factedit.probes.nulls import RandomWeights, excess_over_nulls, name_ngrams, one_hot_objects, subject_embeddings
from tl_factedit.probes.patchscope import CrossedPatchscope, Patchscope, crossed_patchscope, states_of_others
from tl_factedit.probes.permutation import Permutation, permutation_test
from tl_factedit.probes.residual import Residual, residual_knowledge
from tl_factedit.probes.scrubbing import Eraser, Erasure, erase_states, leace, random_subspace
from tl_factedit.probes.selectivity import ControlTask, control_task
from tl_factedit.probes.states import HiddenStates, read_states, read_states_edited
from tl_factedit.probes.tuned_lens import FixedAndRefitted, TunedLens, fixed_and_refitted, train_tuned_lens

__all__ = [
    "Comparison",
    "AttributeRate",
    "Attributes",
    "attributes_by_object",
    "LinearClassifier",
    "Decoded",
    "LinearProbe",
    "OwnLinearProbe",
    "Ruler",
    "decode",
    "train_ruler",
    "RandomWeights",
    "excess_over_nulls",
    "name_ngrams",
    "one_hot_objects",
    "subject_embeddings",
    "CrossedPatchscope",
    "Patchscope",
    "crossed_patchscope",
    "states_of_others",
    "Permutation",
    "permutation_test",
    "Residual",
    "residual_knowledge",
    "Eraser",
    "Erasure",
    "erase_states",
    "leace",
    "random_subspace",
    "ControlTask",
    "control_task",
    "HiddenStates",
    "read_states",
    "read_states_edited",
    "FixedAndRefitted",
    "TunedLens",
    "fixed_and_refitted",
    "train_tuned_lens",
]
