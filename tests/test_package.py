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


@pytest.mark.parametrize("order", ["torch, ffvt", "ffvt, torch"])
def test_the_operators_are_registered_whichever_is_imported_first(order):
    subprocess.run([sys.executable, "-c", f"import {order}; torch.ops.ffvt.maws_attention"], check=True)


@pytest.mark.slow
def test_a_saved_program_loads_where_the_package_was_imported_first(tmp_path):
    save = (
        "import torch, ffvt\n"
        "class Pick(torch.nn.Module):\n"
        "    def forward(self, q): return ffvt.maws_select(q, q, 2)[0]\n"
        "torch.export.save(torch.export.export(Pick(), (torch.randn(1, 5, 1, 4),)), 'p.pt2')"
    )
    load = "import ffvt, torch; torch.export.load('p.pt2').module()(torch.randn(1, 5, 1, 4))"
    for code in (save, load):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_subpackages_are_attributes():
    code = "import ffvt; ffvt.kernels; ffvt.model"
    subprocess.run([sys.executable, "-c", code], check=True)


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
