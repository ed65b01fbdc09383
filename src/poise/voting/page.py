"""The voting page: plain forms, no scripts, no network. Who wrote what is not in the page before the vote."""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, StrictUndefined

from poise.core.errors import MissingExtra, UsageError
from poise.voting.ballots import CHOICES, Poll

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGES = Environment(
    loader=PackageLoader("poise.voting", "templates"),
    undefined=StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'"
}
LARGEST = 4096


def voting_page(poll: Poll, results: Callable[[], list[Any]]) -> "Starlette":
    """The application.

    Args:
        results: strengths so far, for the page that shows them.

    Raises:
        MissingExtra: the server is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.responses import HTMLResponse, RedirectResponse
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtra("starlette", "serve") from error

    def voter_of(request: "Request") -> str:
        return request.cookies.get("voter") or secrets.token_hex(8)

    def shown(name: str, voter: str, status: int = 200, **facts: Any) -> "Response":
        text = PAGES.get_template(name).render(choices=CHOICES, **facts)
        response = HTMLResponse(text, status_code=status, headers=HEADERS)
        response.set_cookie("voter", voter, samesite="strict", httponly=True)
        return response

    async def ballot(request: "Request") -> "Response":
        voter = voter_of(request)
        found = poll.next(voter)
        if found is None:
            return RedirectResponse("/results", status_code=303)
        return shown("ballot.html.jinja", voter, ballot=found, left=poll.left(voter))

    async def vote(request: "Request") -> "Response":
        voter = voter_of(request)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST:
                return shown("refused.html.jinja", voter, status=413, reason="the form is too long")
        form = {key: values[0] for key, values in parse_qs(body.decode(errors="replace")).items()}
        try:
            found = poll.vote(voter, form.get("ballot", ""), form.get("choice", ""))
        except UsageError as error:
            return shown("refused.html.jinja", voter, status=400, reason=str(error))
        return shown("revealed.html.jinja", voter, ballot=found, choice=form["choice"], left=poll.left(voter))

    async def result(request: "Request") -> "Response":
        return shown("results.html.jinja", voter_of(request), results=results(), votes=len(poll.votes))

    return Starlette(
        routes=[
            Route("/", ballot),
            Route("/vote", vote, methods=["POST"]),
            Route("/results", result),
        ]
    )
