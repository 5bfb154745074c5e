"""The device table, files that add to it, and this machine's own figures."""

import pytest
import torch

from nativerank.accounting import hardware
from nativerank.accounting.hardware import DEVICES, THIS_CPU, find_device, present_device, read_devices, split_count

ROW = "memory_gb: 48, bf16_tflops: 200, fp32_tflops: 50, gb_per_second: 900, source: a sheet"


def test_every_row_is_whole_and_names_its_source():
    for device in DEVICES.values():
        assert device.bf16_flops > device.fp32_flops > 1e13 and device.bytes_per_second > 1e11
        assert device.memory_bytes >= 24e9 and len(device.source) > 8 and device.price_per_hour is None


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_what_pytorch_calls_a_card_finds_one_row(monkeypatch, called, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: called)
    found = present_device()
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    "called",
    ["NVIDIA A10G", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-80GB MIG 3g.40gb"],
)
def test_an_unknown_card_or_a_part_of_one_has_no_peak(monkeypatch, called):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: called)
    assert present_device() is None


def test_a_name_that_is_nearly_one():
    with pytest.raises(ValueError, match="unknown device 'h20'; did you mean h200"):
        find_device("h20")


def test_names_with_a_count():
    assert split_count("h200x8") == ("h200", 8) and split_count("mi300x") == ("mi300x", 1)
    assert split_count("rtx-4090x2") == ("rtx-4090", 2)
    with pytest.raises(ValueError, match="h200x0"):
        split_count("h200x0")


def test_a_file_adds_rows_and_replaces_them(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(f"my-card: {{{ROW}, price_per_hour: 1.5}}\nh200: {{{ROW}}}\n")
    devices = read_devices(str(file))
    mine = find_device("my-card", devices)
    assert (mine.memory_bytes, mine.bf16_flops, mine.fp32_flops) == (48 * 10**9, 2e14, 5e13)
    assert (mine.bytes_per_second, mine.price_per_hour, mine.source) == (9e11, 1.5, "a sheet")
    assert devices["h200"].memory_bytes == 48 * 10**9 and DEVICES["h200"].memory_bytes == 141 * 10**9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "holds no devices"),
        ("my-card: 3", "device my-card: wants memory_gb"),
        (f"my-card: {{{ROW}, pirce_per_hour: 1}}", "unknown key pirce_per_hour; did you mean price_per_hour"),
        ("my-card: {memory_gb: 48}", "bf16_tflops is missing"),
        (f"my-card: {{{ROW.replace('48', '-1')}}}", "memory_gb must be a positive number, got -1"),
        ("a: {b", "cannot read"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, said):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_devices(str(file))


def test_this_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "GEMM_SIZES", (32, 64))
    monkeypatch.setattr(hardware, "COPY_SIZES", (1 << 12, 1 << 16))
    monkeypatch.setattr(hardware, "TRIAL_SECONDS", 0.001)
    cpu = find_device(THIS_CPU)
    assert cpu.on_cpu and cpu.product_flops == cpu.fp32_flops > 0 and cpu.bytes_per_second > 0
    assert cpu.memory_bytes > 1 << 28 and "products of side 32 to 64" in cpu.source


def test_the_peaks_are_those_of_the_fastest_sizes(monkeypatch):
    """Each trial is known by its size here, and took so many seconds."""
    seconds = {8: 2.0, 16: 0.5, 32: 64.0, 4096: 2.0, 8192: 8.0}
    monkeypatch.setattr(hardware, "GEMM_SIZES", (8, 16, 32))
    monkeypatch.setattr(hardware, "COPY_SIZES", (4096, 8192))
    for name in ("product", "copy"):
        monkeypatch.setattr(hardware, name, lambda size: size)
    monkeypatch.setattr(hardware, "least_seconds", seconds.__getitem__)
    cpu = hardware.measured_cpu()
    assert cpu.fp32_flops == 2 * 16**3 / 0.5 and cpu.bytes_per_second == 2 * 4096 / 2.0


def test_of_all_repeats_the_shortest_counts(monkeypatch):
    """By a clock of its own: calls of 5, 2, 4 and 3 seconds, of which the third ends the trial."""
    now, took = [0.0], iter([5.0, 2.0, 4.0, 3.0])

    def work():
        now[0] += next(took)

    monkeypatch.setattr(hardware, "TRIAL_SECONDS", 10.0)
    assert hardware.least_seconds(work, clock=lambda: now[0]) == 2.0 and next(took) == 3.0
    monkeypatch.setattr(hardware, "TRIAL_SECONDS", 1.0)
    took = iter([7.0])
    assert hardware.least_seconds(work, clock=lambda: now[0]) == 7.0
