"""A pretended GPU, for tests of where tensors are, on machines without one.

`install` builds (once, with g++, in about 20 s) and registers what `fakegpu.cpp` makes of PyTorch's spare device type:
two devices, ``fakegpu:0`` and ``fakegpu:1``, whose tensors lie in the host's memory and are worked on by the CPU's
kernels, but which refuse what CUDA refuses: tensors of two devices in one call, CPU tensors where a kernel reads device
memory, CPU generators, `numpy` … `watch` counts launches, copies, waits and refusals, and says which line of the
package caused them. What it can't show is in docs/devices.md.

    DEVICE = second_device.install_or_skip()
    model.to("fakegpu:0")
    with second_device.watch() as seen:
        fe.causal_trace(model, fact)
    seen.count["sync"], seen.refused

Registering a device changes the process (PyTorch has an accelerator from then on), so that these tests have a process
of their own: ``make test-device``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

NAME = "fakegpu"
MEMORY = 1 << 34  # bytes that it says it has
SOURCE = Path(__file__).with_name("fakegpu.cpp")
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_longlong)
_lib: Any = None


def install_or_skip() -> torch.device:
    """`install`; where nothing can be built, the module of tests that asks is skipped and says why."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here, with which the second device is built", allow_module_level=True)
    return install()


def install() -> torch.device:
    """Build, load and register the device, once a process; the first of the two."""
    global _lib
    if _lib is None:
        torch.utils.rename_privateuse1_backend(NAME)
        _lib = ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)
        for name in ("launches", "live", "peak"):
            getattr(_lib, f"fakegpu_{name}").restype = ctypes.c_longlong
        torch._register_device_module(NAME, _Module(NAME))
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
        for name in _unchecked():
            _lib.fakegpu_no_check(name.encode())
        for name in _made_of_others():
            _lib.fakegpu_take_over(name.encode())
        _let_data_cross_devices()
    return torch.device(NAME, 0)


