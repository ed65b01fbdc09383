"""llama.cpp, in process: the scores of every token at every position, at the speed of prefill.

The wheel ``xllamacpp`` wraps llama.cpp's server, and a server answers with a few best tokens a position.
Comparing distributions needs all of them. The wheel's extension module also exports llama.cpp's C API, so
this file calls that through ctypes: no compiler, no second copy of the library, no text in between.

Functions of a C library are found by name, but structs have a layout that only its header tells, and
llama.cpp passes three of them by value. As little as possible is assumed about them:

    llama_context_params   u32 n_ctx, n_batch, n_ubatch, n_seq_max, ...        the first three are written
    llama_model_params     two pointers, i32 n_gpu_layers, split_mode, ...     n_gpu_layers is written
    llama_batch            i32 n_tokens, then six pointers                     all of it

Only these beginnings are declared; fields come and go behind them (threads are set by a function for that
reason), and room for them is left at the end. A struct of more than 16 bytes that comes last is copied to
the stack or passed by address on x86-64, AArch64 and Windows, and returned through a hidden pointer, so a
larger one than the library expects is harmless.

The guard: before anything is written, the library's own defaults must be found where they are expected,
and after a context is made the library must report the sizes that were asked for. A release that moves
these fields is refused with an ``EngineError`` instead of computing something else.

The arithmetic is llama.cpp's own, as its users get it: activations rounded to 8 bits for most quantized
types, keys and values in float16.
"""

import ctypes
import functools
import os
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.engine import Engine, Generation
from poise.core.errors import EngineError, MissingExtra, UsageError

KNOWN_GOOD = "2026.10.11549"
"""Releases of xllamacpp that the tests compared with a model computed elsewhere."""

_ADVICE = f"known to work: pip install 'xllamacpp=={KNOWN_GOOD}'"

BATCH = 256
"""Tokens of one pass. The library holds their scores, BATCH * vocabulary * 4 bytes, twice."""

STEP = 256
"""llama.cpp rounds contexts up to a multiple of this."""

ERROR = 4
"""Level of an error line in llama.cpp's log; 5 continues the line before."""

_LATER_FIELDS = ("later_fields", c_uint64 * 96)
_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        _LATER_FIELDS,
    )


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        _LATER_FIELDS,
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
        _LATER_FIELDS,
    )


DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama_context_default_params": {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1},
    "llama_model_default_params": {
        "devices": None,
        "tensor_buft_overrides": None,
        "n_gpu_layers": -1,
        "split_mode": 1,
    },
}
"""What the library answers, field by field, as long as its layout is the one declared above."""

SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_batch_get_one": (_Batch, [POINTER(c_int32), c_int32]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_type": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (c_void_p, [c_void_p]),
}


