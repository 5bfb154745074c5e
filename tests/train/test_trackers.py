"""--track: what a service received is what metrics.jsonl holds, also across a crash; no service can end a run."""

import json
import math
import os
import struct
import sys
import time
import typing

import pytest

from nativerank.config import RunConfig
from nativerank.train import trackers
from nativerank.train.loop import train
from nativerank.train.metrics import read_rows
from nativerank.train.trackers import TRACKERS, Kind, flatten, identity, numbers, tracked_before

NAMES = sorted(TRACKERS)


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """No account, no settings, no database of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    for name in [n for n in os.environ if n.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    for module in [m for m in sys.modules if m == "trackio" or m.startswith("trackio.")]:
        monkeypatch.delitem(sys.modules, module)  # it reads its folder's name when imported
    monkeypatch.setenv("TRACKIO_DIR", str(home / "trackio"))


def scalars_of_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def records(file):
    """The records of a log in LevelDB's format: blocks of 32 KiB, each piece with checksum, length and kind."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def read_whole(file):
    """Its records; none while the last one is half written."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        return [Record.FromString(record) for record in records(file)]
    except (DecodeError, struct.error):
        return []


def scalars_of_wandb(run):
    """Of the offline files, one for each process, which `wandb sync` would send."""
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 60
        while not (read := read_whole(file)) or not read[-1].HasField("exit"):
            assert time.monotonic() < deadline, f"{file} has no end"
            time.sleep(0.05)  # its process writes on for a moment after `finish`
        for record in read:
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                found += [(items["step"], name, value) for name, value in items.items() if name != "step"]
    return [(step, name, value) for step, name, value in found if not name.startswith("_")]


def scalars_of_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = {row["tracked"]["id"] for row in read_rows(run) if "tracked" in row}
    rows = SQLiteStorage.get_logs("nativerank", name)
    return [(r["step"], name, value) for r in rows for name, value in r.items() if name not in ("step", "timestamp")]


SCALARS = {"tensorboard": scalars_of_tensorboard, "wandb": scalars_of_wandb, "trackio": scalars_of_trackio}


def written(run):
    """(step, name, value) of every number in metrics.jsonl."""
    return [(row["step"], name, value) for row in read_rows(run) for name, value in numbers(row).items()]


def timeless(scalars):
    """Without what a clock says, which a resumed run says anew."""
    clocks = ("seconds", "tokens_per_second", "optimizer_share", "peak_memory_bytes")
    kept = [(step, name, value) for step, name, value in scalars if name.rpartition("/")[2] not in clocks]
    return sorted((step, name, pytest.approx(value, rel=1e-6)) for step, name, value in kept)  # float32 in TensorBoard


def test_every_service_has_its_row_and_its_reader():
    assert set(typing.get_args(RunConfig.__annotations__["track"])) == {"none", *TRACKERS}
    assert set(SCALARS) == set(TRACKERS)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_service_received_is_the_record_also_across_a_crash(tmp_path, run_config, listen, crash, name):
    pytest.importorskip(TRACKERS[name].module)
    run = tmp_path / "run"
    common = dict(out=run, track=name, train__checkpoint_every=3, train__probe_every=4, train__eval_every=2)
    with pytest.raises(crash):
        train(run_config(**common), listen(crash_after=5))
    first = {row["tracked"]["id"] for row in read_rows(run) if "tracked" in row}
    listener = listen()
    train(run_config(resume="auto", **common), listener)
    assert listener.said == []
    tracked = [row["tracked"] for row in read_rows(run) if "tracked" in row]
    assert len(tracked) == 2 and {t["id"] for t in tracked} == first and {t["by"] for t in tracked} == {name}
    found = SCALARS[name](run)
    assert timeless(found) == timeless(written(run))
    assert [step for step, what, _ in found if what == "loss"] == list(range(1, 9)), "each step once, in order"
    assert any(what == "probes/model.layers.0.self_attn.q_proj/sigma_A" for _, what, _ in found)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_steps_that_come_out_differently_are_sent_again(tmp_path, run_config, listen, crash, name):
    pytest.importorskip(TRACKERS[name].module)
    run = tmp_path / "run"
    with pytest.raises(crash):
        train(run_config(out=run, track=name, train__checkpoint_every=3), listen(crash_after=5))
    train(run_config(out=run, track=name, resume="auto", train__steps=20, train__checkpoint_every=3), listen())
    found = [(step, value) for step, what, value in SCALARS[name](run) if what == "loss"]
    record = [(row["step"], row["loss"]) for row in read_rows(run) if "loss" in row]
    # The rate of a longer run differs from step 4 on, so its loss does from step 5 on.
    assert sorted(step for step, _ in found) == sorted([*range(1, 21), 5])
    assert {step: loss for step, loss in found} == pytest.approx(dict(record))


@pytest.mark.parametrize("name", NAMES)
def test_a_service_does_not_change_the_run(tmp_path, run_config, listen, fingerprint, name):
    pytest.importorskip(TRACKERS[name].module)
    train(run_config(out=tmp_path / "with", track=name), listen())
    train(run_config(out=tmp_path / "without"), listen())
    assert fingerprint(tmp_path / "with", 8) == fingerprint(tmp_path / "without", 8)


@pytest.mark.parametrize("name", NAMES)
def test_standard_output_is_the_result_alone(tmp_path, cli, flags, name):
    pytest.importorskip(TRACKERS[name].module)
    done = cli("train", *flags(out=tmp_path / "run", track=name), "--json")
    assert done.code == 0 and json.loads(done.out)["event"] == "end"
    quiet = cli("train", *flags(out=tmp_path / "quiet", track=name), "--quiet")
    assert (quiet.code, quiet.out) == (0, "")
    look = next(row["tracked"]["look"] for row in read_rows(tmp_path / "run") if "tracked" in row)
    assert f"{name}: {look}\n" in done.err


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_missing_is_an_error_before_anything_is_made(tmp_path, cli, flags, monkeypatch, name):
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    result = cli("train", *flags(out=tmp_path / "run", track=name))
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"pip install 'nativerank[{TRACKERS[name].extra}]'" in result.err
    assert not (tmp_path / "run").exists()


class Broken:
    """Fails when it is opened, at a step, or at the end."""

    id, look, takes_back = "broken", "nowhere", False

    def __init__(self, when):
        self.when, self.rows, self.closed = when, [], 0

    def __call__(self, *_):
        if self.when == "open":
            raise PermissionError(13, "no")
        return self

    def row(self, row):
        self.rows.append(row)
        if row["step"] == self.when:
            raise OSError(28, "No space left on device")

    def close(self):
        self.closed += 1
        if self.when == "close":
            raise RuntimeError("gone\nfor good")


@pytest.fixture
def broken(monkeypatch):
    def make(when):
        service = Broken(when)
        monkeypatch.setitem(TRACKERS, "tensorboard", Kind("json", "track", service))
        return service

    return make


@pytest.mark.parametrize(
    ("when", "step", "reason"),
    [
        ("open", 0, "PermissionError: [Errno 13] no"),
        (5, 5, "OSError: [Errno 28] No space left on device"),
        ("close", 8, "RuntimeError: gone for good"),
    ],
)
def test_a_service_that_fails_is_left_behind_and_the_run_goes_on(
    tmp_path, run_config, listen, broken, fingerprint, when, step, reason
):
    service, listener = broken(when), listen()
    summary = train(run_config(out=tmp_path / "run", track="tensorboard"), listener)
    assert listener.said == [f"--track tensorboard stopped, training goes on: {reason}"]
    assert summary["event"] == "end"
    rows = read_rows(tmp_path / "run")
    event = {"event": "tracker_failed", "step": step, "tracker": "tensorboard", "reason": reason}
    assert [row for row in rows if row.get("event") == "tracker_failed"] == [event]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert service.closed == (when != "open") and max([r["step"] for r in service.rows], default=0) == step
    train(run_config(out=tmp_path / "plain"), listen())
    assert fingerprint(tmp_path / "run", 8) == fingerprint(tmp_path / "plain", 8)


@pytest.mark.parametrize("first", ["none", "tensorboard"])
def test_what_a_service_missed_comes_when_the_run_goes_on(tmp_path, run_config, listen, crash, broken, first):
    common = dict(out=tmp_path / "run", train__checkpoint_every=3)
    before = broken(2)
    with pytest.raises(crash):
        train(run_config(track=first, **common), listen(crash_after=5))
    after = broken(None)
    train(run_config(track="tensorboard", resume="auto", **common), listen())
    assert [row["step"] for row in before.rows if "loss" in row] == ([] if first == "none" else [1, 2])
    # Whether a service kept the step at which it failed, nobody knows.
    missed = [1, 2, 3] if first == "none" else [3]
    assert [row["step"] for row in after.rows if "loss" in row] == [*missed, 4, 5, 6, 7, 8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_is_no_end(tmp_path, run_config, listen, monkeypatch):
    """Its writer's own thread dies, and the next rows are told."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    listener = listen(at_step={2: lambda: monkeypatch.setattr(RecordWriter, "write", full)})
    train(run_config(out=tmp_path / "run", track="tensorboard", train__steps=40), listener)
    assert len(listener.said) == 1 and "No space left on device" in listener.said[0]
    assert [row["step"] for row in read_rows(tmp_path / "run") if "loss" in row] == list(range(1, 41))


