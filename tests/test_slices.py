"""Several slices: how a mesh lies over them, and what crosses the network between them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import test_plan

from l2s_jax.cluster import sharding
from l2s_jax.cluster.chips import CHIPS
from l2s_jax.cluster.granules import Numbered
from l2s_jax.plan import command, costs, hlo, programs, target
from l2s_jax.plan.groups import groups_of
from l2s_jax.plan.models import make_plan
from l2s_jax.plan.program import shard_bytes
from l2s_jax.plan.slices import open_slice
from l2s_jax.plan.stages import trainings_of

SLICES = {"slices": 2, "process_is_granule": False}


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as its place in a mesh depends on."""

    process_index: int
    platform: str = "tpu"
    device_kind: str = "cpu"  # no chip whose place among others counts


def devices_of(*slices: int) -> list[Numbered]:
    return [Numbered(Device(i), index) for i, index in enumerate(slices)]


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        ({"data": 2, "fsdp": 4}, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"data": 4, "tensor": 2}, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ({"data": -1}, [[0], [2], [4], [6], [1], [3], [5], [7]]),
    ],
)
def test_each_slice_is_a_part_of_data(sizes, order):
    """The slices' devices come in turns; the mesh has one slice after the other."""
    devices = [Numbered(device, i % 2) for i, device in enumerate(jax.devices())]
    mesh = sharding.make_mesh({**sizes, **SLICES}, devices)
    rows = mesh.devices.reshape(mesh.shape["data"], -1)
    assert [[device.id for device in row] for row in rows] == order


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"slices": 2}, None, "cpu devices are of no slice .* config.mesh.process_is_granule=True"),
        ({"slices": 3}, devices_of(0, 0, 1, 1), "4 devices, 2 of slice 0, 2 of slice 1; expected"),
        ({"slices": 2}, devices_of(0, 0, 1), "3 devices, 2 of slice 0, 1 of slice 1; expected"),
        (
            {"slices": 1},
            devices_of(0, 1),
            "config.mesh.slices=1: there are 2 devices, 1 of slice 0",
        ),
        (
            {"slices": 2, "process_is_granule": True},
            None,
            "8 devices, 8 of process 0; expected so many slices",
        ),
        (
            {"slices": 2, "data": 1, "tensor": 4},
            devices_of(0, 0, 1, 1),
            "2 slices split data, expected a multiple of 2 there, as in data=2, fsdp=1, tensor=2",
        ),
    ],
)
def test_other_slices_are_refused(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh({"data": -1, **sizes}, devices)


def test_training_sends_gradients_alone_between_slices(monkeypatch):
    """8 devices, 2 slices: what the replica groups of the compiled step say."""
    config = test_plan.small_config(data=2, fsdp=4, slices=2)
    where = open_slice("cpu:8*2")
    mesh = command.make_mesh(config, where)
    texts = []

    def read(text, per_slice, **settings):
        texts.append(text)
        return hlo.collectives(text, per_slice, **settings)

    monkeypatch.setattr(target, "collectives", read)
    models = make_plan(config, "cpu")
    work = next(one.work for one in trainings_of(config) if one.stage == "l2s")
    compiler = programs.Compiler(models, config, where, mesh, work)
    ((_, program),) = compiler.compile(("train",))
    assert program.costs
    # Asked of the groups themselves, in another way than a plan does.
    crossing, bytes_crossing = set(), 0
    for name, instructions in hlo.parsed(texts[0])[0].items():
        for one in instructions:
            groups = groups_of(one.line)
            if one.kind in hlo.KINDS and any(min(g) < 4 <= max(g) for g in groups):
                crossing.add((name, one.kind))
                bytes_crossing += hlo.size_of(one.shape)
    assert {kind for _, kind in crossing} == {"all-reduce"}
    found = [one for one in program.costs.collectives if one.slices == 2]
    assert sum(one.bytes for one in found) == bytes_crossing
    # What fsdp splits crosses as the device's part, the rest as a whole. A table's gradient may
    # cross once for each of its three uses, and that of a relative bias before its buckets [N T T]
    # are added up. Losses and counts are some numbers. Activations would be 4096 bytes each.
    placed = jax.tree.leaves(compiler.target.placed(models.adapted[1]))
    gradients = sum(map(shard_bytes, placed))
    tables = max(map(shard_bytes, placed)) * 2
    biases = 2 * 4 * 2 * 16 * 16
    assert gradients / 2 < bytes_crossing <= gradients + tables + biases + 64
    report = costs.program_report(program, where)
    assert report["dcn"]["collectives"] == {
        "all-reduce": {"count": len(found), "bytes": bytes_crossing}
    }
    assert set(report["collectives"]) > {"all-gather"}


def test_a_tpus_transfers_between_slices_are_read_from_text():
    send, recv = (
        f"  %{kind} = (f32[{shape}]{{0}}, u32[], token[]) {kind}(%x), channel_id={i}, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="a_0",'
        '_xla_megascale_target="{1,2,3,4}x{0:15}",_xla_megascale_transfer_type="ALL_GATHER"}'
        for i, (kind, shape) in enumerate((("send", 256), ("recv", 1024)))
    )
    text = f"ENTRY %main (x: f32[256]) -> f32[1] {{\n{send}\n{recv}\n}}\n"
    (one,) = hlo.collectives(text, per_slice=16)
    assert one == hlo.Collective("all-gather", 4096, 4, 1, 4)
    assert (one.sent, one.sent_over_dcn) == (0, 3072)


@pytest.mark.parametrize(
    ("kind", "group", "sent", "between"),
    [
        # Within a slice of 4: a reduce-scatter and an all-gather. Between 2, each its quarter.
        ("all-reduce", 8, 2 * 3 / 4 * 800, 2 * 1 / 2 * 200),
        ("all-reduce", 2, 0, 2 * 1 / 2 * 800),
        ("all-gather", 8, 3 / 4 * 800, 1 / 2 * 200),
        ("collective-permute", 2, 0, 800),
    ],
)
def test_what_a_collective_over_slices_sends(kind, group, sent, between):
    one = hlo.Collective(kind, 800, group, 1, 2)
    assert (one.sent, one.sent_over_dcn) == (sent, between)


def test_a_plan_for_two_tpu_slices_has_the_time_between_them(tmp_path):
    config = test_plan.small_config(data=2, fsdp=4, slices=2)
    report = test_plan.planned(config, tmp_path, "v5e:2x2*2", programs=("encode",))
    assert (report["chips"], report["slices"]) == (8, 2)
    assert report["chip"]["dcn_bytes_per_s"] == CHIPS["v5e"].dcn == 3.125e9
    encode = report["programs"]["encode"]
    assert encode["dcn"] == {"collectives": {}, "bytes_sent": 0} and encode["dcn_ms"] == 0
    assert "Between its 2 slices a chip sends 3.125 GB/s" in (tmp_path / "plan.md").read_text()


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v5p:4x4x4", "v5p:4x4x4*2"])
def test_an_axis_may_lie_along_a_part_of_the_slices_own(topology):
    """8 is not a product of 4s."""
    where = open_slice(topology)
    mesh = sharding.make_mesh({"data": -1, "tensor": 8, "slices": where.slices}, where.devices)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in where.devices}
    for row in mesh.devices.reshape(-1, 8):
        places = np.array([device.coords for device in row])
        assert len({getattr(device, "slice_index", 0) for device in row}) == 1
        assert sorted(np.ptp(places, axis=0) + 1)[-2:] == [2, 4]  # neighbours
