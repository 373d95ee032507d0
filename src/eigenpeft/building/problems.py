"""What went wrong in the modules of a build, in one message."""

from collections.abc import Sequence

from eigenpeft.errors import CollectionError, SubspaceError

_SHOWN = 5
_TOO_FEW = "exceeds the numerical rank"  # of a module's TooFewDirectionsError; lines of other processes come as text


def cannot_be_fitted(lines: Sequence[str], *, n_modules: int) -> SubspaceError:
    """The error that names the first of many modules, and the way out where they have too few directions.

    Args:
        lines: One per module that failed.
        n_modules: Modules of the build.
    """
    shown = "\n".join(f"- {line}" for line in lines[:_SHOWN])
    rest = f"\n- ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    way = "\nWithout n_components each module gets 32, or all that it has; a share such as 0.999 fits too."
    out = way if any(_TOO_FEW in line for line in lines) else ""
    return SubspaceError(f"{len(lines)} of {n_modules} modules cannot be fitted as asked:\n{shown}{rest}{out}")


def first_of(
    problems: Sequence[tuple[str, str | CollectionError]], *, modules: Sequence[str]
) -> CollectionError | SubspaceError:
    """The error of a build: adapters that cannot be read come before modules that cannot be fitted.

    Args:
        problems: Module and what was wrong, from all processes.
        modules: All modules, in their order.
    """
    unreadable = [error for _, error in problems if isinstance(error, CollectionError)]
    if unreadable:
        return CollectionError([line for error in unreadable for line in error.problems])
    order = {module: i for i, module in enumerate(modules)}
    lines = [str(line) for _, line in sorted(problems, key=lambda problem: order[problem[0]])]
    return cannot_be_fitted(lines, n_modules=len(modules))


def memory_does_not_suffice(module: str, *, n_adapters: int) -> SubspaceError:
    """The error of a module whose adapters do not fit into memory together.

    Args:
        module: Its name.
        n_adapters: Adapters that have it.
    """
    return SubspaceError(
        f"Memory does not suffice to fit the module {module!r}, with the factors of {n_adapters} adapters. Pass memory_limit "
        "(--memory-limit on the command line), such as 500MB, so that they are merged one after another. What was finished is kept "
        "in the work folder."
    )
