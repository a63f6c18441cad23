"""The reader of TPU schedules and the time model, on a made-up kernel: no TPU compiler needed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu_bundles, tpu_cases, tpu_model, tpu_schedule, tpu_trips
from experiments.program_reading import read_program
from pallas_kernels import tpu
from pallas_kernels.block_selection.choice import choose_blocks

NAMES = "MXU, VALU, XLU, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
WIDTHS = "4 4 3 1 3 3 1 1 2"
BACK = "sbr.rel (!%p9) target = $region1"


def bundle(address, text="", mark="  ", region=""):
    return f" {address:#x} {mark} : > {{ {text} }} {region}".replace(" 0x0 ", "   0 ")


def made_up_kernel():
    """Loop of bundles 2..24; in it a branch 8..10 that stores, and a loop 10..19 that multiplies."""
    texts = {i: {} for i in range(27)}
    texts[2] = {"mark": "LB", "region": "/* Start region 1 */"}
    texts[3] = {"text": "%5 = sbr.rel (%p1) target = $region3"}
    texts[8] = {"region": "/* Start region 2 */"}
    texts[10] = {"mark": "PF", "region": "/* End region 2 :: Start/End empty region 3 :: Start region 4 */"}
    texts[12] = {"text": "%9 = dma.hbm_to_vmem %a"}
    texts[14] = {"text": "%6 = sbr.rel (!%p2) target = $region4"}
    texts[19] = {"text": "%p9 = scmp.ge.s32.totalorder %s5_s2, 34 /* loop exit test */  ;;  %7 = " + BACK}
    use = [[0] * 9 for _ in texts]
    use[8][1], use[9][6], use[13][0], use[15][0] = 4, 1, 4, 2
    lines = "\n".join(bundle(i, **x) for i, x in texts.items())
    rows = "\n".join(" ".join(map(str, row)) for row in use)
    return lines, f"== CAPACITY:\n{NAMES}\n{WIDTHS}\n== UTILIZATION:\n{rows}\n"


def test_loops_and_branches_are_found():
    schedule = tpu_bundles.parse_schedule("kernel", *made_up_kernel())
    (loop,) = schedule.body.inner
    assert (loop.kind, loop.start, loop.end, loop.limit) == ("loop", 2, 24, 34)
    branch, product = loop.inner
    assert (branch.kind, branch.start, branch.end, branch.computes) == ("branch", 8, 10, True)
    assert (product.kind, product.start, product.end, product.multiplies) == ("loop", 10, 19, True)
    assert product.transfers == 1
    assert loop.own == 22 - 2 - 9
    assert schedule.body.own == 27 - 22
    assert schedule.use(product, "MXU") == pytest.approx(6 / (4 * 9))
    assert schedule.static_cycles() is None
    fixed = dataclasses.replace(loop, inner=(branch, dataclasses.replace(product, limit=3)))
    fixed = dataclasses.replace(schedule, body=dataclasses.replace(schedule.body, inner=(fixed,)))
    assert fixed.static_cycles() == 5 + 34 * (11 + 2 + 3 * 9)
    assert tpu_bundles.from_json(json.loads(json.dumps(tpu_bundles.to_json(schedule)))) == schedule


def test_other_lengths_are_refused():
    lines, use = made_up_kernel()
    with pytest.raises(ValueError, match="27 bundles but utilization of 26"):
        tpu_bundles.parse_schedule("kernel", lines, use.rsplit("\n", 2)[0])


def test_time_is_bundles_by_trips_over_the_clock():
    schedule = tpu_bundles.parse_schedule("kernel", *made_up_kernel())
    chip = tpu.CHIPS["v5e"]
    work = tpu_trips.Work(steps=32, loops=(1000,), rows=4, hbm_bytes=1e6, transfers=2)
    time = tpu_model.kernel_time(schedule, work, 1, 0, chip)
    assert time.cores == 1
    assert time.compute == pytest.approx((5 + 34 * 11 + 4 * 2 + 1000 * 9) / chip.clock_hz)
    assert time.memory == pytest.approx(1e6 / chip.hbm_bytes_per_second)
    assert time.bound == "compute"
    assert time.use["MXU"] == pytest.approx(6 / 36, abs=1e-3)
    # As many steps again: the loop's own limit says that two cores share them.
    doubled = tpu_model.kernel_time(schedule, dataclasses.replace(work, steps=64), 1, 0, chip)
    assert doubled.cores == 2
    slow = tpu_model.kernel_time(schedule, dataclasses.replace(work, hbm_bytes=1e9), 1, 0, chip)
    assert slow.bound == "memory"
    assert slow.seconds == slow.memory


@pytest.mark.parametrize("loops", [(), (1, 2)])
def test_a_kernel_with_other_loops_is_refused(loops):
    schedule = tpu_bundles.parse_schedule("kernel", *made_up_kernel())
    with pytest.raises(ValueError, match=r"tpu_trips\.py"):
        tpu_model.kernel_time(schedule, tpu_trips.Work(steps=32, loops=loops), 1, 0, tpu.CHIPS["v5e"])


HLO = """HloModule jit_f

