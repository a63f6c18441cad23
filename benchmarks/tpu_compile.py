"""Compiles jitted calls for TPUs that are not there, and reads what the compiler says of them.

A worker process per chip, since the compiler takes its flags once:

    python -m benchmarks.tpu_compile --chip=v5e --out=DIR CASE ...

libtpu must be importable (`requirements-tpu.txt`); no TPU is needed.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.program_reading import Operation, read_program

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# No metadata server is asked about a TPU, no lock is taken of one.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one call on one chip.

    Attributes:
      code_bytes: size of the generated code.
      temporary_bytes: device memory beside arguments and results.
      kernels: Pallas kernels by HLO instruction, with `runs`, `vmem_bytes` and, where dumped, the `schedule`.
      operations: everything else that takes time.
    """

    code_bytes: int
    temporary_bytes: int
    kernels: dict[str, dict[str, Any]]
    operations: tuple[Operation, ...]


def lower(build: Callable[[], Any], chip: str) -> Any:
    """Lowers a call for a chip.

    Args:
      build: gives the function and the shapes of its arguments, as `tpu_cases.build` does.
      chip: a key of `TOPOLOGIES`.

    Returns:
      What `jax.jit(...).lower` returns.
    """
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import tpu

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    place = SingleDeviceSharding(topology.devices[0])
    with tpu.compiling_for(chip):
        function, shapes = build()
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
        return jax.jit(function).lower(*arguments)


def lower_case(name: str, chip: str) -> Any:
    """Lowers a case of `benchmarks.tpu_cases` for a chip, see `lower`."""
    from benchmarks import tpu_cases

    return lower(lambda: tpu_cases.build(name), chip)


def compile_lowered(lowered: Any, name: str, chip: str, dumps: Path | None = None) -> Program:
    """Compiles a lowered case in this process.

    Args:
      lowered: by `lower_case`.
      name: the case's. Splash attention leaves its use of VMEM to a flag, which is given here.
      chip: a key of `TOPOLOGIES`.
      dumps: folder into which this process's compiler dumps schedules; emptied afterwards. None: no schedules.

    Returns:
      What the compiler says.
    """
    from benchmarks import tpu_bundles
    from pallas_kernels import tpu

    kib = tpu.CHIPS[chip].vmem_bytes * 9 // 10 // 1024
    options = {"xla_tpu_scoped_vmem_limit_kib": str(kib)} if name.startswith("splash") else None
    compiled = lowered.compile(compiler_options=options)
    reading = read_program(compiled.as_text())
    kernels, operations = reading.kernels, reading.operations
    if dumps is not None:
        for kernel, schedule in tpu_bundles.read_schedules(dumps, set(kernels)).items():
            kernels[kernel]["schedule"] = tpu_bundles.to_json(schedule)
        # XLA states no estimate of its sorts, but dumps the loops of most, whose limits are constants.
        sorts = {x.name for x in operations if x.cycles is None and x.name.startswith("sort")}
        sorts = {name for name in sorts if tpu_bundles.is_dumped(dumps, name)}
        cycles = {name: x.static_cycles() for name, x in tpu_bundles.read_schedules(dumps, sorts).items()}
        # Of sorts of one shape it compiles the first.
        alike = {x.bytes: cycles[x.name] for x in operations if x.name in cycles}
        operations = tuple(
            dataclasses.replace(x, cycles=cycles.get(x.name, alike.get(x.bytes)))
            if x.cycles is None and x.name.startswith("sort")
            else x
            for x in operations
        )
        shutil.rmtree(dumps)
        dumps.mkdir()
    memory = compiled.memory_analysis()
    return Program(memory.generated_code_size_in_bytes, memory.temp_size_in_bytes, kernels, operations)


def case_path(folder: Path, chip: str, name: str) -> Path:
    """Where a case's result lies."""
    return folder / f"{chip} {name}.json".replace("/", "_").replace(" ", "_")


def compile_cases(names: Iterable[str], chip: str, folder: Path) -> None:
    """Compiles cases for a chip in a process of its own, with schedules.

    Args:
      names: cases of `benchmarks.tpu_cases`.
      chip: a key of `TOPOLOGIES`.
      folder: gets one JSON per case; a case that lowers to the same program as last time is not compiled again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.tpu_compile", f"--chip={chip}", f"--out={folder}", *names]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})


def read_cases(names: Iterable[str], chip: str, folder: Path) -> dict[str, Program | str]:
    """Programs, or refusals as sentences, that `compile_cases` left in a folder; cases not there are left out."""
    programs: dict[str, Program | str] = {}
    for name in names:
        path = case_path(folder, chip, name)
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        if "refused" in record:
            programs[name] = record["refused"]
            continue
        record["operations"] = tuple(Operation(**operation) for operation in record["operations"])
        programs[name] = Program(**{field.name: record[field.name] for field in dataclasses.fields(Program)})
    return programs


def _compile_to(path: Path, name: str, chip: str, dumps: Path) -> str:
    try:
        lowered = lower_case(name, chip)
        digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if path.exists() and json.loads(path.read_text()).get("lowered") == digest:
            return "as before"
        record = {"lowered": digest, **dataclasses.asdict(compile_lowered(lowered, name, chip, dumps))}
    except Exception as refusal:  # what the compiler refuses is a result, too
        record = {"refused": f"{type(refusal).__name__}: {refusal}"}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(path)
    return record.get("refused", "compiled")[:300]


def main(arguments: list[str] | None = None) -> None:
    """Runs the worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON per case")
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder) / "dumps"
        dumps.mkdir()
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_.*"
        )
        for name in options.cases:
            outcome = _compile_to(case_path(options.out, options.chip, name), name, options.chip, dumps)
            print(f"{options.chip} {name}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
