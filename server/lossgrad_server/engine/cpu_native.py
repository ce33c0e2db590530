"""Functions compiled to machine code: `inlined` into others, or `native`, compiled by themselves and called by address.

numba compiles what a function calls together with it, anew at every level, so one nest of calls takes minutes. A
`native` function is compiled alone and once; others find it by its symbol. Its arguments are int64 and float64 only:
numbers and addresses. `load` compiles all of them, or reads them from the cache, in the order in which they were
written down. The rules of numerics: no fast-math, and IEEE 754's results for divisions by zero.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import llvmlite.binding
import numba
from numba import njit, types
from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.core.sigutils import normalize_signature

from lossgrad_server.jobs import DataType, LossKind, Reduction
from lossgrad_server.work import SPEC_RESULT, SPEC_TOTAL

logger = logging.getLogger(__name__)

_NUMERICS: Final = {"error_model": "numpy", "fastmath": False}

# A function that is compiled into those that call it.
inlined: Final = njit(**_NUMERICS, no_cpython_wrapper=True, no_cfunc_wrapper=True)

# Sources of the CPU engine of which nothing is compiled.
_NOT_COMPILED: Final = ("cpu_formulas", "cpu_memory", "cpu_pieces", "cpu_program", "cpu_target", "cpu_worker")

# How the names of the cache's files begin.
_FILES: Final = "cpu_"

_functions: list[tuple[str, Any, Callable[..., Any]]] = []
_addresses: dict[str, int] = {}
# What was compiled lives as long as its objects.
_compiled: list[Any] = []
_loading: Final = threading.Lock()


def native(signature: Any, name: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Make a function callable from compiled code by its symbol, once `load` was called."""

    def register(function: Callable[..., Any]) -> Any:
        symbol = f"lossgrad_{name or function.__name__}"
        arguments, result = normalize_signature(signature)
        typed = result(*arguments)
        _functions.append((symbol, typed, function))
        return types.ExternalFunction(symbol, typed)

    return register


def address_of(function: Any) -> int:
    """Return the address of a native function's machine code. `load` must have been called."""
    return _addresses[function.symbol]


def load() -> None:
    """Compile all native functions, or read them from the cache. Once compiled, this takes a few tenths of a second."""
    with _loading:
        if len(_addresses) == len(_functions):
            return
        before = config.CACHE_LOCATOR_CLASSES
        config.CACHE_LOCATOR_CLASSES = f"{__name__}.CacheDirectory"
        try:
            for symbol, signature, function in _functions[len(_addresses) :]:
                entry = _compile(symbol, signature, function)
                _compiled.append(entry)
                _addresses[symbol] = entry.address
                llvmlite.binding.add_symbol(symbol, entry.address)
        finally:
            config.CACHE_LOCATOR_CLASSES = before


def _compile(symbol: str, signature: Any, function: Callable[..., Any]) -> Any:
    entry = CFunc(function, normalize_signature(signature), locals={}, options=_NUMERICS)
    if _cache_directory() is None:
        _warn_about_cache()
    else:
        entry._cache = _SymbolCache(function, symbol)
    entry.compile()
    return entry


class _SymbolCache(FunctionCache):
    """numba's cache of a function, by the function's symbol.

    numba's own key holds what a function closes over, and a closed-over compiled function is another one in every
    process: such functions were compiled anew at every start. A symbol is enough, because the sources' digest stamps
    the cache.

    Every key has files of its own. numba numbers the data files of a function and writes the index that names one
    before it: a process that starts at that moment, or after one that was killed in it, would take the code that was
    there before, of other sources or another function, for its own.
    """

    def __init__(self, function: Callable[..., Any], symbol: str) -> None:
        super().__init__(function)
        self._symbol = symbol
        stamp = source_digest()
        target = cpu_target.target_context.codegen().magic_tuple()
        key = hashlib.sha256(repr((stamp, target, numba.__version__)).encode()).hexdigest()
        name = f"{_FILES}{symbol}.py{sys.version_info.major}{sys.version_info.minor}.{key[:16]}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, stamp)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple(), self._symbol

    def save_overload(self, sig: Any, data: Any) -> None:
        # numba fails where it cannot save what it has just compiled.
        if is_writable(Path(self.cache_path)):
            super().save_overload(sig, data)
        else:
            _warn_about_cache()


@cache
def _warn_about_cache() -> None:
    logger.warning("The CPU kernels are compiled anew at every start; to cache them, set NUMBA_CACHE_DIR")


@cache
def source_digest() -> str:
    """Return a digest of all that the compiled code depends on: the kernels' sources, and the numbers from outside."""
    outside = [list(DataType), list(LossKind), list(Reduction), SPEC_RESULT.format, SPEC_TOTAL.format]
    digest = hashlib.sha256(repr(outside).encode())
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        if path.stem not in _NOT_COMPILED:
            digest.update(path.read_bytes())
    return digest.hexdigest()


class CacheDirectory:
    """Where numba caches the native functions: its interface for that (NUMBA_CACHE_LOCATOR_CLASSES).

    Unlike numba's own, it notices a change in any of the kernels' files, and reads from a directory that it may not
    write to, such as one that is part of a container's image. Directories, the first that has kernels or can be written
    to: NUMBA_CACHE_DIR, the package's own __pycache__, the user's cache.
    """

    def __init__(self, function: Callable[..., Any], directory: Path) -> None:
        self._line = function.__code__.co_firstlineno
        self._directory = directory

    @classmethod
    def from_function(cls, function: Callable[..., Any], _path: str) -> CacheDirectory | None:
        """Return the function's place in the cache, None where there is no usable directory."""
        directory = _cache_directory()
        return None if directory is None else cls(function, directory)

    def get_cache_path(self) -> str:
        """Return the directory."""
        return str(self._directory)

    def get_source_stamp(self) -> str:
        """Return what must be the same for a cached function to be used."""
        return source_digest()

    def get_disambiguator(self) -> str:
        """Return what tells functions of one name apart."""
        return str(self._line)

    def ensure_cache_path(self) -> None:
        """Do nothing: `native` functions are not saved where the directory cannot be written to."""


def is_writable(directory: Path) -> bool:
    """Return whether files can be made in the directory, which is made if it is not there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True


@cache
def _cache_directory() -> Path | None:
    chosen = [Path(config.CACHE_DIR) / "lossgrad"] if config.CACHE_DIR else []
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for directory in (*chosen, Path(__file__).parent / "__pycache__", user / "lossgrad"):
        if any(directory.glob(f"{_FILES}*.nbi")) or is_writable(directory):
            return directory
    return None
