"""Answers that take as long as their reader does: they end, half sent, when the key ends on whose behalf they are."""

from __future__ import annotations

import asyncio

from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from adapterhub.api.auth import Principal
from adapterhub.api.hub import Hub
from adapterhub.errors import BadRequest, HubError


class Download(Response):
    """Another response, which is sent for as long as the caller's key is good."""

    def __init__(self, hub: Hub, caller: Principal, response: Response) -> None:
        super().__init__()
        self._hub, self._caller, self._response = hub, caller, response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what ended it before it began; later nothing can be said but by hanging up, as is done with what is
        not whole."""
        begun, reason = False, None

        async def checked(message: Message) -> None:
            nonlocal begun
            if not begun and message["status"] in (400, 416):  # what a file's own response says of a Range
                raise _bad_range(message["status"])
            begun = True
            await send(message)

        def end(error: HubError) -> None:
            nonlocal reason
            reason = error
            sending.cancel()

        sending = asyncio.ensure_future(self._response(scope, receive, checked))
        try:
            with self._hub.underway.on_behalf(self._caller.key, end):
                await sending
        except asyncio.CancelledError:
            if reason is None:
                raise
            if not begun:
                raise reason from None
        finally:
            sending.cancel()


def _bad_range(status: int) -> HubError:
    error = BadRequest("The header Range asks for what there is not. Leave it out for all of the file.", param="Range")
    error.status = status
    return error
