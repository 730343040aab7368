"""MLflow's app with basic auth, behind a limit of what a request may send.

MLflow hands most requests to Flask by a bridge that holds a body in memory before anybody looks who sends it: without a
password one request could take all of the server's memory. Artifacts are streamed, once their sender is known.

Environment: MOST_BODY_BYTES.
"""

import os
import re

STREAMED = re.compile(r"/(ajax-)?api/2\.0/mlflow-artifacts/artifacts/.")


class Bounded:
    """ASGI middleware that answers 413 to a body of more than `most` bytes, and drops what the app makes of it."""

    def __init__(self, app, most):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send):
        """Hands a request on, and counts what comes of its body."""
        if scope["type"] != "http" or (scope["method"] == "PUT" and STREAMED.match(scope["path"])):
            await self.app(scope, receive, send)
            return
        size, refused, started = 0, False, False

        async def counted():
            nonlocal size, refused
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                refused = True
                raise TooLargeError
            return message

        async def unless_refused(message):
            nonlocal started
            if not refused:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, unless_refused)
        except Exception:
            if not refused:
                raise
        if refused and not started:
            text = f"the body of a request has {self.most} bytes at most".encode()
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": text})


class TooLargeError(Exception):
    """A body is larger than it may be."""


def create_app():
    """Returns the app that `mlflow server --app-name basic-auth` runs: the entry point here comes before MLflow's."""
    from mlflow.server import app, auth

    if "OIDC_ISSUER" in os.environ:
        import ictx_oidc

        # Before MLflow's own: it refuses who is about to sign in.
        ictx_oidc.install(app)
    return Bounded(auth.create_app(), int(os.environ["MOST_BODY_BYTES"]))
