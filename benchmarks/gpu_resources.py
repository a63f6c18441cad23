"""What the compiler makes of the Hopper kernels, without a GPU: registers, spilled bytes, products it serialized.

    python -m pip download --no-deps -d WHEELS jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \\
      "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*"    # then unzip each into PACKAGES; nothing is installed
    python -m benchmarks.gpu_resources --packages=PACKAGES [--length=65536] [--sass=DIR]

A serialized product (ptxas C7512 and its like) means that products do not overlap with anything, mostly for lack of
registers; spilled bytes that are read within a loop wait for memory. `--sass` keeps the machine code, if nvdisasm lies
beside ptxas in PACKAGES (Triton's wheel has one).
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

# An H100 (SXM) as XLA describes it; what the kernels do not depend on is left out.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare(packages: Path, dump: Path, sass: bool) -> None:
    """Sets what JAX and Mosaic read when they are imported."""
    cuda = packages / "nvidia" / "cu13"
    os.environ |= {
        "JAX_PLATFORMS": "cuda,cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "PATH": f"{cuda / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    if sass:
        os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
    sys.path.insert(0, str(packages))


def summarize(text: str) -> dict[str, Any]:
    """Figures out of ptxas's report of one kernel."""
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    return {
        "registers": int(registers[1]) if registers else None,
        "spilled bytes": int(spilled[1]) if spilled else None,
        "serialized": re.findall(r"\((C75\d\d)\) Potential Performance Loss", text),
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR", help="the unzipped wheels")
    parser.add_argument("--length", type=int, default=65536, metavar="T", help="tokens; default 65536")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="keep ptxas's reports and the machine code")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump = options.sass or Path(folder)
        dump.mkdir(parents=True, exist_ok=True)
        prepare(options.packages, dump, options.sass is not None)
        import jax
        from jax._src import xla_bridge

        from benchmarks import profile_gpu
        from pallas_kernels.specs import Spec

        # The place of ptxas is set again: importing Mosaic takes it from an installed toolkit.
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(options.packages / "nvidia" / "cu13")
        topology = xla_bridge.make_pjrt_topology("cuda", "h100", target_config=TARGET, topology="1x1x1")
        place = jax.sharding.SingleDeviceSharding(topology._make_compile_only_devices()[0])
        functions: dict[str, Any] = {}

        def arrays() -> dict[str, Any]:
            jobs = profile_gpu.kernels(Spec("compiled", queries=options.length, keys=options.length))
            functions.update({name: function for name, (function, _) in jobs.items()})
            return {name: given for name, (_, given) in jobs.items()}

        shapes = jax.eval_shape(arrays)
        print("| kernel | registers at the start | spilled bytes | serialized |\n|---|---|---|---|")
        for name in profile_gpu.NAMES:
            before = set(dump.glob("*.ptxas"))
            jax.jit(functions[name], in_shardings=place, out_shardings=place).lower(*shapes[name]).compile()
            reports = sorted(set(dump.glob("*.ptxas")) - before)
            seen = summarize("".join(report.read_text() for report in reports))
            serialized = ", ".join(seen["serialized"]) or "no"
            print(f"| {name} | {seen['registers']} | {seen['spilled bytes']} | {serialized} |", flush=True)
            for log in dump.glob("*.mlir-passes.log"):
                log.unlink()


if __name__ == "__main__":
    main()
