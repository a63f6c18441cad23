"""The planner: what it reads of a compiled program, what follows from the figures, the command on this machine."""

import dataclasses
import json

import jax
import pytest

from experiments import plan, plan_figures
from experiments.plan_figures import Chip, Plan, Program
from experiments.program_reading import Collective, read_program

# As libtpu 0.0.48.1 schedules a scan over weights that are split over four devices, cut to what is read.
SCHEDULED = """\
HloModule jit_f, is_scheduled=true

%start (p: bf16[1,512,2048]) -> bf16[1,2048,2048] {
  %p = bf16[1,512,2048]{2,1,0} parameter(0)
  ROOT %all-gather.19 = bf16[1,2048,2048]{2,1,0} all-gather(%p), channel_id=9,
    replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}
}

%async_fusion (q: bf16[1,512,2048]) -> bf16[1,2048,2048] {
  %q = bf16[1,512,2048]{2,1,0} parameter(0)
  ROOT %all-gather.21 = bf16[1,2048,2048]{2,1,0} all-gather(%q), channel_id=9,
    replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={1}
}

%all-reduce-scatter.1 (r: bf16[2048,2048]) -> bf16[512,2048] {
  %r = bf16[2048,2048]{1,0} parameter(0)
  %all-reduce.5 = bf16[2048,2048]{1,0} all-reduce(%r), channel_id=6, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[512,2048]{1,0} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={512,2048}
}

%body (t: (s32[], bf16[1,512,2048])) -> (s32[], bf16[1,512,2048]) {
  %t = (s32[], bf16[1,512,2048]{2,1,0}) parameter(0)
  %w = bf16[1,512,2048]{2,1,0} get-tuple-element(%t), index=1
  %fusion.1 = bf16[1,2048,2048]{2,1,0} fusion(%w), kind=kCustom, calls=%start
  %fusion.2 = bf16[1,2048,2048]{2,1,0} fusion(%w), kind=kCustom, calls=%async_fusion,
    backend_config={"estimated_cycles":"1000"}
  %fusion.3 = bf16[512,2048]{1,0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel = bf16[64,128]{1,0} custom-call(%w), custom_call_target="tpu_custom_call",
    backend_config={"custom_call_config":{"cost_estimate":{"flops":"3000","transcendentals":"0","bytes_accessed":"500"}},
    "used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  ROOT %out = (s32[], bf16[1,512,2048]{2,1,0}) tuple(%t, %w)
}

%condition (c: (s32[], bf16[1,512,2048])) -> pred[] {
  %c = (s32[], bf16[1,512,2048]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[1,512,2048]) -> f32[] {
  %a = bf16[1,512,2048]{2,1,0} parameter(0)
  %loop = (s32[], bf16[1,512,2048]{2,1,0}) while(%a), condition=%condition, body=%body
  %copy.1 = bf16[1,512,2048]{2,1,0} copy(%a)
  ROOT %all-reduce.2 = f32[1024]{0} all-reduce(%a), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4], to_apply=%add
}
"""


