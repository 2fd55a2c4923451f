"""export_model: files that give the model's logits and picks on any batch, and what is refused before they appear."""

import copy
import json
import sys

import pytest
import torch

import ffvt
from ffvt import export
from ffvt.export_check import compare, expect
from tests.helpers import tiny_model, write_checkpoint

SMALL = dict(image_size=32, embed_dim=32, depth=3, num_heads=2, mlp_dim=32, num_select=2)


def trained_model(**overrides):
    """A model whose head is not zero."""
    model = tiny_model(**{**SMALL, **overrides})
    torch.nn.init.normal_(model.head.weight)
    return model


def run_onnx(path, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path))
    return session, [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


MODELS = {
    "fused": {},
    "fused, all rows": dict(prune_dead_rows=False),
    "fused, layer scale": dict(layer_scale=0.1, first_candidate=1),
    "recomputed": dict(gradient_checkpointing=True),
    "plain": dict(feature_fusion=False),
    "plain, all rows": dict(feature_fusion=False, prune_dead_rows=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_program_gives_the_models_logits_for_every_batch(name, tmp_path):
    model = trained_model(**MODELS[name])
    report = ffvt.export_model(model, tmp_path / "model.pt2", check=2)
    assert report.compared.images == 6
    assert report.num_bytes == (tmp_path / "model.pt2").stat().st_size
    assert model.training, "the model stays in its mode"
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = program(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """A model, its .onnx file with the selection, and the report."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, path = trained_model().eval(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    facts = {"classes": ["owl", "jay"], "mean": (0.5, 0.4, 0.3)}
    return model, path, ffvt.export_model(model, path, with_selection=True, check=4, facts=facts)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_onnxruntime_gives_the_models_logits_and_picks(onnx_file, batch):
    model, path, report = onnx_file
    images = torch.randn(batch, 3, 32, 32)
    _, (logits, index, score) = run_onnx(path, images)
    expected, selection = model.forward_with_selection(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score, selection.score, rtol=1e-4, atol=1e-8)
    assert torch.equal(index, selection.index)
    assert report.compared.picks == 8 * 2  # images of 1, 3 and 4; layers that select


@pytest.mark.slow
def test_an_onnx_file_names_what_goes_in_and_out_and_has_its_facts(onnx_file):
    _, path, report = onnx_file
    session, _ = run_onnx(path, torch.zeros(1, 3, 32, 32))
    assert [(put.name, put.shape) for put in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    assert [put.name for put in session.get_outputs()] == ["logits", "index", "score"]
    facts = json.loads(session.get_modelmeta().custom_metadata_map["ffvt"])
    assert facts == {"classes": ["owl", "jay"], "mean": [0.5, 0.4, 0.3], "image_size": 32}
    assert report.images == ("batch", 3, 32, 32)
    assert "'images': images" in report.summary()
    assert "same picks in 16 layers" in report.summary()


@pytest.mark.slow
def test_an_onnx_file_has_standard_operators_only(onnx_file):
    import onnx

    graph = onnx.load(onnx_file[1])
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21])
def test_the_operator_set_is_the_one_asked_for(opset, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ffvt.export_model(trained_model(depth=2), tmp_path / "m.onnx", opset=opset, check=1)
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import}[""] == opset


@pytest.mark.slow
def test_exporting_to_onnx_says_nothing(tmp_path, capfd):
    pytest.importorskip("onnxscript")
    ffvt.export_model(trained_model(depth=2), tmp_path / "m.onnx", check=0)
    assert capfd.readouterr() == ("", "")


def test_a_program_keeps_its_facts_and_picks_where_asked(tmp_path):
    model = trained_model(depth=2).eval()
    facts = {"std": [1]}
    report = ffvt.export_model(model, tmp_path / "m.pt2", with_selection=True, batch_size=2, check=1, facts=facts)
    files = {"ffvt": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=files).module()
    assert json.loads(files["ffvt"]) == {"std": [1], "image_size": 32}
    images = torch.randn(2, 3, 32, 32)
    logits, index, score = program(images)
    expected, selection = model.forward_with_selection(images)
    torch.testing.assert_close((logits, score), (expected, selection.score), rtol=1e-5, atol=1e-6)
    assert torch.equal(index, selection.index)
    assert report.images == (2, 3, 32, 32)
    assert report.compared.picks == 2


@pytest.fixture
def timm_vit():
    """A small ViT of timm with registers."""
    module = pytest.importorskip("timm.models.vision_transformer")
    return module.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, reg_tokens=2)


@pytest.mark.slow
def test_what_timm_built_is_exported_too(timm_vit, tmp_path):
    model = ffvt.add_feature_fusion(timm_vit, num_select=3, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    report = ffvt.export_model(model, tmp_path / "m.pt2", with_selection=True, check=2)
    assert report.compared.picks > 0
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(program(images)[0], model.eval()(images), rtol=1e-5, atol=1e-5)


def test_the_picks_of_a_fused_timm_model_are_compared(timm_vit):
    model = ffvt.add_feature_fusion(timm_vit, num_select=3, num_classes=5).eval()
    torch.nn.init.normal_(model.head.weight)
    found = compare(model, lambda images: [model(images), *model.forward_with_selection(images)[1]], 32, (2,))
    assert found.picks > 0


def test_a_plain_timm_model_is_exported_too(tmp_path):
    pytest.importorskip("timm")
    sizes = dict(image_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    model = ffvt.create_model("timm:vit_tiny_patch16_224", **sizes, feature_fusion=False)
    report = ffvt.export_model(model, tmp_path / "m.pt2", check=1)
    assert report.images == ("batch", 3, 32, 32)
    assert not report.compared.is_zero
    with pytest.raises(ValueError, match="with_selection must be False"):
        ffvt.export_model(model, tmp_path / "m.pt2", with_selection=True)
    with pytest.raises(TypeError, match="model must be one of this package's; got a Linear"):
        ffvt.export_model(torch.nn.Linear(2, 2), tmp_path / "m.pt2")


@pytest.mark.parametrize("dataset", ["imagefolder", "cifar10"])
def test_the_facts_say_all_that_an_image_goes_through(dataset, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(export, "export_model", lambda model, path, *, facts: seen.update(facts))
    export.export_classifier(ffvt.load(write_checkpoint(tmp_path, dataset=dataset)), "m.pt2")
    assert seen["upright"] is True
    assert seen["whole"] == (dataset == "cifar10")
    assert seen["resize_size"] == 72


@pytest.mark.slow
def test_the_hybrid_is_exported_too(tmp_path):
    pytest.importorskip("timm")
    sizes = dict(image_size=32, depth=2, embed_dim=32, num_heads=2, mlp_dim=32, num_select=1)
    model = ffvt.create_model("r50_vit_b16", **sizes)
    torch.nn.init.normal_(model.head.weight)
    assert ffvt.export_model(model, tmp_path / "m.pt2", check=2).compared.images == 6


def other_weights(model):
    """A file of the same model with a head that is a little different."""
    head = torch.nn.Linear(32, 5)
    head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        head.weight[0, 0] += 0.1

    def run(images):
        features, selection = model.forward_features_with_selection(images)
        return [head(features), selection.index, selection.score]

    return run


def swapped_picks(model):
    def run(images):
        logits, (index, score) = model.forward_with_selection(images)
        return [logits, (index + 1) % score.shape[-1], score]

    return run


def not_a_number(model):
    return lambda images: [model(images) * torch.nan]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (other_weights, "logits must be the model's to 0.0001 of the largest; got"),
        (swapped_picks, "must pick as the model; got other picks in 2 layers"),
        (not_a_number, "logits must be .*; got nan"),
    ],
)
def test_a_file_that_computes_something_else_is_noticed(run, message):
    model = trained_model().eval()
    with pytest.raises(ValueError, match=message):
        compare(model, run(model), 32, (1, 3))


def test_a_comparison_of_zeros_says_so():
    model = tiny_model(**SMALL).eval()
    found = compare(model, lambda images: [model(images) * 7], 32, (1,))
    assert "the logits are all zero" in found.summary()
    trained = trained_model().eval()
    assert "zero" not in compare(trained, lambda images: [trained(images)], 32, (1,)).summary()


@pytest.fixture
def format_of_zeros(monkeypatch):
    """Writes .pt2 files that give zeros, without the time that tracing a model takes."""
    zeros = export._FORMATS[".pt2"]._replace(
        write=lambda program, facts, opset: b"new", load=lambda content: lambda images: [torch.zeros(len(images), 5)]
    )
    monkeypatch.setitem(export._FORMATS, ".pt2", zeros)
    monkeypatch.setattr(export, "_trace", lambda *_: None)


def test_a_file_that_differs_is_not_written_and_an_older_one_stays(tmp_path, format_of_zeros):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match="logits must be"):
        ffvt.export_model(trained_model(), path)
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


def test_images_whose_picks_hang_on_rounding_are_excused_if_they_differ():
    """All patches alike: their scores are equal, and which are picked says nothing."""
    model = trained_model(first_candidate=1).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
        model.patch_embed.proj.weight.zero_()
    expected = expect(model, copy.deepcopy(model).double(), torch.randn(2, 3, 32, 32))
    assert not expected.clear.any()
    with pytest.raises(ValueError, match="must have clear picks to be compared; got none among 4"):
        compare(model, lambda images: [model(images) + 1], 32, (1, 3))
    found = compare(model, lambda images: [model(images) + (len(images) == 1)], 32, (1, 3))
    assert (found.images, found.excused, found.difference) == (4, 1, 0.0)
    assert "but for 1 images" in found.summary()


def test_unchecked_files_say_so(tmp_path, format_of_zeros):
    report = ffvt.export_model(trained_model(), tmp_path / "m.pt2", check=0)
    assert report.compared is None
    assert "not compared with the model" in report.summary()
    assert (tmp_path / "m.pt2").read_bytes() == b"new"


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_missing_packages_are_named_with_the_command_that_installs_them(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "onnxruntime":
        pytest.importorskip("onnxscript")
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'ffvt\[onnx\]'"):
        ffvt.export_model(trained_model(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
