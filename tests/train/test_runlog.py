"""The log that a run writes."""

import json

from ffvt.train.runlog import LOG_FILE, RunLog, read_log


def opened(folder, append=False, enabled=True):
    return RunLog(folder, "run", 10, 0, append=append, enabled=enabled, tensorboard=False)


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = opened(tmp_path)
    log.write("train", step=1, loss=0.5)
    assert read_log(tmp_path) == [{"kind": "train", "step": 1, "loss": 0.5}]
    log.close()


def test_numbers_that_are_not_finite_are_null_at_any_depth(tmp_path):
    log = opened(tmp_path)
    log.write("end", mfu=float("nan"), last={"loss": float("inf"), "top1": 0.5})
    log.close()
    assert read_log(tmp_path) == [{"kind": "end", "mfu": None, "last": {"loss": None, "top1": 0.5}}]


def test_a_log_is_appended_to_behind_its_last_whole_line_or_starts_anew(tmp_path):
    for append, steps in ((False, [1]), (True, [1, 2]), (False, [3])):
        log = opened(tmp_path, append)
        log.write("train", step=steps[-1])
        log.close()
        assert [line["step"] for line in read_log(tmp_path)] == steps
        with (tmp_path / LOG_FILE).open("a") as file:
            file.write(json.dumps({"kind": "train"})[:-3])  # what a kill leaves


def test_other_ranks_write_nothing(tmp_path):
    log = opened(tmp_path / "run", enabled=False)
    log.write("train", step=1)
    log.advance()
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_warning_and_no_error(tmp_path, caplog):
    log = opened(tmp_path)
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115
    for step in range(3):
        log.write("train", step=step)
    log.close()
    assert caplog.text.count("the log cannot be written, training continues without it") == 1
