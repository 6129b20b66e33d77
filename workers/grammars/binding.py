"""xgrammar's C++ library, without its Python package.

The package imports a library of models and tokenizers, which takes seconds and 200 MB and which the server
does without. So only the part of it that declares the C++ library's classes is imported. That part is
internal to xgrammar: setup.cfg names its exact version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from typing import Any

PACKAGE = "xgrammar"


@functools.cache
def load_binding() -> Any:
    """The module with `TokenizerInfo`, `GrammarCompiler`, `CompiledGrammar` and `GrammarMatcher`: 0.05 s and
    10 MB in a process that has torch. Raises ImportError.
    """
    # Else tvm_ffi may compile, in a process of its own, an extension of torch that nothing here uses.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"the package {PACKAGE} is not installed", name=PACKAGE)
    is_new = PACKAGE not in sys.modules
    if is_new:
        bare = types.ModuleType(PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = bare
    try:
        for part in ("exception", "load_binding"):
            importlib.import_module(f"{PACKAGE}.{part}")
        return importlib.import_module(f"{PACKAGE}.tvm_ffi_binding")
    finally:
        if is_new:  # whoever imports the package itself gets all of it
            del sys.modules[PACKAGE]
