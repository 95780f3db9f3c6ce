"""The type checks that tests run under hold wherever a function is defined, however often."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from tiny import HAS_HOOKED
from torch import Tensor
from type_checks import checked

from tl_factedit.core.solve import cholesky


def defined(wanted: object):
    def same(x: wanted) -> Float[Tensor, "n"]:
        return x

    return jaxtyped(same, typechecker=checked)


def test_what_is_defined_again_is_checked_again_and_by_its_own_annotations():
    row, square = torch.zeros(3), torch.zeros(3, 3)
    for _ in range(2):
        narrow, wide = defined(Float[Tensor, "n"]), defined(Float[Tensor, "..."])
        assert narrow(row) is row and wide(row) is row
        with pytest.raises(TypeCheckError, match="parameters"):
            narrow(square)
        with pytest.raises(TypeCheckError, match="return value"):
            wide(square)


@pytest.mark.skipif(HAS_HOOKED, reason="the newest TransformerLens runs the suite with its types checked")
def test_the_package_is_checked():
    with pytest.raises(TypeCheckError):
        cholesky(torch.zeros(3, 4))
