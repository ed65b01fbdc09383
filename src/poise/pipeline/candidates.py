"""The models of one comparison: what each of them reads and answers, and the row that comes of it."""

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from poise.calibration.text import Text
from poise.checkpoints import open_checkpoint
from poise.checkpoints.rounded import Rounded
from poise.checkpoints.running import Running
from poise.core.artifact import Artifact
from poise.core.checkpoint import Checkpoint
from poise.core.comparison import Side
from poise.core.errors import CheckpointError, UsageError
from poise.core.judge import Judge
from poise.core.metric import Answer, Score
from poise.core.run import versions
from poise.core.verdict import Range, Row
from poise.endpoints.client import Client, is_address
from poise.pipeline.answering import choose, end_tokens, surprised, write
from poise.pipeline.cache import Cache
from poise.pipeline.harness import run_tasks
from poise.pipeline.judging import DAMAGED, Judged, controls, judge_answers, judged_question, judged_scores
from poise.pipeline.progress import Progress
from poise.pipeline.rows import latency, layers, missing, shown
from poise.pipeline.running import ask, sides
from poise.pipeline.samples import (
    Prompt,
    Protocol,
    Window,
    read_windows,
)
from poise.pipeline.scoring import Lazy, floor, logit_metrics, score_alone, score_pair
from poise.pipeline.subjects import (
    default_engine,
    model_path,
    refuse_known,
    started,
    whole_artifact,
)
from poise.pipeline.summary import (
    Chosen,
    Reading,
    Written,
    fidelity_scores,
    own_scores,
    parts,
    questions,
)
from poise.statistics.noninferiority import Question, judge
from poise.statistics.partition import Partition

