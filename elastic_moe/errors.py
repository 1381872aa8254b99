"""Every exception that elastic-moe raises on purpose, in one place.

    ElasticMoEError
    ├── RoutingError        a sub-network that the model cannot run       (also ValueError)
    ├── CheckpointError     a checkpoint that is missing, broken or unsupported
    ├── ExtractError        a sub-network that no standard checkpoint can say (also ValueError)
    ├── RequestError        a prompt or sampling setting that cannot be served (also ValueError)
    │   └── ContextLengthError  prompt and new tokens exceed the model's positions
    ├── EngineError         the engine is closed, or lacks the backend that was named
    │   ├── QueueFullError      too many requests are unfinished; try again later
    │   └── MissingTorchError   something needs torch, which is an extra and not installed
    ├── BenchmarkError      what was to be timed computes something else, or cannot run
    ├── ResultExistsError   a measurement would replace the result of another
    ├── ServerError         a server cannot be set up as was asked
    ├── ProfileError        a profile cannot have this name               (also ValueError)
    │   ├── ProfileNotFoundError    there is no profile of this name
    │   └── ProfilesFileError       profiles cannot change: they are kept in no file
    ├── PreconditionError   a change was meant for another state of what it changes
    ├── CorpusError         text for training or evaluation is missing or unusable
    └── TrainingError       a run cannot start, resume or go on
        ├── NotGrownError       its network has not run with all layers yet
        └── OptionError         options that do not go together, or not with the run that is there

    CheckpointWarning       a checkpoint has something that is left aside

The kernels, which stand alone, raise `elastic_moe_kernels.errors.KernelError`.
A message says what was wrong, where, what was got, what is allowed, and what to do.
"""

from __future__ import annotations

import importlib.util


class ElasticMoEError(Exception):
    """Base class: `except ElasticMoEError` catches what this package raises on purpose."""


class RoutingError(ElasticMoEError, ValueError):
    """A routing configuration names a sub-network that the model does not have."""


class CheckpointError(ElasticMoEError):
    """A checkpoint folder is missing, damaged, or of a kind that is not supported."""


class ExtractError(ElasticMoEError, ValueError):
    """A sub-network cannot leave as a standard checkpoint, or not to the place that was named."""


class RequestError(ElasticMoEError, ValueError):
    """A request cannot be served as written: empty prompt, bad sampling value, ..."""


class ContextLengthError(RequestError):
    """The prompt plus the tokens to generate exceed the model's positions."""

    def __init__(self, prompt_tokens: int, max_tokens: int, limit_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.limit_tokens = limit_tokens
        super().__init__(
            f"prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_tokens + max_tokens}, but the model has {limit_tokens} positions. "
            f"Shorten the prompt or lower max_tokens."
        )


class CheckpointWarning(UserWarning):
    """A checkpoint has something that is left aside, such as code or keys that nobody knows."""


class EngineError(ElasticMoEError):
    """The engine is closed, or was asked for something that it cannot do."""


class QueueFullError(EngineError):
    """Too many requests are unfinished. Nothing is wrong with this one: try again later."""

    def __init__(self, unfinished: int, limit: int) -> None:
        self.unfinished, self.limit = unfinished, limit
        super().__init__(
            f"{unfinished} requests are unfinished, and max_queue is {limit}. Try again later, or "
            f"make the engine with a larger max_queue."
        )


class BenchmarkError(ElasticMoEError):
    """What was to be timed computes something else than it should, or cannot run."""


class ResultExistsError(ElasticMoEError):
    """The folder for a measurement's results holds those of another one."""


class ServerError(ElasticMoEError):
    """A server cannot be set up as was asked: a taken port, a key that no header can hold."""


class ProfileError(ElasticMoEError, ValueError):
    """A profile cannot have this name."""


class ProfileNotFoundError(ProfileError):
    """There is no profile of this name."""


class ProfilesFileError(ProfileError):
    """Profiles cannot be changed, as they are kept in no file."""


class PreconditionError(ElasticMoEError):
    """Somebody else changed it meanwhile (HTTP's If-Match and If-None-Match)."""


class CorpusError(ElasticMoEError):
    """Text to train or evaluate on is missing, empty or not allowed."""


class TrainingError(ElasticMoEError):
    """A training run cannot start, resume or continue."""


class NotGrownError(TrainingError):
    """A run's network has not grown to all layers yet, so there is no checkpoint of it."""


class OptionError(TrainingError):
    """Options of a run do not go together, or are not those of its start."""


class MissingTorchError(EngineError):
    """Torch, an extra of this package, is not installed."""


def require_torch(what: str) -> None:
    """Raise `MissingTorchError` unless torch is installed; `what` needs it. Does not load it."""
    try:
        found = importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # something keeps it from being loaded
        found = False
    if not found:
        raise MissingTorchError(
            f"{what} needs torch, which is not installed. Install it: "
            f"pip install 'elastic-moe[torch]'."
        )
