"""llama.cpp, in process: the scores of every token at every position, at the speed of prefill.

The wheel ``xllamacpp`` wraps llama.cpp's server, and a server answers with a few best tokens a position.
Comparing distributions takes all of them. The wheel's extension module also exports llama.cpp's C API, so
this file calls that through ctypes: no compiler, no second copy of the library, no text in between.

Functions of a C library are found by name, but structs have a layout that only its header tells, and
llama.cpp passes three of them by value. As little as possible is assumed about them:

    llama_context_params   u32 n_ctx, n_batch, n_ubatch, n_seq_max, ...     all four are written
    llama_model_params     two pointers, i32 n_gpu_layers, split_mode, ...  n_gpu_layers is written
    llama_batch            i32 n_tokens, then six pointers                  n_tokens, token, logits; for several
                                                                            texts also pos, n_seq_id, seq_id

Only these beginnings are declared. Fields come and go behind them (threads are therefore set by a
function), so room is left at the end: a struct of more than 16 bytes that is the last argument lies on the
stack or is passed by address, on x86-64, AArch64 and Windows alike, and comes back through a pointer; one
that is larger than the library expects does no harm.

The guard: before anything is written, the library's own defaults must lie where they are expected, and
every context must report the sizes that were asked for. A release that moves these fields is refused
instead of computing something else.

The arithmetic is llama.cpp's, as its users get it: most quantized types round activations to 8 bits, keys
and values are float16. On float32 weights that moves probabilities by about 1e-3 at most (the tests).
"""

import ctypes
import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.core.checkpoint import Checkpoint
from poise.core.engine import Engine, Generation
from poise.core.errors import EngineError, MissingExtra, UsageError

KNOWN_GOOD = ("2026.4.8672", "2026.6.9713", "2026.8.10229", "2026.9.11063", "2026.10.11549")
"""Releases of xllamacpp that agreed with a model computed elsewhere (the tests)."""

BATCH = 256
"""Tokens of one pass. Scores take BATCH * vocabulary * 4 bytes, twice; more tokens are not faster."""

ERROR = 4
"""Level of an error line in llama.cpp's log."""

_ADVICE = f"known to work are {', '.join(KNOWN_GOOD)}: pip install 'xllamacpp=={KNOWN_GOOD[-1]}'"


def _beginning(**fields: Any) -> Any:
    """A struct whose first fields are known, with room for the others."""
    every = (*fields.items(), ("later_fields", c_uint64 * 96))
    return type("Beginning", (ctypes.Structure,), {"_fields_": every})


_Context = _beginning(n_ctx=c_uint32, n_batch=c_uint32, n_ubatch=c_uint32, n_seq_max=c_uint32)
_Model = _beginning(devices=c_void_p, overrides=c_void_p, n_gpu_layers=c_int32, split_mode=c_int32)
_Batch = _beginning(
    n_tokens=c_int32,
    token=POINTER(c_int32),
    embd=c_void_p,
    pos=c_void_p,
    n_seq_id=c_void_p,
    seq_id=c_void_p,
    logits=POINTER(c_int8),
)
_LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_AbortCallback = ctypes.CFUNCTYPE(None, c_char_p)

DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama_context_default_params": {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1},
    "llama_model_default_params": {"devices": None, "overrides": None, "n_gpu_layers": -1, "split_mode": 1},
}
"""What the library answers, field by field, while its structs begin as declared above."""

SIGNATURES: tuple[tuple[str, Any, list[Any]], ...] = (
    ("llama_backend_init", None, []),
    ("llama_log_set", None, [_LogCallback, c_void_p]),
    ("ggml_set_abort_callback", c_void_p, [_AbortCallback]),
    ("llama_context_default_params", _Context, []),
    ("llama_model_default_params", _Model, []),
    ("llama_batch_get_one", _Batch, [POINTER(c_int32), c_int32]),
    ("llama_model_load_from_file", c_void_p, [c_char_p, _Model]),
    ("llama_init_from_model", c_void_p, [c_void_p, _Context]),
    ("llama_set_n_threads", None, [c_void_p, c_int32, c_int32]),
    ("llama_n_ctx llama_n_batch llama_n_ubatch llama_n_threads", c_int32, [c_void_p]),
    ("llama_memory_clear", None, [c_void_p, c_bool]),
    ("llama_decode", c_int32, [c_void_p, _Batch]),
    ("llama_get_memory llama_get_logits llama_model_get_vocab", c_void_p, [c_void_p]),
    ("llama_vocab_n_tokens llama_vocab_type", c_int32, [c_void_p]),
    ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    ("llama_free llama_model_free", None, [c_void_p]),
)
"""Names, result and arguments of every function that is called."""


