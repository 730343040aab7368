"""`authorization_function` of MLflow's basic auth that adds the roles `promoter` and `reader`.

In MLflow, every user who may register versions of a model may also move its aliases. This function allows only members
of the role `promoter` (and administrators) to change what is promoted: aliases other than the free ones, models and
versions that have such an alias, and tags under `ictx.promoted`. Experiments and versions cannot use storage other than
the server's. Members of the role `reader` can change nothing. MLflow's own permissions are checked afterwards.

Environment: FREE_ALIASES, separated by commas; OIDC_ISSUER if users sign in with an OpenID provider (ictx_oidc.py).
"""

import os

from flask import Response, g, jsonify, request
from mlflow.exceptions import MlflowException
from mlflow.protos import model_registry_pb2 as messages
from mlflow.protos.service_pb2 import CreateExperiment
from mlflow.server import auth, handlers

if "OIDC_ISSUER" in os.environ:
    import ictx_oidc
else:
    ictx_oidc = None

FREE_ALIASES = frozenset(os.environ["FREE_ALIASES"].split(","))
PROMOTER, READER = "promoter", "reader"
# Checksums that `ictx promote` writes and `ictx pull` verifies.
PROMOTED_TAG = "ictx.promoted"
# Tags of a promoted version that the platform reads.
PLATFORM_TAG = "ictx."
# Allowed sources of a version: storage of the server, which checks read permissions.
SOURCES = ("mlflow-artifacts:", "runs:/", "models:/")
# The account <user>~previous has the password of <user> before its rotation, and authenticates as <user>.
PREVIOUS = "~previous"


def authorize():
    """Returns the request's credentials, or the response that rejects it."""
    if "ictx_answer" not in g:
        g.ictx_answer = _decide()
    return g.ictx_answer


def _decide():
    credentials = _authenticate()
    if isinstance(credentials, Response):
        return credentials
    try:
        user = auth.store.get_user(credentials.username)
        roles = {role.name for role in auth.store.list_user_roles(user.id)}
        if (READER in roles or user.username.endswith(PREVIOUS)) and not _reads():
            raise RefusalError(f"{user.username} has a read-only account")
        if not user.is_admin:
            _check_form()
        if not user.is_admin and PROMOTER not in roles:
            _check_rules()
    except RefusalError as refusal:
        answer = jsonify(error_code="PERMISSION_DENIED", message=str(refusal))
        answer.status_code = 403
        return answer
    except MlflowException as error:
        # No such model or version, or a request that cannot be parsed: respond as MLflow does.
        return handlers.catch_mlflow_exception(_raise)(error)
    return credentials


class RefusalError(Exception):
    """A request is rejected; the message is the reason."""


def _raise(error):
    raise error


def _authenticate():
    """Returns the credentials of a valid password (in a rotation also the previous one) or session, else a response."""
    credentials = request.authorization
    if credentials is None and ictx_oidc:
        if person := ictx_oidc.signed_in():
            return person
        if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
            return ictx_oidc.to_login()
    if credentials is None or credentials.type != "basic":
        return auth.make_basic_auth_response()
    answer = auth.authenticate_request_basic_auth()
    if isinstance(answer, Response) and auth._authenticate_cached(
        credentials.username + PREVIOUS, credentials.password
    ):
        return credentials
    return answer


def _reads():
    """Returns whether the request is read-only; searches are, although they are POST requests."""
    return request.method in ("GET", "HEAD") or (request.endpoint or "").startswith("_search_")


def _check_form():
    """Rejects a request that could name two objects.

    MLflow checks permissions for the names in the query, or `run_uuid`, but its handlers use those in the body, in
    either of protobuf's spellings (`run_id`, `runId`).
    """
    if request.method in ("GET", "HEAD") or request.endpoint in ANY_BODY or not request.get_data():
        return
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise RefusalError(f"the body of a {request.method} request must be a JSON object (application/json)")
    if odd := sorted(key for key in body if key != key.lower()):
        raise RefusalError(f"field names must be in snake case (run_id), not {odd[0][:80]!r}")