def test_wandb_asks_nobody_and_goes_online_only_if_it_can(monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = []
    monkeypatch.setattr(wandb, "login", lambda **options: asked.append(options) or logged_in)
    for mode, logged_in, found in [
        (None, False, "offline"), (None, True, "online"), ("online", False, "offline"), ("shared", True, "shared"),
        ("offline", True, "offline"), ("disabled", False, "disabled"),
    ]:  # fmt: skip
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        assert trackers.wandb_mode() == found, (mode, logged_in)
    assert asked and all(options == {"prompt": False, "verify": False} for options in asked)


def test_without_an_answer_from_wandb_the_run_is_recorded_offline(tmp_path, run_config, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(trackers, "wandb_mode", lambda: "online")
    init, modes = wandb.init, []

    def unreachable(*, mode, **options):
        modes.append((mode, options.get("resume")))
        if mode == "online":
            raise wandb.errors.CommError("timed out")
        return init(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", unreachable)
    (tmp_path / "run").mkdir()
    service = trackers.Wandb(run_config(), tmp_path / "run", 0, None)
    service.row({"step": 1, "loss": 2.0})
    service.close()
    assert modes == [("online", "allow"), ("offline", None)] and service.look.startswith("wandb sync ")
    assert scalars_of_wandb(tmp_path / "run") == [(1, "loss", 2.0)]


def test_flatten_keeps_numbers_only():
    row = {"step": 3, "loss": 1.5, "event": "end", "flag": True, "probes": {"a": {"rho": 0.5}}, "list": [1]}
    assert dict(flatten(row)) == {"step": 3, "loss": 1.5, "probes/a/rho": 0.5}


def test_numbers_of_events_do_not_mix_with_those_of_steps():
    assert numbers({"step": 3, "loss": 1.5, "seconds": 0.1, "event": "loss_spike"}) == {"loss": 1.5, "seconds": 0.1}
    assert numbers({"step": 8, "seconds": 9.0, "event": "end"}) == {"end/seconds": 9.0}


def test_what_was_tracked_before():
    def start(step, by=None):
        return {"event": "resume", "step": step} | ({"tracked": {"by": by, "id": f"of {by}"}} if by else {})

    def step(n):
        return {"step": n, "loss": float(n)}

    rows = [start(0), step(1), start(1, "a"), step(2), step(3), start(3, "b"), step(4), start(4, "a"), step(5)]
    rows += [{"event": "tracker_failed", "step": 5}, step(6)]

    def steps(*ns):
        return {identity(step(n)) for n in ns}

    assert tracked_before(rows, "a", 0) == ("of a", steps(2, 3, 5), [])
    assert tracked_before(rows, "a", 2) == ("of a", steps(3, 5), [step(1)])
    assert tracked_before(rows, "a", 9) == ("of a", set(), [step(1), step(4), step(6)])
    assert tracked_before(rows, "b", 2) == ("of b", steps(4), [step(1), step(2)])
    assert tracked_before(rows, "c", 0) == (None, set(), []) == tracked_before([], "a", 0)


def test_a_row_is_the_same_in_memory_and_in_the_file():
    row = {"step": 1, "loss": math.nan, "probes": {"a": {"rho": math.inf}}}
    assert identity(row) == identity({"step": 1, "loss": "nan", "probes": {"a": {"rho": "inf"}}})
    assert identity({"step": 1, "loss": 2.0}) != identity({"step": 1, "loss": 2.0, "val_loss": 2.0})
