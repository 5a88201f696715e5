"""HTTP as the server of this service speaks it."""

from __future__ import annotations

import json
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class JsonProtocol(H11Protocol):
    """Uvicorn's, but for what is no HTTP: that is answered in JSON, as everything else is, not in plain text."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": msg}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        answer = (
            h11.Response(status_code=HTTPStatus.BAD_REQUEST, headers=headers, reason=HTTPStatus.BAD_REQUEST.phrase),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in answer))
        self.transport.close()