def _check_rules():
    if request.method in ("GET", "HEAD"):
        return
    if request.endpoint in UNKNOWN:
        raise RefusalError(f"ictx_guard has no rule for {request.endpoint}: only promoters may use it")
    if rule := RULES.get(request.endpoint):
        message_type, check = rule
        # Parsed as the handler does, so that both use the same names.
        check(handlers._get_request_message(message_type()))


def _promoted(aliases):
    return sorted(set(aliases) - FREE_ALIASES)


def _alias(message):
    if message.alias not in FREE_ALIASES:
        raise RefusalError(f"only promoters (ictx_promoters) may set or delete the alias {message.alias!r}")


def _model(message):
    aliases = handlers._get_model_registry_store().get_registered_model(message.name).aliases
    if found := _promoted(aliases):
        raise RefusalError(
            f"only promoters may change the model {message.name!r}: it has a promoted version ({', '.join(found)})"
        )


def _version(message):
    if found := _promoted(_get_version(message).aliases):
        raise RefusalError(
            f"only promoters may change version {message.version} of {message.name!r}: its alias is {', '.join(found)}"
        )


def _version_tag(message):
    _tag(message)
    version = _get_version(message)
    promoted = _promoted(version.aliases) or any(key.startswith(PROMOTED_TAG) for key in version.tags)
    if promoted and message.key.startswith(PLATFORM_TAG):
        raise RefusalError(f"only promoters may change {message.key!r} of a promoted version")


def _model_tag(message):
    _tag(message)
    _model(message)


def _tag(message):
    if message.key.startswith(PROMOTED_TAG):
        raise RefusalError(f"only promoters may change tags under {PROMOTED_TAG!r}")


def _tags(message):
    for tag in message.tags:
        _tag(tag)


def _new_version(message):
    _tags(message)
    if not message.source.startswith(SOURCES):
        raise RefusalError(f"a version's source must start with {' or '.join(SOURCES)}, not {message.source[:80]!r}")


def _new_experiment(message):
    if message.artifact_location:
        raise RefusalError("experiments cannot have their own artifact location: create the experiment without one")


def _never(_):
    raise RefusalError("only promoters may change a version's stage")


def _get_version(message):
    return handlers._get_model_registry_store().get_model_version(message.name, message.version)


def _free(_):
    """Allows the request: it does not change what is promoted."""


# Uploads, which name the run in the query only, and GraphQL, which is read-only: their bodies are not checked.
ANY_BODY = ("serve_upload_artifact", "_upload_artifact", "_graphql")

# By the name of MLflow's handler, since several paths may lead to one.
RULES = {
    "_create_experiment": (CreateExperiment, _new_experiment),
    "_create_registered_model": (messages.CreateRegisteredModel, _tags),
    "_rename_registered_model": (messages.RenameRegisteredModel, _model),
    "_update_registered_model": (messages.UpdateRegisteredModel, _model),
    "_delete_registered_model": (messages.DeleteRegisteredModel, _model),
    "_set_registered_model_tag": (messages.SetRegisteredModelTag, _model_tag),
    "_delete_registered_model_tag": (messages.DeleteRegisteredModelTag, _model_tag),
    "_set_registered_model_alias": (messages.SetRegisteredModelAlias, _alias),
    "_delete_registered_model_alias": (messages.DeleteRegisteredModelAlias, _alias),
    "_get_latest_versions": (messages.GetLatestVersions, _free),
    "_create_model_version": (messages.CreateModelVersion, _new_version),
    "_update_model_version": (messages.UpdateModelVersion, _version),
    "_delete_model_version": (messages.DeleteModelVersion, _version),
    "_transition_stage": (messages.TransitionModelVersionStage, _never),
    "_set_model_version_tag": (messages.SetModelVersionTag, _version_tag),
    "_delete_model_version_tag": (messages.DeleteModelVersionTag, _version_tag),
}

# A later MLflow may add routes to the registry: without a rule they are rejected.
UNKNOWN = {
    handler.__name__
    for _, handler, methods in handlers.get_service_endpoints(messages.ModelRegistryService, handlers.get_handler)
    if set(methods) - {"GET"}
} - set(RULES)
