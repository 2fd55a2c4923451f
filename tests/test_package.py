"""What `import ffvt` gives: every public name, on first use, and no torch before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ffvt

SOURCE = Path(ffvt.__file__).read_text()


def test_importing_the_package_imports_no_torch_until_a_name_is_used():
    code = "import sys, ffvt; assert 'torch' not in sys.modules; ffvt.create_model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_operators_are_registered_at_once_where_torch_is_there():
    subprocess.run([sys.executable, "-c", "import torch, ffvt; torch.ops.ffvt.maws_attention"], check=True)


@pytest.mark.parametrize("name", ffvt.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ffvt, name) is getattr(ffvt, name)
    assert name in dir(ffvt)


def test_a_type_checker_sees_the_names_that_users_see():
    blocks = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    block = next(node for node in blocks if getattr(node.test, "id", "") == "TYPE_CHECKING")
    seen = {alias.name for statement in block.body for alias in statement.names}
    assert seen == set(ffvt.__all__)


def test_an_unknown_name_is_an_error_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'ffvt' has no attribute 'create_modell'"):
        ffvt.create_modell  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'create_modell'"):
        from ffvt import create_modell  # noqa: F401
