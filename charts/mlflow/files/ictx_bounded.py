"""MLflow's app with basic auth, behind a size limit for request bodies.

MLflow passes most requests to Flask through a bridge that buffers the body before the client is authenticated: one
request without a password could use all of the server's memory. Artifacts are exempt: MLflow authenticates the client,
then streams them.

Environment: MOST_BODY_BYTES.
"""

import os
import re

STREAMED = re.compile(r"/(ajax-)?api/2\.0/mlflow-artifacts/artifacts/.")


class Bounded:
    """ASGI middleware that responds 413 to a body of more than `most` bytes, and discards the app's response to it."""

    def __init__(self, app, most):
        self.app, self.most = app, most

    async def __call__(self, scope, receive, send):
        """Passes a request to the app, and counts the bytes of its body."""
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
            text = f"the request body exceeds the limit of {self.most} bytes (server.maxBodyMiB)".encode()
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": text})


class TooLargeError(Exception):
    """The request body exceeds the limit."""


def create_app():
    """Returns the app that `mlflow server --app-name basic-auth` runs: this entry point replaces MLflow's."""
    from mlflow.server import app, auth

    if "OIDC_ISSUER" in os.environ:
        import ictx_oidc

        # Before MLflow's own handler, which rejects requests without credentials, including those that sign in.
        ictx_oidc.install(app)
    return Bounded(auth.create_app(), int(os.environ["MOST_BODY_BYTES"]))