@dataclass(kw_only=True, eq=False)
class LlamaCpp(Engine):
    """Runs a GGUF file on the CPU.

    Attributes:
        threads: 0 for one a physical core that this process may use.
        context: positions there is room for at first; it grows when a text needs more.
    """

    reads: ClassVar[tuple[str, ...]] = ("gguf",)
    threads: int = 0
    context: int = 512

    def __post_init__(self) -> None:
        if self.threads < 0 or self.context < 1:
            given = f"got {self.threads} and {self.context}"
            raise UsageError(f"llamacpp needs threads of at least 0 and a context of at least 1, {given}")
        self._lib: Any = None
        self._model: int | None = None
        self._runner: int | None = None
        self._room = 0
        self._vocabulary = 0

    def load(self, checkpoint: Checkpoint) -> None:
        path = Path(checkpoint.path)
        if path.suffix != ".gguf" or not path.is_file():
            raise EngineError(f"{path}: llama.cpp reads .gguf files only; export the model to gguf first")
        self.close()
        self._lib = _library()
        failure = _survive(lambda: self._start(path))
        if failure:
            if not isinstance(failure, _AbortError):  # what an aborted call holds on to cannot be freed
                self.close()
            self._model = self._runner = None
            raise EngineError(f"{path}: llama.cpp cannot run it: {failure}") from failure

    def logits(self, tokens: list[int]) -> Tensor:
        self._begin(tokens, len(tokens))
        scores = torch.empty(len(tokens), self._vocabulary)
        for start in range(0, len(tokens), BATCH):
            rows = scores[start : start + BATCH]
            source = self._decode(tokens[start : start + BATCH], every=True)
            ctypes.memmove(rows.data_ptr(), source, 4 * rows.numel())
        return scores

    def generate(self, tokens: list[int], n: int, stop: Collection[int] = ()) -> Generation:
        begin = time.perf_counter()
        if not tokens:
            raise EngineError("llama.cpp has nothing to continue: the prompt is empty")
        self._begin(tokens, len(tokens) + n)
        *before, step = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
        for part in before:
            self._decode(part)
        made: list[int] = []
        seconds: list[float] = []
        for _ in range(n):
            scores = (c_float * self._vocabulary).from_address(self._decode(step))
            made.append(int(torch.frombuffer(scores, dtype=torch.float32).argmax()))
            seconds.append(time.perf_counter() - begin)
            if made[-1] in stop:
                break
            step = made[-1:]
        return Generation(tokens=made, seconds=seconds)

    def generate_many(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        self._loaded()
        every = list(range(len(prompts)))
        self._make_room(max(map(len, prompts)) + n, len(prompts))
        made: list[list[int]] = [[] for _ in prompts]
        try:
            for number, tokens in enumerate(prompts):
                for start in range(0, len(tokens), BATCH):
                    part = tokens[start : start + BATCH]
                    run = range(start, start + len(part))
                    scores = self._decode_several(part, run, [number] * len(part), last=1)
                made[number].append(int(scores.argmax()))
            for step in range(1, n):
                places = [len(tokens) + step - 1 for tokens in prompts]
                scores = self._decode_several([m[-1] for m in made], places, every, last=len(made))
                for tokens, best in zip(made, scores.argmax(-1).tolist(), strict=True):
                    tokens.append(best)
        finally:
            self._make_room(self.context)
        return made

    def _decode_several(
        self, tokens: list[int], places: Sequence[int], texts: list[int], last: int
    ) -> Tensor:
        """Scores after the last of some tokens, which stand at places of texts: [last, vocabulary]."""
        count = len(tokens)
        numbers = [(c_int32 * 1)(text) for text in texts]
        positions = (c_int32 * count)(*places)
        lengths = (c_int32 * count)(*[1] * count)
        owners = (c_void_p * count)(*map(ctypes.addressof, numbers))
        batch = _Batch(
            n_tokens=count,
            token=(c_int32 * count)(*tokens),
            pos=ctypes.addressof(positions),
            n_seq_id=ctypes.addressof(lengths),
            seq_id=ctypes.addressof(owners),
            logits=(c_int8 * count)(*[0] * (count - last), *[1] * last),
        )
        scores = (c_float * (last * self._vocabulary)).from_address(self._run(batch))
        return torch.frombuffer(scores, dtype=torch.float32).reshape(last, self._vocabulary)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids by llama.cpp's own tokenizer; no beginning or end is added.

        Args:
            special: whether the text of a control token stands for that token.

        Raises:
            EngineError: the model has no tokenizer.
        """
        lib = self._loaded()
        vocabulary = lib.llama_model_get_vocab(self._model)
        if lib.llama_vocab_type(vocabulary) == 0:
            raise EngineError("the model has no tokenizer")
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 16))()
        count = lib.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), False, special)
        if count < 0:
            raise EngineError(f"llama.cpp makes {-count} tokens of {len(raw)} bytes of text")
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
            raise EngineError("llama.cpp has no model: call load first")
        return self._lib

    def _start(self, path: Path) -> None:
        """Loads the file, makes a context, and reads a token to see it work."""
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        _errors.clear()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise EngineError(_errors_so_far())
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._make_room(self.context)
        self._lib.llama_set_n_threads(self._runner, 1, 1)  # helpers would wait for an aborted one, spinning
        self._decode([0])
        self._set_threads()

    def _begin(self, tokens: list[int], room: int) -> None:
        """Forgets what was read before, and makes room for this text."""
        lib = self._loaded()
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            span = f"tokens from {min(tokens)} to {max(tokens)}"
            raise EngineError(f"{span} do not fit the model's vocabulary of {self._vocabulary}")
        if room > self._room or not self._runner:
            self._make_room(room)
        lib.llama_memory_clear(lib.llama_get_memory(self._runner), True)

    def _make_room(self, positions: int, texts: int = 1) -> None:
        """Replaces the context by one of at least so many positions for each text: the next multiple of BATCH."""
        if self._runner:
            self._lib.llama_free(self._runner)
            self._runner, self._room = None, 0
        room = texts * -(-positions // BATCH) * BATCH
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = room, BATCH, BATCH, texts
        _errors.clear()
        self._runner = self._lib.llama_init_from_model(self._model, params)
        if not self._runner:
            raise EngineError(f"no context of {room} tokens: {_errors_so_far()}")
        asked = {"n_ctx": room, "n_batch": BATCH, "n_ubatch": BATCH}
        _check({name: getattr(self._lib, f"llama_{name}")(self._runner) for name in asked}, asked)
        self._set_threads()
        self._room = room

    def _set_threads(self) -> None:
        threads = self.threads or _cores()
        self._lib.llama_set_n_threads(self._runner, threads, threads)
        _check({"n_threads": self._lib.llama_n_threads(self._runner)}, {"n_threads": threads})

    def _decode(self, tokens: list[int], every: bool = False) -> int:
        """Reads on. Returns the address of the scores after every token, or after the last."""
        batch = _Batch(n_tokens=len(tokens), token=(c_int32 * len(tokens))(*tokens))
        if every:
            batch.logits = (c_int8 * len(tokens))(*[1] * len(tokens))
        return self._run(batch)

    def _run(self, batch: Any) -> int:
        _errors.clear()
        status = self._lib.llama_decode(self._runner, batch)
        address = self._lib.llama_get_logits(self._runner) if status == 0 else None
        if not address:
            raise EngineError(f"no scores for {batch.n_tokens} tokens (status {status}): {_errors_so_far()}")
        return int(address)


def _cores() -> int:
    """Physical cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    files = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    return len({file.read_text() if file.is_file() else str(file) for file in files})


_errors: list[str] = []


def _keep_errors(level: int, text: bytes, _: int | None) -> None:
    if level == ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _errors_so_far() -> str:
    return "; ".join(_errors) or "it does not say why"


class _AbortError(Exception):
    """An assertion inside llama.cpp failed."""


_survivors: dict[int, Callable[[BaseException], None]] = {}


def _park(message: bytes) -> None:
    """Called before abort(). Under ``_survive`` it never returns, so that the process lives on."""
    report = _survivors.get(threading.get_ident())
    if report:
        report(_AbortError(message.decode(errors="replace").strip()))
        threading.Event().wait()


_ON_LOG, _ON_ABORT = _LogCallback(_keep_errors), _AbortCallback(_park)
"""What the library holds on to: these must outlive it."""


def _survive(work: Callable[[], None]) -> BaseException | None:
    """Runs something that llama.cpp may abort. Returns what went wrong.

    Metadata that contradicts itself trips assertions of llama.cpp, which end the process. The thread that
    meets one is left asleep for good, with what it had loaded.
    """
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def attempt() -> None:
        _survivors[threading.get_ident()] = outcome.put
        try:
            work()
            outcome.put(None)
        except BaseException as error:  # whatever it is, someone waits for it
            outcome.put(error)
        finally:
            del _survivors[threading.get_ident()]

    threading.Thread(target=attempt, daemon=True).start()
    return outcome.get()


@functools.cache
def _library() -> Any:
    """llama.cpp's C API, with the first half of the guard passed.

    Raises:
        MissingExtra: the wheel is not installed.
        EngineError: it cannot be used, or its structs are laid out otherwise.
    """
    try:
        from xllamacpp import xllamacpp as extension
    except ModuleNotFoundError as error:
        raise MissingExtra("xllamacpp", "llamacpp") from error
    except ImportError as error:
        raise EngineError(f"xllamacpp is installed but cannot be imported: {error}") from error
    try:
        lib = ctypes.CDLL(extension.__file__)
        for names, result, arguments in SIGNATURES:
            for name in names.split():
                getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise EngineError(f"this xllamacpp lacks a function of llama.cpp ({error}); {_ADVICE}") from error
    for name, expected in DEFAULTS.items():
        defaults = getattr(lib, name)()
        _check({field: getattr(defaults, field) for field in expected}, expected)
    token = (c_int32 * 1)()
    batch = lib.llama_batch_get_one(token, 1)
    found = {"n_tokens": batch.n_tokens, "token": ctypes.cast(batch.token, c_void_p).value}
    _check(found, {"n_tokens": 1, "token": ctypes.addressof(token)})
    lib.llama_log_set(_ON_LOG, None)
    lib.ggml_set_abort_callback(_ON_ABORT)
    lib.llama_backend_init()
    return lib


def _check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found != expected:
        raise EngineError(
            f"this xllamacpp lays out its structs otherwise: read {found} instead of {expected}; {_ADVICE}"
        )
