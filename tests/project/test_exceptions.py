"""The exceptions of the package: one module, one base, and the built-in bases that they had."""

import ast
import inspect
from pathlib import Path

import pytest

from captum_generic_attn import errors

PACKAGE = Path(errors.__file__).parent
PUBLIC = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if error is not errors.CaptumGenericAttnError
]
# They tell other parts of the package what to do next, and never reach the user.
INTERNAL = {"Again", "OverwrittenError", "UnsupportedCallError"}


@pytest.mark.parametrize("error", PUBLIC)
def test_each_has_the_base_and_is_a_value_error(error):
    assert error.__mro__[1:3] == (errors.CaptumGenericAttnError, ValueError)
    with pytest.raises(ValueError, match="why"):
        raise error("why")


def test_no_other_module_defines_an_exception_for_users():
    bases = {"Exception", "RuntimeError", "ValueError", "TypeError", "KeyError", "ImportError"}
    found = {
        node.name
        for path in PACKAGE.rglob("*.py")
        if path != Path(errors.__file__)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
        and {base.id for base in node.bases if isinstance(base, ast.Name)} & bases
    }
    assert found <= INTERNAL
