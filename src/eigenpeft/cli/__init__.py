"""The `eigenpeft` command: importing this package gives it all its commands."""

from eigenpeft.cli import artifacts as artifacts
from eigenpeft.cli import audit as audit
from eigenpeft.cli import demo as demo
from eigenpeft.cli import doctor as doctor
from eigenpeft.cli import lore as lore
from eigenpeft.cli import merge as merge
from eigenpeft.cli import merge_base as merge_base
from eigenpeft.cli import publish as publish
from eigenpeft.cli import recycle as recycle
from eigenpeft.cli import store as store
from eigenpeft.cli import sync_adapters as sync_adapters
from eigenpeft.cli import trl as trl
from eigenpeft.cli.app import app, main

__all__ = ["app", "main"]