@dataclass(kw_only=True, eq=False)
class LlamaCpp(Engine):
    """Runs a GGUF file on the CPU.

    Attributes:
        threads: 0 for one a physical core that this process may use.
        context: positions there is room for at first; it grows when a text needs more.
    """

    reads: ClassVar[tuple[str, ...]] = ("gguf",)
    threads: int = 0
    context: int = 2048

    def __post_init__(self) -> None:
        if self.threads < 0 or self.context < 1:
            raise UsageError(f"llamacpp needs threads >= 0 and context >= 1, got {self.threads} and {self.context}")
        self._lib: Any = None
        self._model: int | None = None
        self._runner: int | None = None
        self._room = 0
        self._vocabulary = 0

    def load(self, checkpoint: Checkpoint) -> None:
        path = Path(checkpoint.path)
        if path.suffix != ".gguf" or not path.is_file():
            raise EngineError(f"{path}: llama.cpp reads .gguf files; export the model to gguf first")
        self.close()
        self._lib = _library()
        _errors.clear()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise EngineError(f"{path}: llama.cpp cannot load it{_complaints()}")
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        try:
            self._make_room(self.context)
        except EngineError:
            self.close()
            raise

    def logits(self, tokens: list[int]) -> Tensor:
        self._begin(tokens, len(tokens))
        scores = torch.empty(len(tokens), self._vocabulary)
        for start in range(0, len(tokens), BATCH):
            rows = scores[start : start + BATCH]
            ctypes.memmove(rows.data_ptr(), self._decode(tokens[start : start + BATCH], every=True), 4 * rows.numel())
        return scores

    def generate(self, tokens: list[int], n: int) -> Generation:
        begin = time.perf_counter()
        self._begin(tokens, len(tokens) + n)
        if not tokens:
            raise EngineError("llama.cpp has nothing to continue: the prompt is empty")
        for start in range(0, len(tokens) - BATCH, BATCH):
            self._decode(tokens[start : start + BATCH])
        step = tokens[(len(tokens) - 1) // BATCH * BATCH :]
        made: list[int] = []
        seconds: list[float] = []
        for _ in range(n):
            scores = (c_float * self._vocabulary).from_address(self._decode(step))
            made.append(int(torch.frombuffer(scores, dtype=torch.float32).argmax()))
            seconds.append(time.perf_counter() - begin)
            step = made[-1:]
        return Generation(tokens=made, seconds=seconds)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids by llama.cpp's own tokenizer; no beginning or end is added.

        Args:
            special: whether the text of a control token stands for that token.
        """
        vocabulary = self._loaded().llama_model_get_vocab(self._model)
        if self._lib.llama_vocab_type(vocabulary) == 0:
            raise EngineError("the model has no tokenizer")
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 16))()
        count = self._lib.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, special)
        if count < 0:
            raise EngineError(f"llama.cpp cannot tokenize the text{_complaints()}")
        return list(ids[:count])

    def close(self) -> None:
        if self._runner:
            self._lib.llama_free(self._runner)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._runner = None
        self._room = 0

    def _loaded(self) -> Any:
        if not self._model:
            raise EngineError("no model is loaded")
        return self._lib

    def _begin(self, tokens: list[int], room: int) -> None:
        """Forgets what was read before, and makes room for this text."""
        lib = self._loaded()
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise EngineError(f"tokens {min(tokens)} to {max(tokens)} do not fit a vocabulary of {self._vocabulary}")
        if room > self._room:
            self._make_room(room)
        lib.llama_memory_clear(lib.llama_get_memory(self._runner), True)

    def _make_room(self, positions: int) -> None:
        """A new context with at least so many positions. The guard's second half: it must have what was asked."""
        if self._runner:
            self._lib.llama_free(self._runner)
            self._runner = None
        room = -(-positions // STEP) * STEP
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = room, BATCH, BATCH
        _errors.clear()
        self._runner = self._lib.llama_init_from_model(self._model, params)
        if not self._runner:
            raise EngineError(f"llama.cpp has no room for a context of {room} tokens{_complaints()}")
        threads = self.threads or _cores()
        self._lib.llama_set_n_threads(self._runner, threads, threads)
        asked = {"n_ctx": room, "n_batch": BATCH, "n_ubatch": BATCH, "n_threads": threads}
        _check({name: getattr(self._lib, f"llama_{name}")(self._runner) for name in asked}, asked)
        self._room = room

    def _decode(self, tokens: list[int], every: bool = False) -> int:
        """Reads on; the address of the scores after every token, or after the last."""
        batch = _Batch(n_tokens=len(tokens), token=(c_int32 * len(tokens))(*tokens))
        if every:
            batch.logits = (c_int8 * len(tokens))(*[1] * len(tokens))
        _errors.clear()
        status = self._lib.llama_decode(self._runner, batch)
        address = self._lib.llama_get_logits(self._runner) if status == 0 else None
        if not address:
            raise EngineError(f"llama.cpp stopped at {len(tokens)} tokens with status {status}{_complaints()}")
        return int(address)


def _cores() -> int:
    """Physical cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = [Path(topology.format(cpu)) for cpu in os.sched_getaffinity(0)]
    return len({file.read_text() if file.is_file() else str(file) for file in files})


_errors: list[str] = []


@_LogCallback
def _collect(level: int, text: bytes, _: int | None) -> None:
    """Keeps error lines and drops the rest."""
    if level == ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _complaints() -> str:
    return f": {'; '.join(_errors)}" if _errors else ""


@functools.cache
def _library() -> Any:
    """The C API, with its first guard passed.

    Raises:
        MissingExtra: the wheel is not installed.
        EngineError: it cannot be used, or has another layout.
    """
    try:
        from xllamacpp import xllamacpp as extension
    except ModuleNotFoundError as error:
        raise MissingExtra("xllamacpp", "llamacpp") from error
    except ImportError as error:
        raise EngineError(f"xllamacpp is installed but does not start: {error}") from error
    try:
        lib = ctypes.CDLL(extension.__file__)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineError(f"this build of xllamacpp does not export llama.cpp's C API ({error}); {_ADVICE}") from error
    for name, expected in DEFAULTS.items():
        found = getattr(lib, name)()
        _check({field: getattr(found, field) for field in expected}, expected)
    token = (c_int32 * 1)()
    one = lib.llama_batch_get_one(token, 1)
    _check(
        {"n_tokens": one.n_tokens, "token": ctypes.addressof(one.token.contents), "pos": bool(one.pos)},
        {"n_tokens": 1, "token": ctypes.addressof(token), "pos": False},
    )
    lib.llama_log_set(_collect, None)
    lib.llama_backend_init()
    return lib


def _check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found != expected:
        raise EngineError(f"this xllamacpp has another C layout than expected: {found} is not {expected}; {_ADVICE}")
