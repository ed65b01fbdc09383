"""A comparison's answers -> a blind voting page -> strengths."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from poise.core.errors import MissingExtra
from poise.core.verdict import Strength
from poise.reports.verdict import read_verdict
from poise.statistics.bradley_terry import Vote, strengths
from poise.voting.ballots import CHOICES, Poll, read_pairs
from poise.voting.page import voting_page

if TYPE_CHECKING:
    from starlette.applications import Starlette

VOTES = "votes.jsonl"


def tally(folder: Path) -> list[Strength]:
    """What was voted so far, by model.

    Raises:
        UsageError: the folder holds no comparison with answers.
    """
    original = read_verdict(folder / "verdict.json").original.label
    return _strengths(Poll(read_pairs(folder, original), folder / VOTES), original)


def voting(folder: Path, seed: int = 0) -> "Starlette":
    """The page for the answers of a comparison; votes are kept beside them.

    Raises:
        UsageError: the folder holds no comparison with answers.
        MissingExtra: the server is not installed.
    """
    original = read_verdict(folder / "verdict.json").original.label
    poll = Poll(read_pairs(folder, original), folder / VOTES, seed)
    return voting_page(poll, partial(_strengths, poll, original))


def serve_vote(folder: Path, host: str, port: int, seed: int = 0) -> None:
    """Serves the page until it is interrupted."""
    page = voting(folder, seed)
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "serve") from error
    uvicorn.run(page, host=host, port=port, log_level="warning")


def _strengths(poll: Poll, original: str) -> list[Strength]:
    votes = [
        Vote(
            first=vote["left"], second=vote["right"], score=CHOICES[vote["choice"]], document=vote["document"]
        )
        for vote in poll.votes
    ]
    return strengths(votes, original)
