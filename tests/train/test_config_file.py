"""Options in a YAML file: written by a run, read by `ffvt train --config`."""

from dataclasses import replace

import pytest

from ffvt.train.config_file import config_text
from ffvt.train.flags import parse_training_flags
from ffvt.train.options import TrainOptions


def parsed(folder, text, *flags):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_training_flags([*flags, "--config", str(path)])


def test_what_is_written_reads_back_as_the_same_options(tmp_path):
    options = TrainOptions(
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        name="mon modèle 🐦: #1",
        depth=3,
        fp16=True,
        learning_rate=1e-5,
        epochs=2.5,
        feature_fusion=True,
        cache_dir="a b",
    )
    assert parsed(tmp_path, config_text(options)) == options


def test_how_a_run_starts_is_no_part_of_what_it_is(tmp_path):
    text = config_text(TrainOptions(resume="auto", num_steps=7))
    assert parsed(tmp_path, text) == TrainOptions(num_steps=7)


def test_a_file_overrides_a_recipe_and_flags_override_a_file(tmp_path):
    options = parsed(tmp_path, "num_steps: 7\neval_every: 3\nfeature_fusion: false\n", "--recipe", "cub")
    assert (options.name, options.num_steps, options.eval_every, options.feature_fusion) == ("cub", 7, 3, False)
    again = parsed(tmp_path, "num_steps: 7\neval_every: 3\n", "--eval_every", "5")
    assert again == replace(TrainOptions(), num_steps=7, eval_every=5)


def test_an_empty_value_keeps_the_default_and_numbers_may_be_written_as_people_do(tmp_path):
    options = parsed(tmp_path, "depth:\nlearning_rate: 1e-3\nname: 2026-01-31\ntf32: yes\n")
    assert (options.depth, options.learning_rate, options.name, options.tf32) == (None, 1e-3, "2026-01-31", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rates: 1\n", "got 'learning_rates'; did you mean learning_rate?"),
        ("fp16: 1\n", "must give fp16 true or false; got '1'"),
        ("name: {a: 1}\n", "must give name a plain value"),
        ("num_steps: many\n", "--num_steps: invalid int value: 'many'"),
        ("num_steps: 0\n", "num_steps must be at least 1; got num_steps=0"),
        ("- num_steps\n", "must map options to values; got list"),
        ("", "must map options to values; got NoneType"),
        ("a: [1\n", "must be YAML"),
        ("{a: 1}: 2\n", "must be YAML"),
        ("name: !!python/object/apply:os.system ['touch escaped.txt']\n", "must give name a plain value"),
        ("[" * 100000, "must be YAML"),
        ("#" * (1 << 20) + "\n", "must have at most 1048576 bytes"),
    ],
    ids=range(12),
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(tmp_path, text)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_none_is_refused(tmp_path, capsys):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SystemExit):
            parse_training_flags(["--config", str(path)])
        assert str(path) in capsys.readouterr().err
