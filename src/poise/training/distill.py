"""End-to-end distillation: scales, zero points and norms learn the original's answers, and codes if that is wanted.

A layer's weight is the sum of what its linear parameters multiply (``Format.basis``), so gradients reach them without
straight-through tricks, in any format that has some. The loss is the Kullback-Leibler divergence of next-token
distributions over the whole vocabulary. (The second phase of EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section
3.3, with the divergence in place of the cross-entropy.) Hidden states may be taught as well: they say more a token than
its distribution does, so that little text goes further. (Jiao et al. 2020, TinyBERT, arXiv 1909.10351, equation 8; here
as a share of the states' size, at every third block.) The first token of a window has a state a hundred times larger than
others, which heads attend to when they have nothing to look for (Sun et al. 2024, Massive Activations in Large Language
Models, arXiv 2402.17762): where it is lost, the whole window is worse. So a token counts for as much as its state is long.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from poise.core.checkpoint import Checkpoint
from poise.core.errors import PoiseError, UsageError
from poise.core.format import Format, Params, QTensor
from poise.core.precision import product_dtype, products
from poise.core.registry import parse_spec
from poise.training._codes import LearnedWeight
from poise.training._descent import Descent

TRAINED = 12
"""Bytes a parameter of the model: original in float32, what parameters multiply, gradients."""
LEARNED = 26
"""Further bytes where codes are trained: places, gradients, Adam's two means, levels and their distances."""
POSITIONS = 256
"""Whose logits are in memory at a time."""
LOGITS = 1 << 20
"""That are made distributions at a time: they stay in the cache, however many words a vocabulary has."""
WORDS = 16
"""Of the words that no window has, one in so many is taught."""
TAUGHT = 3
"""Of so many blocks one's hidden states are taught."""
LEVELS = 8
"""Of a grid that learns at the given rates, or a coarser one. Of a finer grid less was lost, and the same steps would undo more of
what was solved: its rates fall with the square of its levels. (Measured at 8 and 16 levels; docs/lab.md.)"""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the original makes of windows, kept so that it is read once and not in memory afterwards.

    Attributes:
        states: what its head reads, [windows, length, hidden].
        head: its output embedding, [vocabulary, hidden].
        inner: hidden states of taught blocks, bfloat16 [windows, blocks, length, hidden], on disk; None if none are taught.
    """

    states: Tensor
    head: Tensor
    inner: Tensor | None


Seen = Callable[[int, int, float, float], None]
"""Called with (steps done, steps, loss, divergence on held-back windows when it was last evaluated) after every step."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What training came to.

    Attributes:
        weights: name -> the same codes with tuned parameters.
        norms: parameter -> its tuned value.
        before, after: divergence on the held-back windows, nats a token.
        steps: after which the best was found.
    """

    weights: dict[str, QTensor]
    norms: dict[str, Tensor]
    before: float
    after: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Adam with a cosine schedule; what was best on the held-back windows is kept.

    Attributes:
        steps: of training.
        batch: tokens of a step, about.
        scale_rate: learning rate of scales, as a share of their root mean square. All rates are those of a grid of up to eight levels; of
            a finer one they fall with the square of its levels, and norms learn as fast as the coarsest.
        norm_rate: likewise of norms: some are forty times smaller than others.
        code_rate: learning rate of codes, in levels a step; 0 leaves them as they are. Formats that are not scalar keep
            theirs.
        hidden: weight of the hidden states' error, as a share of their size, beside the divergence.
        held: share of the windows that only judge.
        reads: of a window while training lasts, if there is enough text.
        every: steps between two evaluations, after each of which an interrupted training can go on.
        seed: of the order of windows.
    """

    steps: int = 200
    batch: int = 2048
    scale_rate: float = 3e-3
    norm_rate: float = 1e-3
    code_rate: float = 0.0
    hidden: float = 0.0
    held: float = 0.06
    reads: int = 3
    every: int = 40
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of text that training would read without reading any twice."""
        return round(self.steps * self.batch / (1 - self.held))

    def memory(self, checkpoint: Checkpoint) -> int:
        """Bytes that training a model takes, about: with its weights, and with what a step's tokens put into linears and out."""
        parameters = sum(info.numel for info in checkpoint.tensors().values())
        kept = sum(
            linear.rows + linear.columns for linear in checkpoint.linears() if linear.block is not None
        )
        return (TRAINED + (LEARNED if self.code_rate else 0)) * parameters + 4 * self.batch * kept

    def judging(self, windows: int) -> int:
        """How many of the windows judge: the last ones."""
        return max(1, round(self.held * windows))

    def run(
        self,
        model: Any,
        original: Answers,
        weights: dict[str, QTensor],
        transposed: frozenset[str],
        windows: Sequence[Sequence[int]],
        seen: Seen,
        kept: Path | None = None,
    ) -> Tuned:
        """Tunes a model in place.

        Args:
            model: in float32, as transformers runs it; every weight that is not among ``weights`` as it will stay.
            original: ``answers`` of the original to the windows, with hidden states if they are to be taught.
            weights: parameter of the model -> its quantized weight.
            transposed: parameters that the model stores as [in, out].
            windows: token ids, all of one length; the last ones are held back.
            kept: file that keeps the state between evaluations; training that was interrupted goes on from it.

        Raises:
            PoiseError: too few windows to hold some back.
        """
        count = self.judging(len(windows))
        if len(windows) < 2 * count:
            raise PoiseError(f"{len(windows)} windows are too few to tune on and to hold some back")
        held = list(range(len(windows) - count, len(windows)))
        batch = max(1, self.batch // len(windows[0]))
        model.requires_grad_(False)
        lesson = _Lesson(model, original, torch.tensor(windows), self.hidden)
        parts = {
            name: _attach(model, name, weight, name in transposed, self.code_rate > 0)
            for name, weight in weights.items()
        }
        norms = {
            name: value
            for name, value in model.named_parameters()
            if value.dim() == 1 and "parametriz" not in name
        }
        groups = self._groups(list(norms.values()), list(parts.values()))
        descent = Descent(groups, steps=self.steps, windows=len(windows) - count, seed=self.seed, kept=kept)
        if descent.step == 0:
            descent.judged(lesson.judge(held, batch))
        while descent.step < self.steps:
            loss = lesson.loss(descent.draw(batch))
            descent.descend(loss)
            if descent.step % self.every == 0 or descent.step == self.steps:
                descent.judged(lesson.judge(held, batch))
                descent.save()
            seen(descent.step, self.steps, float(loss.detach()), descent.now)
        descent.finish()
        return Tuned(
            weights={name: part.result() for name, part in parts.items()},
            norms={name: value.detach().clone() for name, value in norms.items()},
            before=descent.before,
            after=descent.least,
            steps=descent.best_step,
        )

    def _groups(self, norms: list[Tensor], parts: "list[_Weight | LearnedWeight]") -> list[dict[str, Any]]:
        """What learns, and how fast."""
        paces = [_pace(part.weight.format) for part in parts]
        sized = [(value, self.norm_rate * max(paces, default=1.0)) for value in norms]
        sized += [
            (value, self.scale_rate * pace)
            for part, pace in zip(parts, paces, strict=True)
            for value in part.linear.values()
        ]
        places = [
            {"params": [part.places], "lr": self.code_rate * pace}
            for part, pace in zip(parts, paces, strict=True)
            if isinstance(part, LearnedWeight)
        ]
        return [{"params": [value], "lr": rate * _size(value)} for value, rate in sized] + places


class _Lesson:
    """What a model is taught: the original's answers to windows, among the words that the windows have and some others.

    A head multiplies with every word of the vocabulary, of which a text has a fraction. Its words tell far more than the state
    behind an answer has numbers, so what others would say follows. Judged are answers among all words.

    Args:
        ids: the windows, [windows, length].
        hidden: weight of the hidden states' error.
    """

    def __init__(self, model: Any, original: Answers, ids: Tensor, hidden: float) -> None:
        self.model, self.original, self.ids, self.hidden = model, original, ids, hidden
        self.head = _head(model)
        self.words = _words(ids, len(self.head))
        self.taught = self.head[self.words], original.head[self.words]

    def loss(self, some: list[int]) -> Tensor:
        """Of some windows: their divergence, and the hidden states' error if those are taught."""
        states, inner = _states(self.model, self.ids[some], self.original.inner is not None)
        ours, theirs = self.taught
        loss = divergence(states, ours, self.original.states[some], theirs)
        if self.original.inner is None:
            return loss
        return loss + self.hidden * _error(inner, self.original.inner[some].transpose(0, 1))

    @torch.no_grad()
    def judge(self, some: list[int], batch: int) -> float:
        """Mean divergence over windows, so many at a time."""
        total = 0.0
        for start in range(0, len(some), batch):
            part = some[start : start + batch]
            states, wanted = _states(self.model, self.ids[part])[0], self.original.states[part]
            total += len(part) * float(divergence(states, self.head, wanted, self.original.head))
        return total / len(some)


def distill_of(spec: str) -> Distill:
    """The training that a spec names: ``distill``, or ``distill(steps=100)``.

    Raises:
        UsageError: another name, or values it does not take.
    """
    name, arguments = parse_spec(spec)
    if name != "distill":
        raise UsageError(f"no training named {name!r}: there is distill")
    try:
        return Distill(**arguments)
    except TypeError as error:
        raise UsageError(f"{spec}: {error}") from error


def answers(
    model: Any,
    windows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
    *,
    hidden: Path | None = None,
) -> Answers:
    """Reads the windows with the original.

    Args:
        model: in float32, as transformers runs it; computes in ``product_dtype``.
        progress: told the windows that are read, and all of them.
        hidden: file that keeps hidden states of every ``TAUGHT`` th block, if they are wanted; a model of fewer than four
            blocks has none.
    """
    states, blocks = list[Tensor](), 0
    with torch.no_grad(), open(hidden or os.devnull, "wb") as file:
        for number, window in enumerate(windows, 1):
            last, between = _states(model, torch.tensor([window]), hidden is not None)
            states.append(last)
            blocks = len(between)
            for inner in between:
                file.write(inner.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
            progress(number, len(windows))
    whole = torch.cat(states)
    kept = None
    if hidden is not None and blocks:
        size = whole.numel() * blocks
        kept = torch.from_file(str(hidden), shared=False, size=size, dtype=torch.bfloat16)
        kept = kept.view(len(whole), blocks, *whole.shape[1:])
    return Answers(states=whole, head=_head(model), inner=kept)


def divergence(states: Tensor, head: Tensor, wanted: Tensor, original: Tensor) -> Tensor:
    """Mean divergence of next-token distributions from the original's, nats a token.

    Args:
        states, wanted: what the heads read, [..., hidden].
        head, original: the heads, [vocabulary, hidden].
    """
    found: Tensor = _Divergence.apply(states.flatten(0, -2), wanted.flatten(0, -2), head, original)  # type: ignore[no-untyped-call]
    return found


def _states(model: Any, ids: Tensor, hidden: bool = False) -> tuple[Tensor, list[Tensor]]:
    """What the head reads, and hidden states after every ``TAUGHT`` th block but the last, if they are wanted."""
    with products():
        found = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
    inner = list(found.hidden_states[TAUGHT:-1:TAUGHT]) if hidden else []
    return found.last_hidden_state.to(product_dtype()), inner


def _error(states: list[Tensor], wanted: Tensor) -> Tensor:
    """Mean over windows and blocks of sum_t |h_t - w_t|^2 / |w_t| over sum_t |w_t|: the squared error of each token's state as a
    share of its square, weighted by its length.

    Args:
        states: of each block, [windows, tokens, hidden].
        wanted: [blocks, windows, tokens, hidden].
    """
    total = torch.zeros(())
    for ours, theirs in zip(states, wanted, strict=True):
        size = theirs.float().norm(dim=-1).clamp(min=torch.finfo(torch.bfloat16).tiny)
        error = (ours.float() - theirs.float()).square().sum(-1) / size
        total = total + (error.sum(-1) / size.sum(-1)).mean()
    return total / max(1, len(states))


def _words(ids: Tensor, vocabulary: int) -> Tensor:
    """Those that the windows have and every ``WORDS`` th, ascending."""
    taught = torch.zeros(vocabulary, dtype=torch.bool)
    taught[::WORDS] = True
    taught[ids.flatten()] = True
    return taught.nonzero().flatten()


def _head(model: Any) -> Tensor:
    weight: Tensor = model.get_output_embeddings().weight.detach()
    return weight.to(product_dtype())


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) of softmax(states head^T), a few positions at a time, with its gradient by the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, head: Tensor, original: Tensor) -> Tensor:
        gradient, total = torch.empty_like(states), 0.0
        rows = max(1, LOGITS // len(head))
        for start in range(0, len(states), POSITIONS):
            run = slice(start, start + POSITIONS)
            student, teacher = linear(states[run], head), linear(wanted[run], original)
            for row in range(0, len(student), rows):
                part = slice(row, row + rows)
                ours = torch.log_softmax(student[part].float(), -1)
                theirs = torch.log_softmax(teacher[part].float(), -1)
                share = theirs.exp()
                total += float((share * theirs.sub_(ours)).sum())
                student[part] = ours.exp_().sub_(share)
            gradient[run] = student @ head
        ctx.save_for_backward(gradient.div_(len(states)))
        return torch.tensor(total / len(states))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


class _Weight(nn.Module):
    """A weight as the sum of what its linear parameters multiply."""

    def __init__(self, weight: QTensor, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed
        rows, columns = weight.shape
        self.columns = columns
        self.linear = nn.ParameterDict()
        fixed = weight.decode()
        for key, basis in weight.format.basis(weight.codes, weight.params).items():
            span = weight.format.span_of(key, columns)
            padded = torch.nn.functional.pad(basis, (0, -columns % span)).view(rows, -1, span)
            self.register_buffer(f"basis_{key}", padded.to(torch.bfloat16))
            self.linear[key] = nn.Parameter(weight.params[key].float(), requires_grad=False)
        self.register_buffer("fixed", None if self.linear else fixed.to(torch.bfloat16))

    def forward(self, _: Tensor) -> Tensor:
        whole: Tensor
        if isinstance(self.fixed, Tensor):
            whole = self.fixed
        else:
            parts: list[Tensor] = [
                getattr(self, f"basis_{key}") * value.to(torch.bfloat16).unsqueeze(-1)
                for key, value in self.linear.items()
            ]
            whole = sum(parts[1:], parts[0]).flatten(1)[:, : self.columns]
        whole = whole.to(product_dtype())
        return whole.T if self.transposed else whole

    def result(self) -> QTensor:
        """The same codes with the parameters of now, as they are stored."""
        params: Params = {
            key: self.linear[key].detach().to(value.dtype) if key in self.linear else value
            for key, value in self.weight.params.items()
        }
        return QTensor(codes=self.weight.codes, params=params, format=self.weight.format)


def _attach(
    model: nn.Module, name: str, weight: QTensor, transposed: bool, codes: bool = False
) -> _Weight | LearnedWeight:
    """Makes a parameter of the model the decoded weight, differentiable in its linear parameters, and codes if wanted."""
    path, _, leaf = name.rpartition(".")
    part: _Weight | LearnedWeight
    if codes and weight.format.alphabet is not None:
        original = getattr(model.get_submodule(path), leaf).detach()
        part = LearnedWeight(original.T if transposed else original, weight, transposed)
    else:
        part = _Weight(weight, transposed)
    parametrize.register_parametrization(model.get_submodule(path), leaf, part, unsafe=True)
    return part


def _pace(format: Format) -> float:
    """Share of the learning rates at which weights of a format learn."""
    levels = LEVELS if format.alphabet is None else len(format.alphabet)
    return min(1.0, (LEVELS / levels) ** 2)


def _size(value: Tensor) -> float:
    """Root mean square, not zero."""
    return max(float(value.detach().square().mean().sqrt()), 1e-12)