def _built() -> Path:
    """The library for this PyTorch, in the user's cache; processes that build it at once don't hinder each other."""
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {abi}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tl_factedit" / "second_device"
    built = folder / f"{NAME}-{key}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        root, half = Path(torch.__file__).parent, folder / f"{NAME}-{key}.{os.getpid()}.so"
        includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        libraries = [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
        options = ["-O1", "-std=c++20", "-fPIC", "-shared", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        subprocess.run(["g++", *options, *includes, str(SOURCE), "-o", str(half), *libraries], check=True)
        half.rename(built)
    return built


def _operators() -> Iterator[tuple[str, str]]:
    """PyTorch's own table of operators: (operator, a line of what it says of it)."""
    import torchgen

    name = ""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    for line in table.read_text().splitlines():
        if line.startswith("- func: "):
            name = "aten::" + line.removeprefix("- func: ").split("(")[0]
        else:
            yield name, line.strip()


def _unchecked() -> Iterator[str]:
    """Operators whose CUDA wrapper checks no devices (TensorIterator does, and takes CPU tensors of no dimension)."""
    return (name for name, says in _operators() if says.startswith("device_check: NoCheck"))


def _made_of_others() -> Iterator[str]:
    """Operators that PyTorch makes of their ``out=`` variants, for any backend."""
    return (name.removeprefix("aten::") for name, says in _operators() if says.startswith("structured_delegate: "))


def cuda_operators() -> set[str]:
    """Operators with a kernel for CUDA, or made of others that have one."""
    found, delegate = set(), {}
    for name, says in _operators():
        keys, _, value = says.partition(":")
        if keys == "structured_delegate":
            delegate[name] = "aten::" + value.strip()
        elif {"CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd"} & set(keys.split(", ")):
            found.add(name)
    return found | {name for name, other in delegate.items() if other in found}


def _let_data_cross_devices() -> None:
    """``x.data = y`` may move x to another device, as with CUDA: `nn.Module.to` needs it to keep tied weights tied."""
    import torch._dynamo  # it compares the signature of what is replaced below

    plain: Any = torch._C.TensorBase.data
    like = torch._has_compatible_shallow_copy_type

    def put(self: torch.Tensor, value: torch.Tensor) -> None:
        if NAME in (self.device.type, value.device.type) and self.device != value.device:
            torch.ops.fakegpu.set_data(self, value.detach())
        else:
            plain.__set__(self, value)

    ours = {NAME, "cpu"}
    tensor: Any = torch.Tensor
    tensor.data = property(lambda self: plain.__get__(self), put)
    torch._has_compatible_shallow_copy_type = lambda a, b: {a.device.type, b.device.type} <= ours or like(a, b)


def move_(model: Any, where: Any) -> Any:
    """Move a model's weights: those of a bridge by the model that it wraps, which its ``cfg.device`` isn't told of."""
    inner = getattr(model, "original_model", None)
    if inner is not None:
        inner.to(where)
    elif hasattr(model, "hook_dict"):
        model.to(where, print_details=False)
    else:
        model.to(where)
    return model


def split_hf(hf: Any, below: int = 1) -> Any:
    """A transformers model over both devices, as accelerate does it for ``device_map``: `below` blocks on the first."""
    from accelerate import dispatch_model

    base = hf.base_model_prefix
    inner = getattr(hf, base)
    blocks = next(name for name, part in inner.named_children() if isinstance(part, torch.nn.ModuleList))
    last = [name for name, _ in inner.named_children() if name in ("ln_f", "norm")]
    first, second = f"{NAME}:0", f"{NAME}:1"
    where = {f"{base}.{name}": first for name, _ in inner.named_children() if name not in (blocks, *last)}
    where |= {f"{base}.{name}": second for name in last}
    where |= {f"{base}.{blocks}.{i}": first if i < below else second for i in range(len(getattr(inner, blocks)))}
    where["lm_head"] = first if hf.config.tie_word_embeddings else second
    dispatched = dispatch_model(hf, device_map=where, main_device=first, force_hooks=True)
    dispatched.hf_device_map = where
    return dispatched


def split_hooked_(model: Any) -> Any:
    """A HookedTransformer over both devices, as its ``n_devices=2`` lays it over two GPUs."""
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    model.cfg.device, model.cfg.n_devices = f"{NAME}:0", 2
    ends = {name: part for name, part in model.named_children() if name != "blocks"}
    last = get_device_for_block_index(model.cfg.n_layers - 1, model.cfg)
    for name, part in ends.items():
        part.to(last if name in ("ln_final", "unembed") else f"{NAME}:0")
    for i, block in enumerate(model.blocks):
        block.to(get_device_for_block_index(i, model.cfg))
    return model


class _Module(ModuleType):
    """``torch.fakegpu``, in the fashion of ``torch.cuda``."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return int(_lib.fakegpu_current())

    def set_device(self, device: Any) -> None:
        _lib.fakegpu_set_current(device if isinstance(device, int) else torch.device(device).index or 0)

    def manual_seed_all(self, seed: int) -> None:
        _lib.fakegpu_seed(ctypes.c_ulonglong(seed & (2**64 - 1)))

    manual_seed = manual_seed_all

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return int(_lib.fakegpu_live())

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY - self.memory_allocated(device), MEMORY

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(_lib.fakegpu_peak())

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        _lib.fakegpu_reset_peak()

    def get_rng_state(self, device: Any = NAME) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = NAME) -> None:
        pass

    def device(self, index: Any) -> Any:
        return nullcontext()


class Watch:
    """What happened on the device.

    Attributes:
        count: How often: ``"op"`` (kernels), ``"h2d"``, ``"d2h"``, ``"p2p"``, ``"d2d"`` (copies), ``"sync"`` (the host
            waits for a number), ``"refused"``.
        bytes: Of copies, by the same names.
        operators: Kernels by operator.
        places: (kind, operator, line of the package) of copies, waits and refusals.
        refused: (line of the package, why), those that something swallowed too.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.places: Counter[tuple[str, str, str]] = Counter()
        self.refused: list[tuple[str, str]] = []

    def see(self, kind: bytes, op: bytes, size: int) -> None:
        what, name = kind.decode(), op.decode()
        self.count[what] += 1
        self.bytes[what] += size
        if what == "op":
            self.operators[name] += 1
        elif what != "d2d":
            where = self._place()
            self.places[what, name, where] += 1
            if what == "refused":
                self.refused.append((where, name))

    def _place(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if self.package in file and file != __file__:
                return f"{file.rpartition(self.package)[2].lstrip('/')}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "outside"


@contextmanager
def watch(package: str = "/tl_factedit/") -> Iterator[Watch]:
    """Count what happens on the device for the length of a block; `package` is part of the paths of its files."""
    install()
    seen = Watch(package)
    callback = _Callback(seen.see)
    _lib.fakegpu_callback(callback)
    try:
        yield seen
    finally:
        _lib.fakegpu_callback(_Callback(0))
