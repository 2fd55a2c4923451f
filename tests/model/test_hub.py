"""Weights by name, without a network: where they are looked for, what is said where they are not, and publishing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ffvt
from ffvt.model.hub import locate
from tests.helpers import tiny_model

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network. Returns a function that puts a saved model into it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, model, revision="main"):
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / revision).write_text(COMMIT)
        model.save_pretrained(place / "snapshots" / COMMIT)

    return put


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("name", ["org/name", "hf:org/name", "hf-hub:org/name", "hf:org/name@main"])
def test_repositories_are_taken_from_the_cache(cache, name):
    model = tiny_model()
    cache("org/name", model)
    found = tiny_model()
    ffvt.load_weights(found, name)
    assert equal(found, model)
    assert equal(ffvt.FFVT.from_pretrained(name), model)
    assert equal(ffvt.load_pretrained(name), model)


def test_a_revision_is_asked_for(cache):
    cache("org/name", tiny_model(), revision="v2")
    assert locate("here", "org/name@v2").name == COMMIT
    assert ffvt.FFVT.from_pretrained("org/name", revision="v2").config.depth == 4
    with pytest.raises(ConnectionError, match=r"org/name/resolve/main/model.safetensors"):
        locate("here", "org/name")


def test_timms_names_lead_to_its_repositories(cache):
    pytest.importorskip("timm")
    cache("timm/vit_base_patch16_224.augreg_in21k", tiny_model())
    assert locate("here", "timm:vit_base_patch16_224.augreg_in21k").name == COMMIT
    with pytest.raises(ConnectionError, match="timm/vit_base_patch16_224.augreg2_in21k_ft_in1k/resolve"):
        locate("here", "timm:vit_base_patch16_224")  # the weights that timm takes by default
    with pytest.raises(
        ValueError, match=r"got 'vit_base_patch16_224.augreg_in21' \(near: vit_base_patch16_224.augreg_in21k"
    ):
        locate("here", "timm:vit_base_patch16_224.augreg_in21")


def test_without_a_network_the_message_says_what_to_download(cache):
    with pytest.raises(ConnectionError) as raised:
        ffvt.load_weights(tiny_model(), "hf:google/vit-base-patch16-224-in21k")
    text = str(raised.value)
    assert "download https://huggingface.co/google/vit-base-patch16-224-in21k/resolve/main/model.safetensors" in text
    assert "(--pretrained_dir FILE)" in text
    assert "HF_HUB_OFFLINE is set" in text
    assert len(text) < 500
    with pytest.raises(ConnectionError, match="give the file instead, in a folder with its config.json"):
        ffvt.FFVT.from_pretrained("org/name")


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        ("RepositoryNotFoundError", FileNotFoundError, "is no repository, or a private one"),
        ("GatedRepoError", PermissionError, "asks for a login"),
        ("RevisionNotFoundError", FileNotFoundError, "has no revision 'main'"),
        ("RemoteEntryNotFoundError", FileNotFoundError, "has no model.safetensors; weights in pickles"),
        ("HfHubHTTPError", ConnectionError, "cannot be downloaded; download https://"),
    ],
)
def test_the_hubs_refusals_are_told_in_one_line(monkeypatch, error, kind, told):
    from huggingface_hub import errors

    def refuse(*_, **__):
        problem = getattr(errors, error)
        raise problem.__new__(problem)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(kind, match=f"load_weights: org/name {told}"):
        ffvt.load_weights(tiny_model(), "org/name")


def test_what_looks_like_a_path_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    for name in ("weights/ViT-B_16.npz", "output/mine", "./org/name", "a/b/c", "name"):
        assert locate("here", name) == Path(name)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("here", "org/name") == Path("org/name")
    for name in ("hf:name", "hf:a/b/c", "hf:../x", "hf-hub:"):
        with pytest.raises((ValueError, OSError), match="here: "):
            locate("here", name)


def test_without_huggingface_hub_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install huggingface_hub\); or download https://.*org/name/resolve"):
        ffvt.load_weights(tiny_model(), "org/name")
    with pytest.raises(ImportError, match="push_to_hub: it needs huggingface_hub"):
        tiny_model().push_to_hub("org/name")


class Hub:
    """What `push_to_hub` asks of the Hub, kept in memory."""

    def __init__(self, token=None):
        Hub.token, Hub.files = token, getattr(Hub, "files", {})

    def create_repo(self, name, private, exist_ok):
        assert exist_ok
        return type("Repository", (), {"repo_id": name})

    def file_exists(self, name, file, revision):
        return file in Hub.files

    def upload_folder(self, folder_path, **options):
        Hub.options = options
        Hub.files |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://huggingface.co/{options['repo_id']}/commit/1"


def test_a_pushed_model_has_a_card_and_comes_back(monkeypatch, tmp_path):
    Hub.files = {}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = tiny_model()
    assert model.push_to_hub("org/name", token="secret", branch="dev").endswith("org/name/commit/1")
    assert Hub.token == "secret"
    assert Hub.options["revision"] == "dev"
    assert sorted(Hub.files) == ["README.md", "config.json", "model.safetensors"]
    card = huggingface_hub.ModelCard(Hub.files["README.md"].decode())
    assert card.data.library_name == "ffvt"
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-classification"
    assert "fine-grained" in card.data.tags
    assert 'load_pretrained("org/name")' in card.text
    assert "picks 3 tokens by maws" in card.text
    assert "(B, 3, 64, 64)" in card.text
    assert json.loads(Hub.files["config.json"])["depth"] == 4
    for name, content in Hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert equal(ffvt.FFVT.from_pretrained(tmp_path), model)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    Hub.files["README.md"] = b"mine"
    model.push_to_hub("org/name")
    assert Hub.files["README.md"] == b"mine"


def test_a_download_goes_through_the_hubs_client(monkeypatch, tmp_path):
    model, asked = tiny_model(), []
    model.save_pretrained(tmp_path)

    def download(repository, file, **options):
        asked.append((repository, file, options["revision"], options["token"]))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert equal(ffvt.FFVT.from_pretrained("user/repo", revision="v1", token="t"), model)
    assert asked == [("user/repo", name, "v1", "t") for name in ("model.safetensors", "config.json")]
