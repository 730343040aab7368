"""Converts other libraries' errors in a run to UserErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError

from ictx.errors import UserError
from ictx.registry import as_user_error


@contextmanager
def explained(directory: Path | None) -> Iterator[None]:
    """Converts other libraries' errors about storage, ranks and the tracking server to a UserError with the cause."""
    try:
        yield
    except MlflowException as error:
        raise as_user_error(error) from error
    except SafetensorError as error:
        raise UserError(f"cannot write the exported model below {directory}: {error}") from error
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(f"a rank has exited or does not respond: {str(error).splitlines()[0]}") from error
        raise
    except OSError as error:
        # A failed write to an open file (full disk) has no file name.
        if error.filename:
            raise
        raise UserError(f"cannot write below {directory}: {error.strerror}") from error