FLOOR_WINDOWS = 2


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of lm-evaluation-harness: the first ``limit`` items of each, from its own list or a folder of definitions."""

    names: tuple[str, ...] = ()
    limit: int | None = None
    folder: Path | None = None


NO_TASKS = Tasks()


class Job:
    """The models of one comparison, and what is known of the original so far."""

    def __init__(
        self,
        *,
        sources: list[str | Path],
        engines: list[str | None],
        folder: Path | None,
        seed: int,
        progress: Progress,
    ) -> None:
        if is_address(sources[0]):
            raise UsageError(
                f"{sources[0]}: an endpoint can be a candidate; the original has to be a model that can be loaded"
            )
        self.sources = sources
        self.artifacts: list[Artifact | None] = [whole_artifact(source) for source in sources]
        self.models: list[Checkpoint] = [_opened(source) for source in sources]
        self.engines = [e or default_engine(m) for e, m in zip(engines, self.models, strict=True)]
        self.tokenizer = self.models[0].tokenizer()
        self.tokenizers = [_tokenizer(model, self.tokenizer) for model in self.models]
        self.folder, self.seed, self.progress = folder, seed, progress
        self.lazy = [Lazy(partial(started, e, m)) for e, m in zip(self.engines, self.models, strict=True)]
        self._caches: dict[str, Cache] = {}
        self._original_scores: tuple[Score, ...] = ()
        self.judge: Judge | None = None
        self.wished: set[str] = set()
        self._known_tasks: dict[str, dict[str, Any]] = {}
        self._controls: tuple[Judged, Judged] | None = None

    def read(self, texts: list[Text], protocol: Protocol, limit: int | None, force: bool) -> list[Window]:
        """Windows of all texts, none of which a candidate knows."""
        context = min((model.context for model in self.models if model.context), default=protocol.length)
        if context < protocol.length:
            facts = {
                **protocol.__dict__,
                "length": context,
                "first": protocol.first * context // protocol.length,
            }
            protocol = Protocol(**facts)
        cut = read_windows(texts, self.tokenizer, protocol, limit)
        for artifact in () if force else filter(None, self.artifacts):
            for text in texts:
                mine = [window.text for window in cut if window.domain == text.name]
                if artifact.manifest.calibration == text.hash:
                    raise UsageError(
                        f"{text.name} is what {artifact.path.name} was calibrated on; compare on another text"
                    )
                refuse_known(artifact, text.name, mine)
        return cut

    def cache(self, *facts: Any) -> Cache:
        """Of the models with these numbers, and whatever else the records depend on."""
        models = [
            (self.models[fact].fingerprint(), self.engines[fact]) if isinstance(fact, int) else fact
            for fact in facts
        ]
        key = json.dumps(models)
        if key not in self._caches:  # without a folder this is all that later candidates know of the original
            self._caches[key] = Cache(self.folder, {"facts": models, "versions": versions()})
        return self._caches[key]

    def sides(self, efficiency: bool) -> list[Side]:
        """Size, and cost if it is wanted."""
        return sides(self.models, self.engines, self.sources, efficiency, self.progress)

    def same_tokens(self, number: int, windows: list[Window]) -> str:
        """Why a candidate cannot be compared token by token; empty if it can."""
        if isinstance(self.models[number], Running):
            return "it runs elsewhere and tells no probabilities: only its answers can be compared"
        sizes = [_vocabulary(self.models[place]) for place in (0, number)]
        if all(sizes) and sizes[0] != sizes[1]:
            return f"vocabularies of {sizes[0]} and {sizes[1]} tokens: only bits per byte can be compared"
        for window in windows[:4]:
            ids = [
                each(window.text, add_special_tokens=False, verbose=False)["input_ids"]
                for each in (self.tokenizers[number], self.tokenizer)
            ]
            if ids[0] != ids[1]:
                return "the tokenizers cut the text differently: only bits per byte can be compared"
        return ""

    def row(
        self,
        number: int,
        windows: list[Window],
        prompts: list[Prompt],
        tasks: Tasks,
        limit: int,
        sides: list[Side],
        allowed: dict[str, Range],
    ) -> tuple[Row, list[dict[str, Any]]]:
        """A candidate's row, and a line for each of its samples."""
        notes = [reason] if (reason := self.same_tokens(number, windows)) else []
        partition = Partition([window.document for window in windows], self.seed)
        remote = isinstance(self.models[number], Running)
        if remote:
            reading = Reading(windows=windows, records=[], partition=partition)
        elif reason:
            reading = self._alone(number, windows, partition)
        else:
            records = score_pair(
                self.lazy[0],
                self.lazy[number],
                windows,
                self.cache(0, number, sorted(logit_metrics())),
                self.progress,
            )
            reading = Reading(windows=windows, records=records, partition=partition)
        chosen = (
            [] if remote else self._choose(number, [prompt for prompt in prompts if prompt.choices], tasks)
        )
        written = self._write(number, [prompt for prompt in prompts if not prompt.choices], limit, not reason)
        noise = self._floor(windows) if reading.records else math.nan
        self.lazy[number].close()
        asked = questions(reading, chosen, written, allowed)
        if slower := latency(sides[0], sides[number], allowed["latency_ratio"]):
            asked["latency_ratio"] = slower
        judged, question, problem = self._judged(written, allowed["judged_win_rate"])
        if question:
            asked["judged_win_rate"] = question
        notes += [problem] if problem else []
        if not asked:
            notes.append("no figure that was measured has a range")
        own = own_scores(reading, chosen, written, "candidate")
        known = own_scores(reading, chosen, written, "original")
        if len(known) > len(self._original_scores):  # beside an endpoint little is asked of it
            self._original_scores = known
        side = Side(**{**sides[number].__dict__, "scores": (*own, *sides[number].scores)})
        row = Row(
            side=side,
            scores=(*fidelity_scores(reading, chosen, written, noise), *judged),
            findings=(*judge(asked), *missing(self.wished - asked.keys(), allowed)),
            parts={**parts(reading), **layers(self.sources[number])},
            answers=tuple(shown(written)),
            notes=tuple(notes),
        )
        return row, [
            {"candidate": side.label, **line}
            for lines in (reading.lines(), *(item.lines() for item in chosen), written.lines())
            for line in lines
        ]

    def original_side(self, side: Side) -> Side:
        """With its own perplexity and answers' figures."""
        return Side(**{**side.__dict__, "scores": (*self._original_scores, *side.scores)})

    def _alone(self, number: int, windows: list[Window], partition: Partition) -> Reading:
        tokenizer = self.tokenizers[number]
        opening = tokenizer("")["input_ids"][:1]
        cut = []
        for window in windows:
            ids = tokenizer(window.text, add_special_tokens=False, verbose=False)["input_ids"]
            cut.append((window.key, [*opening, *ids], len(window.text.encode())))
        own = [(w.key, list(w.tokens), len(w.text.encode())) for w in windows]
        found = [
            score_alone(self.lazy[place], each, self.cache(place, "alone"))
            for place, each in ((0, own), (number, cut))
        ]
        return Reading(windows=windows, records=[], partition=partition, alone=list(zip(*found, strict=True)))

    def _choose(self, number: int, prompts: list[Prompt], tasks: Tasks) -> list[Chosen]:
        """Questions with choices, and the tasks of the harness."""
        found = []
        if prompts:
            both = [
                choose(
                    self.lazy[place],
                    prompts,
                    self.tokenizers[place],
                    self.cache(place, "choices"),
                    self.progress,
                )
                for place in (0, number)
            ]
            found.append(
                Chosen(
                    name="accuracy",
                    protocol="log-likelihood of choices, the largest wins",
                    samples=[(prompt.key, prompt.document) for prompt in prompts],
                    original=both[0],
                    candidate=both[1],
                    partition=Partition([prompt.document for prompt in prompts], self.seed),
                )
            )
        return found + (self._tasks(number, tasks) if tasks.names else [])

    def _tasks(self, number: int, tasks: Tasks) -> list[Chosen]:
        both = [
            run_tasks(
                self.lazy[place],
                self.tokenizers[place],
                tasks.names,
                limit=tasks.limit,
                folder=tasks.folder,
                context=min((model.context for model in self.models if model.context), default=2048),
                cache=self.cache(place, "tasks"),
                progress=self.progress,
            )
            for place in (0, number)
        ]
        found = []
        for name, original in both[0].items():
            items = sorted(original.keys() & both[1].get(name, {}).keys(), key=int)
            digest = hashlib.sha256(f"lm-eval {version('lm_eval')} {name} {items}".encode()).hexdigest()
            self._known_tasks[name] = {
                "kind": "task",
                "name": name,
                "samples": len(items),
                "documents": len(items),
                "hash": digest,
            }
            found.append(
                Chosen(
                    name=name.replace(" ", "_"),
                    protocol=f"lm-eval {version('lm_eval')}, {name}",
                    samples=[(f"{name} {item}", item) for item in items],
                    original=[original[item] for item in items],
                    candidate=[both[1][name][item] for item in items],
                    partition=Partition(items, self.seed),
                )
            )
        return found

    def task_data(self) -> list[dict[str, Any]]:
        """The tasks that were run, as the verdict lists its data."""
        return [self._known_tasks[name] for name in sorted(self._known_tasks)]

    def _write(self, number: int, prompts: list[Prompt], limit: int, same: bool) -> Written:
        if not prompts:
            return Written()
        both: list[list[Answer]] = []
        for place in (0, number):
            tokenizer = self.tokenizers[place]
            ends = end_tokens(self.models[place].config, tokenizer)
            cache = self.cache(place, f"answers of {limit}")
            model = self.models[place]
            if isinstance(model, Running):
                made = ask(model.client, prompts, self.tokenizer, limit, cache, self.progress)
            else:
                made = write(self.lazy[place], prompts, tokenizer, ends, limit, cache, self.progress)
            if place and not same and not isinstance(model, Running):
                made = [_in_tokens_of(self.tokenizer, answer) for answer in made]
            both.append(
                surprised(
                    self.lazy[0],
                    prompts,
                    made,
                    self.tokenizer,
                    self.cache(0, "surprise after two prompts"),
                )
            )
        partition = Partition([prompt.document for prompt in prompts], self.seed)
        return Written(prompts=prompts, original=both[0], candidate=both[1], partition=partition)

    def _judged(self, written: Written, allowed: Range) -> tuple[list[Score], Question | None, str]:
        """Scores and the question of a judge that passed its controls, or why there are none."""
        judge = self.judge
        if judge is None or not written.prompts:
            return [], None, ""
        cache, partition = self.cache(judge.name, "judge"), written.partition
        compared = partial(judge_answers, judge, written.prompts, cache=cache, progress=self.progress)
        if self._controls is None:
            itself = compared(written.original, written.original)
            self._controls = itself, compared(written.original, self._damaged(written))
        if against := controls(*self._controls, partition):
            return [], None, f"no judged verdict: {judge.name} fails its controls: {'; '.join(against)}"
        found = compared(written.original, written.candidate)
        scores = judged_scores(judge, found, *self._controls, partition)
        return scores, judged_question(found, partition, allowed), ""

    def _damaged(self, written: Written) -> list[Answer]:
        """What the original would answer at 2 bits."""
        model = Rounded(self.models[0], DAMAGED)
        lazy = Lazy(partial(started, "torch", model))
        limit = max((len(answer.tokens) for answer in written.original), default=1)
        cache = self.cache(0, f"damaged, answers of {limit}")
        ends = end_tokens(model.config, self.tokenizer)
        made = write(lazy, written.prompts, self.tokenizer, ends, limit, cache, self.progress)
        lazy.close()
        return made

    def _floor(self, windows: list[Window]) -> float:
        cache = self.cache(0, 0, "floor")
        key = " ".join(window.key for window in windows[:FLOOR_WINDOWS])
        if key not in cache:
            cache[key] = floor(self.lazy[0], windows[:FLOOR_WINDOWS])
        return float(cache[key])


def _opened(source: str | Path) -> Checkpoint:
    """A model on disk or on the hub, or a running endpoint."""
    if is_address(source):
        return Running(Client(str(source), key=os.environ.get("OPENAI_API_KEY")))
    return open_checkpoint(model_path(source))


def _tokenizer(model: Checkpoint, original: Any) -> Any:
    """A model without a tokenizer is given the original's."""
    try:
        return model.tokenizer()
    except CheckpointError:
        return original


def _in_tokens_of(tokenizer: Any, answer: Answer) -> Answer:
    """The same text in the tokens that answers are compared in: those of another tokenizer mean something else."""
    tokens = tokenizer(answer.text, add_special_tokens=False, verbose=False)["input_ids"]
    return replace(answer, tokens=tuple(tokens))


def _vocabulary(model: Checkpoint) -> int:
    return next((linear.rows for linear in model.linears() if linear.role == "embedding"), 0)
