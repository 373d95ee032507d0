"""The errors eigenpeft raises: what was passed, what is allowed, what to do, in one message."""

from collections.abc import Sequence
from pathlib import Path


class EigenPeftError(Exception):
    """Base class of every error that eigenpeft raises about its input; the message is complete by itself.

    Examples:
        >>> from eigenpeft import EigenLoraConfig
        >>> try:
        ...     EigenLoraConfig(subspace="mine", core="none")
        ... except EigenPeftError as error:
        ...     print(error)
        core='none' must be one of 'low_rank', 'full', 'diagonal', 'mixture'.
    """


class CollectionError(EigenPeftError, ValueError):
    """Adapters that cannot be read together; one message names every problem of the collection.

    Args:
        problems: One sentence a problem, each naming the adapter and the values.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        """Rebuild from the problems, so that the error crosses process boundaries."""
        return type(self), (self.problems,)


class SubspaceError(EigenPeftError, ValueError):
    """A subspace, store or request on one that cannot be served as asked."""


class SubspaceNotFoundError(SubspaceError, FileNotFoundError):
    """No subspace at the place asked for; the message lists the places that were searched."""


class ArtifactError(EigenPeftError, OSError):
    """A file that is truncated, altered, of another format version, or that could not be written."""


class DamagedFileError(ArtifactError):
    """A file that is truncated, altered, or not of its kind; names the file and what is wrong with it.

    Args:
        path: The file.
        reason: What is wrong, to put into brackets.
    """

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{str(path)!r} is not a whole safetensors file ({reason}); get a fresh copy.")

    def __reduce__(self):
        """Rebuild from both, so that the error crosses process boundaries."""
        return type(self), (self.path, self.reason)


class AdapterConfigError(EigenPeftError, ValueError):
    """An adapter configuration that asks for something the method cannot do."""


class RewardModelError(EigenPeftError, ValueError):
    """Preferences, features or a request on a low-rank reward model that cannot be served as asked."""


class UnknownUserError(RewardModelError, KeyError):
    """A user without weights in the table; the message says how to get the population's reward instead."""

    def __str__(self) -> str:
        """The message itself; KeyError would quote it."""
        return str(self.args[0]) if self.args else ""


class UnknownAdapterError(EigenPeftError, KeyError):
    """A request for an adapter that no store has; the message lists names near it."""

    def __str__(self) -> str:
        """The message itself; KeyError would quote it."""
        return str(self.args[0]) if self.args else ""


class LostProcessError(EigenPeftError, RuntimeError):
    """Another process of a launch ended before its work was done."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on the CPU or an accelerator, in Python or in torch.

    Args:
        error: Any.

    Examples:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("[enforce fail] can't allocate memory: 8 bytes"))
        (True, True)
    """
    texts = ("can't allocate memory", "out of memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
