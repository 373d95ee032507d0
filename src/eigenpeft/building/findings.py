"""What is noticed about adapters while their subspace is built."""

from collections.abc import Mapping

from eigenpeft.building.module_fitter import DEFAULT_COMPONENTS
from eigenpeft.building.work_folder import FittedModule
from eigenpeft.collection.diagnosis import Diagnosis, Finding
from eigenpeft.collection.opening import some
from eigenpeft.collection.reader import AdapterCollection


def diagnose(collection: AdapterCollection, fitted: Mapping[str, FittedModule]) -> tuple[Finding, ...]:
    """`AdapterCollection.diagnose` with the norms that fitting found: only a few modules are read again, to be compared.

    Args:
        collection: The adapters.
        fitted: Every module.

    Raises:
        KeyError: If no adapter adapts a module.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    diagnosis = Diagnosis()
    for module, result in fitted.items():
        names = collection.names_with(module)
        diagnosis.observe_norms(names, norms=result.norms)
        if diagnosis.compares(names):
            # One adapter at a time: this must not take more memory than the fit.
            diagnosis.compare(collection.each_factors(module))
    return diagnosis.findings()


def fewer_components(collection: AdapterCollection, fitted: Mapping[str, FittedModule]) -> tuple[Finding, ...]:
    """Modules whose adapters span fewer directions than the default number, and those adapters.

    Args:
        collection: The adapters.
        fitted: Every module.

    Raises:
        KeyError: If no adapter adapts a module.
    """
    fewer = {
        module: result.bank.n_components - result.bank.n_pseudo_components
        for module, result in fitted.items()
        if result.bank.n_components - result.bank.n_pseudo_components < DEFAULT_COMPONENTS
    }
    if not fewer:
        return ()
    names = tuple(name for name in collection.names if any(name in collection.names_with(module) for module in fewer))
    shown = ", ".join(f"{count} in {module!r}" for module, count in list(fewer.items())[:3])
    more = f" and {len(fewer) - 3} more modules" if len(fewer) > 3 else ""
    message = (
        f"{len(fewer)} of the {len(fitted)} modules have fewer than {DEFAULT_COMPONENTS} components, all that their adapters "
        f"span: {shown}{more}. With rank r each adapter of a module adds at most r; those of {some(names)} adapt them."
    )
    return (Finding(kind="fewer_components", adapters=names, message=message, value=float(len(fewer))),)
