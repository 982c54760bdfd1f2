"""The front's HTTP: what a peer says is decoded and checked here, and handed on to the agent.

The agent hears only what this module says anew: a path made of checked parts, a message encoded
again, and who the caller has proven to be. No header, no path and no byte of a body of the peer's
own goes through, but for rsync's, which the agent does not read either.
"""

from __future__ import annotations

import asyncio
import io
import re
from typing import TYPE_CHECKING

import aiohttp
import structlog
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from migrate import config
from migrate.agent.front_link import BROKEN, PEER_HEADER, Caller
from migrate.agent.relay import CLOSE_DEADLINE_S, Relay
from migrate.agent.site import BODY_DEADLINE_S
from migrate.core import messages
from migrate.errors import ProtocolError
from migrate.rootfs import CHUNK_BYTES, END
from transport.identity import peer_of

if TYPE_CHECKING:
    from migrate.agent.relay import CheckText

log = structlog.get_logger()

SESSIONS_PATH = "/v1/sessions"
# As core/messages.py has it: a path is made of nothing else.
_ID = "{id:[a-zA-Z0-9][a-zA-Z0-9_-]{0,63}}"
# ASCII digits alone; nobody makes more passes, and no count is above messages.MAX_HEARD.
_PASS = re.compile(r"[0-9]{1,6}")
_COUNT = re.compile(r"[0-9]{1,9}")


class Gateway:
    """See the module. `path` is the agent's unix socket. In the event loop that serves it."""

    def __init__(self, path: str) -> None:
        self._agent = aiohttp.ClientSession(
            base_url="http://agent",
            connector=aiohttp.UnixConnector(path, limit=0),
            # The agent has deadlines of its own for whatever it waits for.
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=messages.MAX_MESSAGE_BYTES)
        app.router.add_post(SESSIONS_PATH, self._say)
        app.router.add_post(f"/v1/migrations/{_ID}/{{role:source|target}}", self._say)
        app.router.add_post("/v1/operator", self._say)
        app.router.add_post("/v1/host", self._say)
        app.router.add_put("/v1/crl", self._revocations)
        app.router.add_get(f"/v1/sessions/{_ID}/control", self._control)
        app.router.add_get(f"/v1/sessions/{_ID}/rootfs", self._rootfs)
        return app

    async def close(self) -> None:
        """Idempotent."""
        await self._agent.close()

    async def _say(self, request: web.Request) -> web.Response:
        """A message of a peer, and the agent's answer."""
        caller = _caller(request)
        try:
            message = messages.decode_from_source(await body_of(request))
        except ProtocolError as error:
            log.warning("message refused", **_who(caller), why=str(error))
            if request.path == SESSIONS_PATH:
                return _refused(error)
            raise web.HTTPConflict(text=error.message) from error
        return await self._hand_on(request, caller, messages.encode(message))

    async def _revocations(self, request: web.Request) -> web.Response:
        """A list of revoked identities; whether it counts is the agent's matter."""
        caller = _caller(request)
        try:
            revoked = x509.load_pem_x509_crl(await body_of(request))
        except ValueError as error:
            log.warning("revocations refused", **_who(caller), why=str(error))
            raise web.HTTPConflict(text="that is no list of revoked identities") from error
        return await self._hand_on(request, caller, revoked.public_bytes(Encoding.PEM))

    async def _hand_on(self, request: web.Request, caller: Caller, body: bytes) -> web.Response:
        async with self._agent.request(
            request.method, request.path, data=io.BytesIO(body), headers=_headers(caller)
        ) as answer:
            return web.Response(
                status=answer.status, body=await answer.read(), content_type=answer.content_type
            )

    async def _control(self, request: web.Request) -> web.StreamResponse:
        heard = _number(request, "heard", _COUNT, "heard is a number of messages")
        near = web.WebSocketResponse(
            heartbeat=config.HEARTBEAT_S, compress=False, max_msg_size=messages.MAX_MESSAGE_BYTES
        )
        return await self._relay(request, heard, near, _control_text, carries_bytes=False)

    async def _rootfs(self, request: web.Request) -> web.StreamResponse:
        number = _number(request, "pass", _PASS, "pass is the number of a pass")
        near = web.WebSocketResponse(compress=False, max_msg_size=4 * CHUNK_BYTES)
        return await self._relay(request, number, near, _rootfs_text, carries_bytes=True)

    async def _relay(
        self,
        request: web.Request,
        query: dict[str, str],
        near: web.WebSocketResponse,
        check_text: CheckText,
        *,
        carries_bytes: bool,
    ) -> web.StreamResponse:
        caller = _caller(request)
        with _transport(request).get_extra_info("socket").dup() as tcp:
            try:
                far = await self._agent.ws_connect(
                    request.path,
                    params=query,
                    headers=_headers(caller),
                    compress=0,
                    max_msg_size=max(messages.MAX_MESSAGE_BYTES, 4 * CHUNK_BYTES),
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_DEADLINE_S),
                )
            except aiohttp.WSServerHandshakeError as error:
                return web.Response(status=error.status, text="the agent has no such channel")
            try:
                await Relay(near, far, tcp, check_text, carries_bytes=carries_bytes).run(request)
            except ProtocolError as error:
                log.warning("message refused", **_who(caller), why=str(error))
            finally:
                # Whatever has happened, it was no word of the peer; ended before, it stays so.
                await far.close(code=BROKEN)
        # A channel that did not begin can't be answered with: there is nobody to hear it.
        return near if near.prepared else web.Response()


async def body_of(request: web.Request) -> bytes:
    """What the caller sends; one that hangs up meanwhile hears no answer either."""
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text="the request took too long") from error
    except ConnectionError as error:
        raise web.HTTPBadRequest(text="the request broke off") from error


def _caller(request: web.Request) -> Caller:
    peer = peer_of(_transport(request).get_extra_info("ssl_object"))
    return Caller.of(peer, request.remote or "")


def _who(caller: Caller) -> dict[str, str]:
    """For the log."""
    return {"peer": str(caller.peer), "address": caller.address}


def _transport(request: web.Request) -> asyncio.Transport:
    if request.transport is None:
        raise web.HTTPBadRequest(text="the request broke off")
    return request.transport


def _headers(caller: Caller) -> dict[str, str]:
    return {PEER_HEADER: caller.header()}


def _refused(error: ProtocolError) -> web.Response:
    said = messages.Refusal("protocol", error.message[: messages.MAX_TEXT], error.remedy)
    refused = messages.Refused((said,))
    return web.Response(status=409, body=messages.encode(refused), content_type="application/json")


def _number(
    request: web.Request, name: str, pattern: re.Pattern[str], otherwise: str
) -> dict[str, str]:
    """The one parameter that a channel has, if it is given."""
    text = request.query.get(name)
    if text is None:
        return {}
    if not pattern.fullmatch(text):
        raise web.HTTPBadRequest(text=otherwise)
    return {name: text}


def _control_text(text: str) -> str:
    return messages.encode(messages.decode_from_source(text)).decode()


def _rootfs_text(text: str) -> str:
    if text != END:
        raise ProtocolError("a pass is said to end, and nothing else")
    return END