%body.1 (x: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %x = (s32[], f32[8,128]{1,0}) parameter(0)
  %kernel.2 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={kernel_metadata={
"note":"spans lines"
}}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  ROOT %tuple.1 = (s32[], f32[8,128]{1,0}) tuple(%kernel.2)
}

%cond (x.1: (s32[], f32[8,128])) -> pred[] {
  %x.1 = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%x.1), index=0
  %constant.4 = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %constant.4), direction=LT
}

ENTRY %main.3 (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %fusion = f32[8,128]{1,0:T(8,128)} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"120"}
  %loop = (s32[], f32[8,128]) while(%fusion), condition=%cond, body=%body.1
  ROOT %scatter.1 = bf16[16,128]{1,0} scatter(%fusion, %a), dimensions={0}
}
"""


def test_programs_are_read_with_their_loops():
    reading = read_program(HLO)
    kernels, operations = reading.kernels, reading.operations
    assert kernels == {"kernel.2": {"runs": 7, "vmem_bytes": 4096}}
    fusion, scatter = operations
    assert (fusion.name, fusion.runs, fusion.cycles, fusion.bytes) == ("fusion", 1, 120, 2 * 8 * 128 * 4)
    assert (scatter.cycles, scatter.bytes) == (None, 16 * 128 * 2 + 2 * 8 * 128 * 4)
    with pytest.raises(ValueError, match="loop is a loop of unknown length"):
        read_program(HLO.replace("direction=LT", "direction=EQ"))


def test_drawn_selection():
    chosen = tpu_cases.drawn_selection(1024, 0.8, block_count=4)
    own = np.arange(1024) // 64
    assert (chosen.max(1) == own).all()
    assert ((chosen >= 0).sum(1) == np.minimum(own + 1, 4)).all()
    for row in chosen[[0, 100, 1023]]:
        taken = row[row >= 0]
        assert (np.diff(taken) > 0).all()
        assert (row[len(taken) :] == -1).all()

    def union(rho):
        rows = tpu_cases.drawn_selection(2048, rho, block_count=8)[1024:].reshape(-1, 16 * 8)
        return np.mean([len(np.unique(row)) for row in rows])

    assert 8 <= union(0.98) < union(0.8) < union(0.0)


@pytest.mark.parametrize("operation", ["compressed_attention", "window_attention", "prefix_attention"])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_trips_of_flash_kernels_cover_what_is_seen(operation, kernel):
    tokens = 2048
    work = tpu_trips.flash(f"jvp_{operation}_{kernel}_.1", tokens)
    end, keys, tiles, window = tpu_trips._ends(operation, tokens)
    start = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
    key = np.arange(keys)
    seen = (key >= start[:, None]) & (key < end[:, None])
    chunk, rows = (min(x, -(-y // 128) * 128) for x, y in ((tiles.chunk, keys), (tiles.queries, len(end))))
    seen = np.pad(seen, [(0, -len(end) % rows), (0, -keys % chunk)])
    visited = seen.reshape(-1, rows, seen.shape[1] // chunk, chunk).any(axis=(1, 3)).sum()
    assert sum(work.loops) == 4 * visited


def test_trips_of_selected_attention_walk_the_lists():
    tokens, rho, tile = 4096, 0.8, tpu_trips.TILE
    chosen = tpu_cases.drawn_selection(tokens, rho).reshape(-1, tile * 32)
    unions = np.array([len(np.unique(row[row >= 0])) for row in chosen])
    plan, _ = tpu_trips.chunk_steps(tokens, "v6e", rho, 0, False)
    assert plan.chunks == 1
    steps = -(-unions // plan.step_blocks)
    # Eight tiles a grid step, and two steps more to fill and empty the pipeline.
    of_grid_steps = steps.reshape(-1, tpu_trips.TILES).sum(axis=1) + 2
    for part, steps_of_body in (("forward", 4), ("backward", 1)):
        work = tpu_trips.selected(part, tokens, "v6e", rho, 0)
        assert work.steps == 4 * len(unions) // tpu_trips.TILES
        assert work.loops[-1] == 4 * np.sum(-(-of_grid_steps // steps_of_body))


def test_queries_before_a_chunk_of_keys_take_no_steps(monkeypatch):
    small = dataclasses.replace(tpu.CHIPS["v5p"], vmem_bytes=11_500_000)
    monkeypatch.setitem(tpu.CHIPS, "v5p", small)
    tokens, rho = 2048, 0.8
    plan, steps = tpu_trips.chunk_steps(tokens, "v5p", rho, 1, True)
    assert (plan.chunks, plan.chunk_keys) == (2, 1024)
    latest = tpu_cases.drawn_selection(tokens, rho).reshape(-1, tpu_trips.TILE * tpu_trips.TILES * 32).max(axis=1)
    np.testing.assert_array_equal(steps > 0, latest >= plan.chunk_blocks)
    _, spread, walk = tpu_trips.selected("backward", tokens, "v5p", rho, 1).loops
    assert spread == 4 * tpu_trips.TILES * (steps > 0).sum()
    assert walk == 4 * (steps[steps > 0] + 2).sum()


def test_bisection_rounds_suffice_for_the_kernel():
    """As many rounds as simulated separate the best blocks, one fewer does not for some tile."""
    assert tpu_trips.bisection_rounds(20, 32) == 0
    rounds = [tpu_trips.bisection_rounds(candidates, 32) for candidates in (64, 512, 2048)]
    assert all(8 < x < 32 for x in rounds)
    # The choice that the rounds stand for is that of the operation: 31 places beside the current block.
    importance = jnp.asarray(np.random.default_rng(0).random((1, 1, 1, 64)), jnp.float32)
    options = {"block_size": 64, "block_count": 32, "init_blocks": 0, "local_blocks": 1}
    chosen = choose_blocks(importance, jnp.full((1, 1), 64 * 64 - 1), jnp.ones((1, 1), bool), **options)
    assert (np.asarray(chosen) >= 0).sum() == 32


def test_tables_stand_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- verdict -->\nold\n<!-- /verdict -->\nafter\n")
    tpu_schedule.write_between(page, "verdict", tpu_schedule.table(["a", "b"], [[1, 2]]))
    assert page.read_text() == (
        "before\n<!-- verdict -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- /verdict -->\nafter\n"
    )
    with pytest.raises(ValueError, match="has no markers <!-- kernels -->"):
        tpu_schedule.write_between(page, "kernels", "")


def test_unknown_cases_are_named():
    with pytest.raises(ValueError, match="case is 'widow forward 8192', expected OPERATION DIRECTION TOKENS"):
        tpu_cases.build("widow forward 8192")
    with pytest.raises(ValueError, match=r"kernel other\.1 is not known"):
        tpu_trips.flash("other.1", 8192)
