"""What devices can do at most: the makers' figures, and those of a file of one's own.

    memory_bytes            a GB is 10^9 bytes, which is what is promised; cards have a little more
    bf16_flops, fp32_flops  peak of dense products, per second, without structured sparsity; fp32 without TF32
    bytes_per_second        peak of device memory

Every row names where its figures stand; `sparse` sheets list twice what is here. `this-cpu` is no row: its peaks are
measured when they are asked for (`measured_cpu`). A file of one's own is YAML and adds rows or replaces them:

    my-card:
      memory_gb: 48
      bf16_tflops: 200
      fp32_tflops: 50
      gb_per_second: 900
      source: where this stands
      price_per_hour: 1.2     # optional, in any currency; none is known here
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nativerank.schema import nearest

GIGA, TERA = 10**9, 10**12
THIS_CPU = "this-cpu"


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as on the command line.
        memory_bytes, bf16_flops, fp32_flops, bytes_per_second: peaks, see above; per second.
        source: of the figures.
        reported: what PyTorch calls it, as a pattern; "" where nobody knows.
        price_per_hour: from a file of one's own; None is not known.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    bytes_per_second: float
    source: str
    reported: str = ""
    price_per_hour: float | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether runs on it compute in float32 throughout."""
        return self.name == THIS_CPU

    @property
    def product_flops(self) -> float:
        """Peak of the products of forward and backward: bfloat16 but on a CPU."""
        return self.fp32_flops if self.on_cpu else self.bf16_flops


def _device(
    name: str, gigabytes: float, bf16: float, fp32: float, bandwidth: float, source: str, reported: str
) -> Device:
    """Gigabytes, TFLOP/s, TFLOP/s, GB/s."""
    return Device(name, int(gigabytes * GIGA), bf16 * TERA, fp32 * TERA, bandwidth * GIGA, source, reported)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("h200", 141, 989, 67, 4800, "NVIDIA H200 data sheet, SXM", r"(?<!G)H200(?! NVL)"),
        _device("h200-nvl", 141, 835, 60, 4800, "NVIDIA H200 data sheet, NVL", r"H200 NVL"),
        _device("h100-sxm", 80, 989, 67, 3350, "NVIDIA H100 data sheet, SXM", r"H100 80GB HBM3"),
        _device("h100-pcie", 80, 756, 51, 2000, "NVIDIA H100 PCIe data sheet", r"H100 PCIe"),
        _device("h100-nvl", 94, 835, 60, 3900, "NVIDIA H100 data sheet, NVL", r"H100 NVL"),
        _device("a100-40gb", 40, 312, 19.5, 1555, "NVIDIA A100 data sheet, 40 GB", r"A100-(SXM4|PCIE)-40GB"),
        _device("a100-80gb", 80, 312, 19.5, 2039, "NVIDIA A100 data sheet, 80 GB SXM", r"A100-SXM4-80GB"),
        _device("a100-80gb-pcie", 80, 312, 19.5, 1935, "NVIDIA A100 data sheet, 80 GB PCIe", r"A100 80GB PCIe"),
        _device("l40s", 48, 362, 91.6, 864, "NVIDIA L40S data sheet", r"L40S"),
        _device("l4", 24, 121, 30.3, 300, "NVIDIA L4 data sheet", r"NVIDIA L4$"),
        _device("a10", 24, 125, 31.2, 600, "NVIDIA A10 data sheet", r"NVIDIA A10$"),
        _device("a40", 48, 149.7, 37.4, 696, "NVIDIA A40 data sheet", r"NVIDIA A40$"),
        _device("rtx-4090", 24, 165.2, 82.6, 1008, "NVIDIA Ada architecture white paper", r"RTX 4090$"),
        _device("rtx-3090", 24, 71, 35.6, 936, "NVIDIA GA102 architecture white paper", r"RTX 3090$"),
        _device("mi300x", 192, 1307.4, 163.4, 5300, "AMD Instinct MI300X data sheet", r"MI300X"),
    )
}

# Keys of a row in a file: the field of Device, and what one unit of it is.
KEYS = {
    "memory_gb": ("memory_bytes", GIGA),
    "bf16_tflops": ("bf16_flops", TERA),
    "fp32_tflops": ("fp32_flops", TERA),
    "gb_per_second": ("bytes_per_second", GIGA),
    "price_per_hour": ("price_per_hour", 1),
}
NEEDED = tuple(key for key in KEYS if key != "price_per_hour")
# Sides of the products and bytes of the copies that are tried on this machine, and how long each is repeated.
GEMM_SIZES, COPY_SIZES, TRIAL_SECONDS = (512, 768, 1024, 1536), (1 << 20, 1 << 22, 1 << 26), 0.06
PART_OF_A_CARD = re.compile(r"\bMIG\b")  # has a part of the card's memory and speed


