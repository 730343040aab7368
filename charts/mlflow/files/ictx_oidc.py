"""Sign-in of users with the site's OpenID provider, using Authlib; programs keep their passwords.

A user who signs in gets the MLflow account of that name, with its permissions and roles. Administrators sign in with
their password only, so that no name at the provider can make a user an administrator.

Environment: OIDC_ISSUER, OIDC_CLIENT_ID, OIDC_CLIENT_SECRET, OIDC_URL (this server's, for browsers), OIDC_SCOPES,
OIDC_USERNAME_CLAIM, OIDC_SESSION_HOURS, OIDC_CA_FILE (the provider's authority, unless public).
"""

import os
import time
from urllib.parse import urlencode

from authlib.integrations.base_client import OAuthError
from authlib.integrations.flask_client import OAuth
from flask import Response, redirect, request, session
from joserfc.errors import JoseError
from requests import RequestException
from werkzeug.datastructures import Authorization

LOGIN, CALLBACK, LOGOUT = "/oidc/login", "/oidc/callback", "/oidc/logout"
USER = "ictx_user"


def install(app):
    """Adds the paths above to the app. Call it before `auth.create_app`, which rejects requests without credentials."""
    app.config.update(
        SESSION_COOKIE_NAME="ictx_mlflow",
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=os.environ["OIDC_URL"].startswith("https:"),
    )
    kwargs = {"scope": os.environ["OIDC_SCOPES"], "code_challenge_method": "S256"}
    if authority := os.environ.get("OIDC_CA_FILE"):
        kwargs["verify"] = authority
    provider = OAuth(app).register(
        "provider",
        client_id=os.environ["OIDC_CLIENT_ID"],
        client_secret=os.environ["OIDC_CLIENT_SECRET"],
        server_metadata_url=os.environ["OIDC_ISSUER"].rstrip("/") + "/.well-known/openid-configuration",
        client_kwargs=kwargs,
    )
    steps = {("GET", LOGIN): _login, ("GET", CALLBACK): _callback, ("GET", LOGOUT): _logout}

    @app.before_request
    def answer():
        step = steps.get((request.method, request.path))
        return step and step(provider)


def signed_in():
    """Returns the credentials of the signed-in user in the type that MLflow requires, or None."""
    user, until = session.get(USER, ("", 0))
    if until < time.time():
        return None
    return Authorization("basic", {"username": user, "password": ""}) if _refusal(user) is None else None


def to_login():
    """Redirects a browser to sign in, then back. Uses OIDC_URL: the session's cookie is valid for one host only."""
    return redirect(f"{_url(LOGIN)}?{urlencode({'next': request.full_path.rstrip('?')})}")


def _login(provider):
    after = request.args.get("next", "/")
    # Paths of this server only: browsers interpret //host and /\\host as another host.
    session["ictx_next"] = after if after[:1] == "/" and after[1:2] not in ("/", "\\") else "/"
    try:
        return provider.authorize_redirect(_url(CALLBACK))
    except RequestException as error:
        return _text(f"the identity provider {os.environ['OIDC_ISSUER']} does not respond: {type(error).__name__}", 502)


def _callback(provider):
    try:
        claims = provider.authorize_access_token().get("userinfo") or {}
    except (OAuthError, JoseError, RequestException) as error:
        return _text(f"sign-in failed: {error}. Try again: {_url(LOGIN)}", 401)
    claim = os.environ["OIDC_USERNAME_CLAIM"]
    user = claims.get(claim)
    if not isinstance(user, str) or not user:
        return _text(f"the identity provider sent no claim {claim}: set auth.oidc.usernameClaim or .scopes", 403)
    if claim == "email" and claims.get("email_verified") is not True:
        return _text(f"the identity provider has not verified the address {user}", 403)
    if refusal := _refusal(user):
        return _text(refusal, 403)
    after = session.get("ictx_next", "/")
    session.clear()
    session[USER] = (user, time.time() + 3600 * float(os.environ["OIDC_SESSION_HOURS"]))
    return redirect(after)


def _logout(_):
    session.clear()
    return _text(f"signed out. Sign in: {_url(LOGIN)}", 200)


def _url(path):
    return os.environ["OIDC_URL"].rstrip("/") + path


def _refusal(user):
    """Returns the reason why the user may not sign in, or None."""
    from mlflow.server import auth

    if "~" in user or not auth.store.has_user(user):
        return f"{user} has no account in MLflow: an administrator must add it (ictx_users)"
    if auth.store.get_user(user).is_admin:
        return f"{user} is an administrator of MLflow: administrators must sign in with their password"
    return None


def _text(text, status):
    return Response(text + "\n", status=status, mimetype="text/plain")
