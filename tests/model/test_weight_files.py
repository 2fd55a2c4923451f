"""Weight files: what is refused, how it is said, and that it changes nothing."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ffvt
from ffvt.model.weight_files import existing_file, read_header
from tests.helpers import golden, tiny_model


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def hostile_sources(folder):
    """Name -> path of a file that must be refused."""
    state = golden("tiny_fusion", "w/")
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    for name in ("npz", "safetensors", "bin"):
        whole = folder / f"whole.{name}"
        {"npz": lambda p: np.savez(p, **state), "bin": lambda p: torch.save(tensors, p)}.get(
            name, lambda p: save_file(tensors, p)
        )(whole)
        (folder / f"truncated.{name}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        whole.unlink()
    (folder / "pickle.bin").write_bytes(pickle.dumps({"head.weight": Bomb()}))
    torch.save({"head.weight": Bomb()}, folder / "torch_pickle.pt")
    np.savez(folder / "objects.npz", **{**state, "head.weight": np.array([Bomb()], dtype=object)})
    (folder / "empty.bin").write_bytes(b"")
    (folder / "text.npz").write_text("not an archive")
    torch.save([1, 2, 3], folder / "list.pt")
    np.savez(folder / "integers.npz", **{**state, "head.bias": np.zeros(5, np.int64)})
    np.savez(
        folder / "wrong_shape.npz", **{**state, "transformer.embeddings.cls_token": np.zeros((1, 1, 65), np.float32)}
    )
    np.savez(folder / "unknown.npz", weights=np.zeros(3, np.float32))
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return hostile_sources(tmp_path_factory.mktemp("hostile"))


HOSTILE = [
    "truncated.npz",
    "truncated.safetensors",
    "truncated.bin",
    "pickle.bin",
    "torch_pickle.pt",
    "objects.npz",
    "empty.bin",
    "text.npz",
    "list.pt",
    "integers.npz",
    "wrong_shape.npz",
    "unknown.npz",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_gives_one_error_that_names_it_and_changes_nothing(hostile, name):
    assert sorted(hostile) == sorted(HOSTILE)
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="load_weights: .*got"):
        ffvt.load_weights(model, hostile[name])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def message(path):
    with pytest.raises((ValueError, OSError)) as raised:
        ffvt.load_weights(tiny_model(), path)
    text = str(raised.value)
    assert len(text) < 500
    assert text.isprintable()
    assert path.name in text
    return text


@pytest.mark.parametrize("name", ["text.npz", "pickle.bin", "torch_pickle.pt"])
def test_nobody_is_advised_to_run_a_pickle(hostile, name):
    text = message(hostile[name])
    assert "weights_only" not in text
    assert "no weight file" in text or "which is not run" in text


def test_a_pickle_of_more_than_tensors_names_what_it_asks_for(tmp_path):
    torch.save({"head.bias": torch.zeros(5), "args": argparse.Namespace(lr=1)}, tmp_path / "weights.pth")
    told = message(tmp_path / "weights.pth")
    assert "its pickle asks for argparse.Namespace, which is not run; save the state dict alone" in told


def test_pipes_and_devices_are_refused_without_opening(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    assert "a pipe, device or socket" in message(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="'/dev/null', a pipe, device or socket"):
        ffvt.load_weights(tiny_model(), "/dev/null")


def test_a_folder_without_weights_names_those_in_it(tmp_path):
    for name in ("best", "last"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"a folder with model.safetensors.*best, last in it have"):
        existing_file("load_weights", tmp_path / "run")


def test_a_header_is_read_without_the_tensors(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    assert read_header("here", tmp_path / "x.safetensors") == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    (tmp_path / "y.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"here: weights must be a safetensors file; got .*y.safetensors"):
        read_header("here", tmp_path / "y.safetensors")
