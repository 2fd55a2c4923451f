"""info(), the extension, and the package's promises about itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ffvt

ROOT = Path(__file__).parents[2]


def test_the_extension_is_built_where_there_is_a_compiler():
    if os.environ.get("FFVT_NO_EXT") == "1":
        pytest.skip("FFVT_NO_EXT=1: the extension is left out on purpose")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler: the extension cannot be built")
    extension = ffvt.info()["extension"]
    assert extension["available"], extension
    assert {"compiler", "torch_built_against", "avx2", "avx512", "amx_bf16", "threads"} <= extension.keys()


def test_info_names_the_reason_for_everything_that_is_missing():
    info = ffvt.info()
    assert set(info["backends"]) == {"triton", "cpp", "torch", "reference"}
    for device in info["devices"].values():
        assert device["why"]
    assert info["forced"] is None
    with ffvt.use_backend("reference"), ffvt.use_backend("torch"):
        assert ffvt.info()["forced"] == "torch"
    again = ffvt.use_backend("reference")
    with again, again:
        pass
    assert ffvt.info()["forced"] is None


def test_the_package_works_without_its_extension():
    code = (
        "import sys; sys.modules['ffvt._C'] = None\n"
        "import torch, ffvt\n"
        "info = ffvt.info()['extension']\n"
        "assert not info['available'] and 'ffvt._C' in info['reason'], info\n"
        "print(ffvt.maws_select(torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4), 2)[0].shape)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "torch.Size([1, 2])"


def test_importing_the_package_needs_neither_timm_nor_triton_nor_torchvision():
    code = (
        "import sys\n"
        "for name in ('timm', 'triton', 'torchvision', 'matplotlib', 'scipy'): sys.modules[name] = None\n"
        "import ffvt; ffvt.create_model('vit_s16', image_size=32, num_select=2, depth=2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kernels_import_nothing_of_the_model():
    for path in (ROOT / "ffvt" / "kernels").glob("*.py"):
        imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert not [
            line for line in imports if "ffvt." in line and "ffvt.kernels" not in line and "ffvt.version" not in line
        ]


def test_readme_names_both_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
