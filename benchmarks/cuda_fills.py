"""CUDA fills against torch's, in one run on one GPU: a table on the terminal, everything in a JSON file.

    python benchmarks/cuda_fills.py --out DIRECTORY

Each figure is the median of --repeats timings by device events after two of warm-up. 2^30 elements are 2 or
4 GiB, far more than any L2 cache holds. Needs 6 GiB of device memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import torch

from fastinit import native

DTYPES = {"bf16": (torch.bfloat16, native.BFLOAT16), "fp16": (torch.float16, native.FLOAT16),
          "fp32": (torch.float32, native.FLOAT32)}  # fmt: skip
INF = float("inf")
TWO_SIGMA = (0.0, 0.02, 0, *(97711072.0, 0.9544997215270996, -INF, 2.0) * 2)
LOPSIDED = (0.25, 0.5, -356530598, 681419136.0, 0.8185946345329285, -INF, 1.0,
            97711072.0, 0.8185946345329285, -INF, 2.0)  # fmt: skip


class Bench:
    def __init__(self, elements, repeats):
        self.elements = elements
        self.repeats = repeats
        self.rows = []

    def time(self, prepare, run):
        """Median, lowest and highest milliseconds of run(prepare()); only `run` is timed."""
        prepared = [prepare() for _ in range(self.repeats + 2)]
        times = []
        for item in prepared:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(item)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        times = times[2:]
        return statistics.median(times), min(times), max(times)

    def add(self, name, dtype, timing, elements, reference=None):
        """A row of the table; `reference` names the row of the same dtype that it is compared with."""
        milliseconds, low, high = timing
        itemsize = DTYPES[dtype][0].itemsize
        row = {
            "name": name,
            "dtype": dtype,
            "elements": elements,
            "milliseconds": milliseconds,
            "lowest": low,
            "highest": high,
            "gelements_per_second": elements / milliseconds * 1e-6,
            "terabytes_per_second": elements * itemsize / milliseconds * 1e-9,
        }
        if reference is not None:
            other = next(r for r in self.rows if (r["name"], r["dtype"]) == (reference, dtype))
            row["compared_with"] = reference
            row["ratio"] = row["gelements_per_second"] / other["gelements_per_second"]
        self.rows.append(row)
        versus = f"{row['ratio']:6.2f} x {reference}" if reference else ""
        print(
            f"{name:34} {dtype}  {milliseconds:8.3f} ms ({low:.3f} to {high:.3f})  "
            f"{row['gelements_per_second']:7.1f} G/s  {row['terabytes_per_second']:5.2f} TB/s  {versus}",
            flush=True,
        )

    def torch_call(self, name, dtype, tensor, call):
        self.add(name, dtype, self.time(lambda: None, lambda _: call(tensor)), tensor.numel())

    def fill(self, name, dtype, add, elements, reference=None):
        """Times the batch that add(batch) puts together."""

        def prepare():
            batch = native.Batch()
            add(batch)
            return batch

        stream = torch.cuda.current_stream().cuda_stream
        self.add(name, dtype, self.time(prepare, lambda batch: batch.run_cuda(0, stream)), elements, reference)

    def run_dtype(self, dtype):
        torch_dtype, native_dtype = DTYPES[dtype]
        n = self.elements
        tensor = torch.empty(n, dtype=torch_dtype, device="cuda")
        pointer = tensor.data_ptr()

        self.torch_call("torch zero_ (memset)", dtype, tensor, lambda t: t.zero_())
        self.torch_call("torch uniform_", dtype, tensor, lambda t: t.uniform_(-1.0, 1.0))
        self.torch_call("torch normal_", dtype, tensor, lambda t: t.normal_(0.0, 0.02))
        self.torch_call(
            "torch trunc_normal_",
            dtype,
            tensor,
            lambda t: torch.nn.init.trunc_normal_(t, std=0.02, a=-0.04, b=0.04),
        )

        def whole(kind, parameters, steps=()):
            return lambda batch: batch.add(pointer, n, native_dtype, kind, parameters, 1, 2, steps)

        self.fill("constant", dtype, whole(native.CONSTANT, (0.5,)), n, "torch zero_ (memset)")
        self.fill("uniform", dtype, whole(native.UNIFORM, (-1.0, 1.0)), n, "torch uniform_")
        self.fill("normal", dtype, whole(native.NORMAL, (0.0, 0.02)), n, "torch normal_")
        self.fill("truncated normal", dtype, whole(native.TRUNCATED_NORMAL, TWO_SIGMA), n, "torch trunc_normal_")
        self.fill("truncated normal, lopsided", dtype, whole(native.TRUNCATED_NORMAL, LOPSIDED), n, "normal")
        step = (native.MULTIPLY, 0.02, 0.0)
        self.fill("normal, one step", dtype, whole(native.NORMAL, (0.0, 1.0), (step,)), n, "normal")

        def box(kind, parameters, columns, start=0, index=0):
            """n elements in rows of `columns` out of a tensor 8 times as wide, contiguous in memory."""
            rows = n // columns - 1
            sizes, strides = (rows, columns), ((8 * columns, 1), (columns, 1))
            address = pointer + start * tensor.itemsize
            return lambda batch: batch.add_region(
                address, native_dtype, kind, parameters, 1, 2, (), index, sizes, *strides
            )

        normal = native.NORMAL, (0.0, 0.02)
        columns = 1024 // tensor.itemsize
        self.fill("normal, rows of 1 KiB", dtype, box(*normal, columns), n - columns, "normal")
        self.fill("normal, rows of 1 KiB, odd start", dtype, box(*normal, columns, 1, 3), n - columns, "normal")
        self.fill("normal, rows of 128 bytes", dtype, box(*normal, columns // 8), n - columns // 8, "normal")
        self.fill(
            "normal, one run, odd start",
            dtype,
            lambda batch: batch.add_region(
                pointer + tensor.itemsize, native_dtype, *normal, 1, 2, (), 3, (n - 8,), (1,), (1,)
            ),
            n - 8,
            "normal",
        )

        count, each = 10_000, 4096
        single = f"normal, {count * each:,} elements"
        self.fill(
            single,
            dtype,
            lambda batch: batch.add(pointer, count * each, native_dtype, *normal, 1, 2),
            count * each,
        )

        def many(batch):
            for i in range(count):
                batch.add(pointer + i * each * tensor.itemsize, each, native_dtype, *normal, 1, i)

        self.fill(f"normal, {count:,} fills of {each:,}", dtype, many, count * each, single)

        layer = 4096 * 4096
        self.fill(
            "normal, one 4096 x 4096",
            dtype,
            lambda batch: batch.add(pointer, layer, native_dtype, *normal, 1, 2),
            layer,
            "normal",
        )
        self.torch_call("torch normal_, one 4096 x 4096", dtype, tensor[:layer], lambda t: t.normal_(0.0, 0.02))


def first_fill_milliseconds():
    """Host time of this process's first fill, which loads the kernel, and of its second."""
    tensor = torch.zeros(4096, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(2):
        batch = native.Batch()
        batch.add(tensor.data_ptr(), 4096, native.BFLOAT16, native.NORMAL, (0.0, 1.0), 1, 2)
        torch.cuda.synchronize()
        start = time.perf_counter()
        batch.run_cuda(0, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine():
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "cuda": native.build_info()["cuda_version"],
        "commit": os.environ.get("FASTINIT_COMMIT") or output_of("git", "rev-parse", "HEAD"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for cuda_fills.json")
    parser.add_argument("--elements", type=int, default=2**30)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp16", "fp32"])
    arguments = parser.parse_args()

    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    first, second = first_fill_milliseconds()
    print(f"first fill of the process {first:.2f} ms, second {second:.3f} ms")
    bench = Bench(arguments.elements, arguments.repeats)
    for dtype in arguments.dtypes:
        bench.run_dtype(dtype)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": about, "first_fill_milliseconds": [first, second], "rows": bench.rows}
    (arguments.out / "cuda_fills.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