def find_device(name: str, devices: Mapping[str, Device] = DEVICES) -> Device:
    """The device of this name; `this-cpu` is measured, about half a second.

    Raises:
        ValueError: an unknown name; says the nearest and lists the known ones.
    """
    if name == THIS_CPU:
        return measured_cpu()
    if name not in devices:
        known = ", ".join((*devices, THIS_CPU))
        raise ValueError(
            f"unknown device {name!r}{nearest(name, (*devices, THIS_CPU))} (devices: {known}; more by --table FILE)"
        )
    return devices[name]


def split_count(text: str) -> tuple[str, int]:
    """("h200", 8) of "h200x8"; one where no number follows.

    Raises:
        ValueError: a count below 1.
    """
    found = re.fullmatch(r"(.+?)x(-?\d+)", text)
    if found is None:
        return text, 1
    if int(found[2]) < 1:
        raise ValueError(f"--on {text}: at least one device is needed")
    return found[1], int(found[2])


def read_devices(file: str) -> dict[str, Device]:
    """The table with the rows of a YAML file, which win.

    Raises:
        ValueError: naming the file and the row: not readable, no mapping, an unknown key or one that is missing, a
            figure that is no positive number.
    """
    import yaml

    try:
        rows = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    if not isinstance(rows, dict):
        raise ValueError(f"{file} holds no devices: NAME with {', '.join(NEEDED)} and source below it")
    return DEVICES | {str(name): device_of_row(str(name), row, file) for name, row in rows.items()}


def device_of_row(name: str, row: Any, file: str) -> Device:
    """One row of such a file, checked."""
    where, known = f"{file}, device {name}", (*KEYS, "source")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: wants {', '.join(known)} below it, got {row!r}")
    for key in row:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}{nearest(str(key), known)}")
    for key in (*NEEDED, "source"):
        if key not in row:
            raise ValueError(f"{where}: {key} is missing")
    values: dict[str, Any] = {}
    for key, (field, unit) in KEYS.items():
        value = row.get(key)
        if value is None and key not in NEEDED:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{where}: {key} must be a positive number, got {value!r}")
        values[field] = int(value * unit) if field == "memory_bytes" else float(value * unit)
    return Device(name, source=str(row["source"]), **values)


def present_device() -> Device | None:
    """The row of this machine's GPU; None where there is none, for one that the table lacks and for a part of one."""
    if not torch.cuda.is_available():
        return None
    called = torch.cuda.get_device_name()
    if PART_OF_A_CARD.search(called):
        return None
    return next((d for d in DEVICES.values() if re.search(d.reported, called)), None)


def measured_cpu() -> Device:
    """This machine's CPU: float32 products and copies as fast as they go at PyTorch's present thread count.

    Peaks, so the fastest of several sizes and of all repeats: whatever else the machine does only makes it slower.
    Bandwidth counts bytes read and bytes written, and is that of tensors in caches, where those of small models lie:
    with the slower memory's the roofline would be no bound. Memory is that of the machine.
    """
    flops = max(2 * size**3 / least_seconds(product(size)) for size in GEMM_SIZES)
    bandwidth = max(2 * size / least_seconds(copy(size)) for size in COPY_SIZES)
    sizes, threads = f"{min(GEMM_SIZES)} to {max(GEMM_SIZES)}", torch.get_num_threads()
    what = f"measured, the fastest of products of side {sizes} and of copies"
    what += f", {threads} thread{'s' * (threads > 1)}"
    return Device(THIS_CPU, memory_of_machine(), flops, flops, bandwidth, what)


def product(size: int) -> Callable[[], Any]:
    """A product of two (size, size) matrices into memory that is there."""
    A, B = torch.randn(2, size, size).unbind()
    out = torch.empty_like(A)
    return lambda: torch.mm(A, B, out=out)


def copy(size: int) -> Callable[[], Any]:
    """A copy of this many bytes into memory that is there."""
    source = torch.zeros(size // 4)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def memory_of_machine() -> int:
    """Bytes of this machine's memory, or of the control group that this process is held to if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    held = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(held)) if held.isdigit() else total


def least_seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest call within TRIAL_SECONDS, which end with the call that exceeds them; at least one is made."""
    least, began = math.inf, clock()
    before = began
    while before - began < TRIAL_SECONDS:
        work()
        after = clock()
        least, before = min(least, after - before), after
    return least
