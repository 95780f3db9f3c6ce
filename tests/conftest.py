"""Fixtures all tests share. No test touches the network: the Hub is off before anything is imported."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import jaxtyping
import pytest
import tiny
from hypothesis import HealthCheck, settings

# Types and shapes are checked at each call, a fifth of the suite's time: once for both generations of TransformerLens.
# The organism's text is made word by word, by functions without a tensor in them, which the checks would make slow.
if not tiny.HAS_HOOKED:
    package = Path(importlib.util.find_spec("tl_factedit").origin).parent
    checked = [f"tl_factedit.{part.stem}" for part in package.iterdir() if part.stem not in ("organism", "__pycache__")]
    jaxtyping.install_import_hook(sorted(checked), "type_checks.checked")

# Of some tokenizers most random subjects end inside a token, which is another test's matter.
FEW_ARE_LEFT = [HealthCheck.filter_too_much]
settings.register_profile("dev", deadline=None, max_examples=50, suppress_health_check=FEW_ARE_LEFT)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")



def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--newest",
        action="store_true",
        help="packages are newer than constraints.txt: deprecations that others cause among themselves are no errors",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--newest"):
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            for line in (f"default::{kind}", f"error::{kind}:tl_factedit"):
                config.addinivalue_line("filterwarnings", line)


@pytest.fixture(params=tiny.KINDS, scope="session")
def kind(request: pytest.FixtureRequest) -> tiny.Kind:
    """The name of each model class that this TransformerLens has."""
    return request.param


@pytest.fixture(params=[(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS], ids="-".join)
def model(request: pytest.FixtureRequest):
    """A fresh tiny model of each class: LayerNorm, biases, Conv1D (gpt2); RMSNorm, a gated MLP (llama)."""
    return tiny.model(*request.param)
