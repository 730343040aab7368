"""What other libraries raise in a run, as errors that name the remedy."""

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
    """Turns what other libraries raise about storage and the tracking server into a UserError that names it."""
    try:
        yield
    except MlflowException as error:
        raise as_user_error(error) from error
    except SafetensorError as error:
        raise UserError(f"cannot write the exported model below {directory}: {error}") from error
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(f"a rank has ended or does not answer: {str(error).splitlines()[0]}") from error
        raise
    except OSError as error:
        # A write to an open file that fails (full disk) does not name it.
        if error.filename:
            raise
        raise UserError(f"cannot write below {directory}: {error.strerror}") from error
