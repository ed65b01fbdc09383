"""Blind ballots: two answers to a prompt, which model wrote which is drawn for every voter, and votes that are kept at once."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from poise.core.errors import UsageError

CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5, "both bad": 0.5}
"""What a voter can say, and the score of the left answer."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What two models answered to the same prompt."""

    key: str
    document: str
    prompt: str
    names: tuple[str, str]
    answers: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """A pair as one voter sees it."""

    key: str
    pair: Pair
    left: int

    @property
    def sides(self) -> tuple[str, str]:
        """Texts, left and right."""
        return self.pair.answers[self.left], self.pair.answers[1 - self.left]

    @property
    def names(self) -> tuple[str, str]:
        """Models, left and right: not for the page before the vote."""
        return self.pair.names[self.left], self.pair.names[1 - self.left]


def read_pairs(folder: Path, original: str) -> list[Pair]:
    """Answers of a comparison that differ: the same answer twice has nothing to choose.

    Raises:
        UsageError: the folder has no answers.
    """
    try:
        lines = [
            json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: no comparison ({error}); poise compare makes one") from error
    found = [
        Pair(
            key=f"{line['sample']}/{line['candidate']}",
            document=line["document"],
            prompt=line["prompt"],
            names=(original, line["candidate"]),
            answers=(line["original"], line["answer"]),
        )
        for line in lines
        if line["kind"] == "answer" and line["original"] != line["answer"]
    ]
    if not found:
        raise UsageError(f"{folder}: no answers that differ; give poise compare --prompts FILE")
    return found


class Poll:
    """Who is asked what, and what they said.

    Args:
        file: votes, one line of JSON each, appended as they come.
        seed: of sides and order.
    """

    def __init__(self, pairs: Sequence[Pair], file: Path, seed: int = 0) -> None:
        self.pairs, self._file, self._seed = pairs, file, seed
        self.votes = [*self._read()]

    def next(self, voter: str) -> Ballot | None:
        """The next ballot of a voter in an order of their own; None when all are answered."""
        done = {vote["pair"] for vote in self.votes if vote["voter"] == voter}
        order = list(self.pairs)
        random.Random(f"{self._seed} {voter}").shuffle(order)
        return next((self._ballot(pair, voter) for pair in order if pair.key not in done), None)

    def left(self, voter: str) -> int:
        """How many ballots a voter has still to answer."""
        return len(self.pairs) - len({vote["pair"] for vote in self.votes if vote["voter"] == voter})

    def vote(self, voter: str, ballot: str, choice: str) -> Ballot:
        """Records a choice; a second one on the same ballot changes nothing.

        Raises:
            UsageError: no such ballot or choice.
        """
        found = next((b for b in (self._ballot(pair, voter) for pair in self.pairs) if b.key == ballot), None)
        if found is None or choice not in CHOICES:
            raise UsageError("no such ballot" if found is None else f"choose one of {', '.join(CHOICES)}")
        known = any(vote["voter"] == voter and vote["pair"] == found.pair.key for vote in self.votes)
        if not known:
            left, right = found.names
            record = {
                "voter": voter,
                "pair": found.pair.key,
                "document": found.pair.document,
                "left": left,
                "right": right,
                "choice": choice,
            }
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.votes.append(record)
        return found

    def _ballot(self, pair: Pair, voter: str) -> Ballot:
        digest = hashlib.sha256(f"{self._seed} {voter} {pair.key}".encode()).digest()
        return Ballot(key=digest.hex()[:24], pair=pair, left=digest[-1] % 2)

    def _read(self) -> Iterator[dict[str, str]]:
        if not self._file.exists():
            return
        known = {pair.key for pair in self.pairs}
        for line in self._file.read_text(encoding="utf-8").splitlines():
            try:
                vote = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the server ended
            if vote["pair"] in known:
                yield vote