def test_a_program_is_read_with_its_loops_and_exchanges():
    reading = read_program(SCHEDULED)
    whole = 2048 * 2048 * 2
    assert sorted(reading.collectives, key=lambda one: (one.kind, one.runs)) == [
        Collective("all-gather", 6, whole * 3 // 4),  # its start and its fusion are one exchange
        Collective("all-reduce", 1, 2 * 4096 * 7 // 8),
        Collective("reduce-scatter", 6, whole * 3 // 4),
    ]
    assert reading.kernels == {"kernel": {"runs": 6, "vmem_bytes": 4096, "flops": 3000, "bytes": 500}}
    cycles = {operation.name: (operation.runs, operation.cycles) for operation in reading.operations}
    assert cycles["fusion.2"] == (6, 1000)
    assert cycles["copy.1"] == (1, None)
    assert not next(operation for operation in reading.operations if operation.name == "copy.1").exchanges


def test_what_a_sparse_core_exchanges_is_read_once():
    offloaded = """\
%called (p: bf16[512,2048]) -> bf16[2048,2048] {
  %p = bf16[512,2048]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[2048,2048]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[512,2048]) -> bf16[2048,2048] {
  %a = bf16[512,2048]{1,0} parameter(0)
  %start = ((), (), s32[]{:S(2)}) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %update = ((bf16[512,2048]{1,0}), bf16[2048,2048]{1,0}) call-update(%start, %a)
  ROOT %done = bf16[2048,2048]{1,0} call-done(%update)
}
"""
    reading = read_program(offloaded)
    assert reading.collectives == (Collective("all-gather", 1, 2048 * 2048 * 2 * 3 // 4, asynchronous=True),)
    assert [(one.name, one.exchanges) for one in reading.operations] == [("start", True)]


def test_time_is_cycles_over_the_clock_and_stated_costs_of_kernels():
    chip = Chip("a chip", 1e9, flops_per_second=1e6, clock_hz=1e6, hbm_bytes_per_second=1e9, link_bytes_per_second=1e9)
    seconds, uncounted = plan_figures.compute_seconds(read_program(SCHEDULED), chip)
    copied = 2 * 512 * 2048 * 2 / 1e9
    assert seconds == pytest.approx(6 * 1000 / 1e6 + 6 * 3000 / 1e6 + copied)
    assert uncounted == 1


def test_of_a_conditional_all_branches_count_or_the_longest():
    branches = """\
%short (s: f32[]) -> f32[] {
  %s = f32[] parameter(0)
  ROOT %fusion.8 = f32[] fusion(%s), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"10"}
}

%long (l: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  ROOT %fusion.9 = f32[] fusion(%l), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"30"}
}

ENTRY %main (a: f32[], i: s32[]) -> f32[] {
  %a = f32[] parameter(0)
  %i = s32[] parameter(1)
  ROOT %choice = f32[] conditional(%i, %a, %a), branch_computations={%short, %long}
}
"""
    assert {x.name for x in read_program(branches).operations} == {"fusion.8", "fusion.9"}
    assert [x.name for x in read_program(branches, one_branch=True).operations] == ["fusion.9"]


def test_a_loop_of_unknown_length_is_named():
    with pytest.raises(ValueError, match="loop is a loop of unknown length"):
        read_program(SCHEDULED.replace("direction=LT", "direction=NE"))


def a_plan(**changes):
    gradient = Program(
        temporary_bytes=6 * 2**30,
        compute_seconds=1.0,
        collectives={
            "all-gather": {"runs": 6, "bytes": 10**9, "asynchronous_bytes": 10**9},
            "all-reduce": {"runs": 1, "bytes": 10**9, "asynchronous_bytes": 0},
        },
    )
    update = Program(temporary_bytes=2**30, compute_seconds=0.5)
    chip = Chip("v5e", 16e9, 200e12, 1.5e9, 800e9, 8e9)
    figures = {
        "config": "x",
        "topology": "v5e:2x2",
        "devices": 4,
        "mesh": {"data": 1, "fsdp": 4},
        "visual_tokens": 960,
        "text_tokens": 64,
        "contexts": 4,
        "accumulation": 2,
        "chip": chip,
        "parameter_bytes": 2**30,
        "optimizer_bytes": 3 * 2**30,
        "host_bytes": 0,
        "gradient_bytes": 2**30,
        "batch_bytes": 0,
        "kept_bytes": 2**30,
        "programs": {"gradient": gradient, "update": update},
        "flops": 400e12,
        "compile_seconds": 1.0,
    }
    return Plan(**(figures | changes))


def test_a_plan_adds_up():
    made = a_plan()
    assert made.peak_bytes == 11 * 2**30
    assert made.fits
    assert made.verdict == "fits, with 3.9 GiB of 14.9 left"
    assert made.compute_seconds == 2.5
    assert made.exchange_seconds == pytest.approx(2 * 2e9 / 4e9)
    assert made.mfu(2.0) == pytest.approx(2 * 400e12 / (2.0 * 4 * 200e12))
    assert json.loads(json.dumps(plan_figures.to_json(made)))["fits"]
    assert "verdict: fits" in plan_figures.shown(made)


def test_a_plan_says_by_how_much_it_does_not_fit():
    assert a_plan(optimizer_bytes=12 * 2**30).verdict == "does not fit: 5.1 GiB more than the 14.9 of a v5e"
    refused = Program(None, refused="RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm", needed_bytes=20 * 2**30)
    made = a_plan(programs={"gradient": refused, "update": Program(0)})
    assert not made.fits
    assert made.exchange_seconds is None
    assert made.verdict == "does not fit: 8.1 GiB more than the 14.9 of a v5e"
    silent = dataclasses.replace(refused, needed_bytes=None)
    assert "Used 20.00G" in a_plan(programs={"gradient": silent, "update": Program(0)}).verdict


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_command_plans_for_this_machine(tmp_path, capsys, quick_compilation):
    arguments = ["--config=nsa_video", "--topology=local", "--context=60", "--text=16", f"--json={tmp_path / 'p.json'}"]
    # Compiling is most of this test's time.
    small = (
        "data.contexts_per_batch=1",
        "data.questions_per_context=1",
        "mesh.data=1",
        "train.attention=dense",
        "model.vision.depth=1",
        "model.text.num_hidden_layers=2",
        "optimizer.name=adamw",
    )
    assert plan.main([*arguments, *(f"--set={setting}" for setting in small)]) == 0
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["parameter_bytes"] < written["optimizer_bytes"] <= 2.1 * written["parameter_bytes"]
    assert written["kept_bytes"] > 0
    assert written["programs"]["gradient"]["temporary_bytes"] > 0
    assert written["step_flops"] > 0
    assert "activations kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topology", "said"),
    [("v4:2x2", "'v4:2x2', expected local or one of v5e, v5p, v6e with a shape"), ("v5e:9x7x3", "'v5e:9x7x3'")],
)
def test_a_topology_that_cannot_be_is_refused(topology, said, capsys):
    assert plan.main(["--config=nsa_video", f"--topology={topology}"]) == 2
    assert said in capsys.readouterr().err
