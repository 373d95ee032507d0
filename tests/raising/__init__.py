"""Which errors functions raise, themselves or by what they call, read from their source; nothing is imported.

A call is followed where its target can be told from names, annotations and assignments. Left out is what an enclosing `except`
takes, a branch that a caller's literal arguments exclude, and a KeyError or ValueError about a value that a caller of ours
chose itself rather than took from its own caller.
"""

from tests.raising.errors import Errors
from tests.raising.names import Class, Function, Program

__all__ = ["Class", "Errors", "Function", "Program"]
