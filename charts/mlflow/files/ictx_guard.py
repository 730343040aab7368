"""What MLflow's basic auth cannot express, as its `authorization_function`: who promotes, who only reads.

MLflow lets everyone who may register versions of a model move its aliases too. Here only members of the role `promoter`
(and administrators) change what is promoted: aliases other than the free ones, models and versions that carry one of
them, tags under `ictx.promoted`. Experiments and versions keep their files where the server keeps them. Members of the
role `reader` change nothing. Everything else is MLflow's own decision, which comes after this one.

Environment: FREE_ALIASES, separated by commas; OIDC_ISSUER where people sign in (ictx_oidc.py).
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
# Written by `ictx promote`: the checksums that `ictx pull` compares with.
PROMOTED_TAG = "ictx.promoted"
# Tags of a promoted version that the platform reads.
PLATFORM_TAG = "ictx."
# Where a version's files may be: what the server itself keeps, and gives out to those who may read it.
SOURCES = ("mlflow-artifacts:", "runs:/", "models:/")
# The account <user>~previous holds the password that <user> had before it was rotated, and stands for <user>.
PREVIOUS = "~previous"


def authorize():
    """Returns the request's credentials, or the answer that refuses it."""
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
        # No such model or version, or a request that cannot be parsed: MLflow's own answer to it.
        return handlers.catch_mlflow_exception(_raise)(error)
    return credentials


class RefusalError(Exception):
    """Why a request is refused."""


def _raise(error):
    raise error


def _authenticate():
    """Accepts a user's password, and until the end of a rotation the one before; without one, who has signed in."""
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
    """Returns whether the request changes nothing: searches are POST requests."""
    return request.method in ("GET", "HEAD") or (request.endpoint or "").startswith("_search_")


def _check_form():
    """Refuses a request that names a thing twice.

    MLflow checks the names in the query, or `run_uuid`, and its handlers use those in the body, in either of protobuf's
    spellings (`runId`).
    """
    if request.method in ("GET", "HEAD") or request.endpoint in ANY_BODY or not request.get_data():
        return
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise RefusalError(f"the body of a {request.method} request must be an object of JSON (application/json)")
    if odd := sorted(key for key in body if key != key.lower()):
        raise RefusalError(f"names of fields are written like run_id, not like {odd[0][:80]!r}")


def _check_rules():
    if request.method in ("GET", "HEAD"):
        return
    if request.endpoint in UNKNOWN:
        raise RefusalError(f"ictx_guard has no rule for {request.endpoint}: only promoters use it")
    if rule := RULES.get(request.endpoint):
        message_type, check = rule
        # Parsed as the handler parses it: a name in another place of the request changes nothing.
        check(handlers._get_request_message(message_type()))


def _promoted(aliases):
    return sorted(set(aliases) - FREE_ALIASES)


def _alias(message):
    if message.alias not in FREE_ALIASES:
        raise RefusalError(f"only promoters (ictx_promoters) set or delete the alias {message.alias!r}")


def _model(message):
    aliases = handlers._get_model_registry_store().get_registered_model(message.name).aliases
    if found := _promoted(aliases):
        raise RefusalError(
            f"only promoters change the model {message.name!r}: it has a promoted version ({', '.join(found)})"
        )


def _version(message):
    if found := _promoted(_get_version(message).aliases):
        raise RefusalError(
            f"only promoters change version {message.version} of {message.name!r}: it is {', '.join(found)}"
        )


def _version_tag(message):
    _tag(message)
    version = _get_version(message)
    promoted = _promoted(version.aliases) or any(key.startswith(PROMOTED_TAG) for key in version.tags)
    if promoted and message.key.startswith(PLATFORM_TAG):
        raise RefusalError(f"only promoters change {message.key!r} of a version that was promoted")


def _model_tag(message):
    _tag(message)
    _model(message)


def _tag(message):
    if message.key.startswith(PROMOTED_TAG):
        raise RefusalError(f"only promoters change tags under {PROMOTED_TAG!r}")


def _tags(message):
    for tag in message.tags:
        _tag(tag)


def _new_version(message):
    _tags(message)
    if not message.source.startswith(SOURCES):
        raise RefusalError(f"the source of a version starts with {' or '.join(SOURCES)}, not {message.source[:80]!r}")


def _new_experiment(message):
    if message.artifact_location:
        raise RefusalError(
            "the server decides where an experiment's artifacts are: create it without an artifact location"
        )


def _never(_):
    raise RefusalError("only promoters change a version's stage")


def _get_version(message):
    return handlers._get_model_registry_store().get_model_version(message.name, message.version)


def _free(_):
    """Nothing of what is promoted changes."""


# An artifact's content, whose run is named in the query only, and a language that changes nothing.
ANY_BODY = ("serve_upload_artifact", "_upload_artifact", "_graphql")

# By the name of MLflow's handler: its route may be reached by several paths.
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

# A later MLflow has routes of the registry that nobody has thought about: they are refused.
UNKNOWN = {
    handler.__name__
    for _, handler, methods in handlers.get_service_endpoints(messages.ModelRegistryService, handlers.get_handler)
    if set(methods) - {"GET"}
} - set(RULES)
