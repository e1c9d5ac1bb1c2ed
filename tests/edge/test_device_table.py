"""The table of a device with an agent: like a local one, resumed after the agent died, read by a search."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.test_agent import TOKEN, Device

from slimray.arch import Arch, Dimension, Space
from slimray.edge import hardware, latency_table, profiler, remote
from slimray.edge.runtimes import Reading
from slimray.models.supernets.ofa_mobilenet import MOBILENETV3_TINY, MobileLayout, MobileStage
from slimray.models.supernets.supernet import Supernet, input_dimensions
from slimray.runtime import agent
from slimray.search.strategies import Evolution
from slimray.search.strategies import search as search_in_process
from slimray.spec import RunFailed, UserError
from slimray.verbs import search
from slimray.verbs.search import TargetSpec

pytestmark = pytest.mark.timeout(900)  # a table exports about thirty networks

SIDE = 8
SETTINGS = {"resolutions": [SIDE], "rounds": 2, "calibrate": 4}
MODEL = {"name": "one stage"}


@dataclass(frozen=True)
class OneBlock(MobileLayout):
    """One block with two kernels and two widths: few networks to export."""

    def space(self) -> Space:
        genes = {"kernel": Dimension.per_block([(3, 5)]), "expand": Dimension.per_block([(3, 4)])}
        depth = super().space().dimensions["depth"]
        return Space.of(genes | {"depth": depth} | input_dimensions(self.resolution, 0))

    def cover(self) -> Iterable[Arch]:
        return [self.space().arch({"kernel": one, "expand": other}) for one, other in product((3, 5), (3, 4))]


@pytest.fixture(scope="module")
def net() -> Supernet:
    given = {field.name: getattr(MOBILENETV3_TINY, field.name) for field in fields(MOBILENETV3_TINY)}
    given |= {"stages": (MobileStage(16, 2, "relu", depths=(1,)),), "num_classes": 3, "resolution": 11, "expand": 0}
    net = Supernet(OneBlock(**given)).eval()
    assert net.space.largest()["resolution"] == net.space.smallest()["resolution"] == SIDE
    return net


@pytest.fixture(scope="module")
def token() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(agent.TOKEN_VARIABLE, TOKEN)
        yield


@pytest.fixture(scope="module")
def cut_off(net, token, tmp_path_factory) -> tuple[Path, str]:
    """A table whose agent was killed in the second round, and the error message."""
    path, device = tmp_path_factory.mktemp("tables") / "device.json", Device()
    there, asked, rounds = remote.runtime(remote.connect(device.url)), list[int](), list[int]()

    def read(*given) -> Reading:
        asked.append(1)
        if rounds and len(asked) == rounds[0] + 3:
            device.process.kill()
        return there.reading(*given)  # type: ignore[misc]

    def say(text: str) -> None:
        if text.startswith("1/2 rounds"):
            rounds.append(len(asked))

    with pytest.raises(RunFailed) as failed:
        profile(net, path, replace(there, reading=read), say=say)
    device.process.wait()
    return path, str(failed.value)


def profile(net, path: Path, runtime, **options) -> latency_table.LatencyTable:
    return profiler.profile(net, MODEL, path, hardware=remote.HARDWARE, runtime=runtime, **SETTINGS, **options)


@pytest.fixture(scope="module")
def finished(net, cut_off, token) -> tuple[latency_table.LatencyTable, Path, latency_table.LatencyTable]:
    """The table after the same command resumed with another agent, its file, and the table before."""
    before, device = latency_table.read_table(cut_off[0]), Device()
    try:
        return profile(net, cut_off[0], remote.runtime(remote.connect(device.url))), cut_off[0], before
    finally:
        device.end()


def test_an_agent_that_dies_costs_the_round_under_way_and_the_same_command_goes_on(cut_off, finished):
    assert "the agent does not respond" in cut_off[1]
    assert "repeat the command" in cut_off[1]
    table, _, before = finished
    assert (before.done, before.calibration, table.done) == (1, None, 2)
    assert len(before.conditions) == 1
    for key, unit in before.units.items():
        assert table.units[key].readings_ms[:1] == unit.readings_ms
        assert table.units[key].count == 2
    assert table.reference_ms[:1] == before.reference_ms


def test_a_table_that_was_cut_off_is_no_hardware(net, cut_off, tmp_path):
    copy = tmp_path / "cut.json"
    table = latency_table.read_table(cut_off[0])
    latency_table.write_table(table.model_copy(update={"calibration": None, "done": 1}), copy)
    with pytest.raises(UserError, match=r"its measurement is not finished \(1 of 2 rounds\)"):
        hardware.meter(str(copy))


@pytest.mark.benchmark  # one more table
def test_operators_take_on_a_device_that_is_this_machine_what_they_take_here(net, finished, tmp_path):
    device = finished[0]
    local = profiler.profile(net, MODEL, tmp_path / "local.json", hardware="cpu-onnx", **SETTINGS)
    assert set(device.units) == set(local.units) == set(net.all_units([SIDE]))
    assert (device.device, device.threads) == (local.device, local.threads)
    assert [one.arch for one in device.subnets] == [one.arch for one in local.subnets]
    ratios = [unit.ms / local.units[key].ms for key, unit in device.units.items()]
    assert 1 / 3 < np.median(ratios) < 3  # near 1: `make bench ONLY=agent`


def test_a_search_takes_its_latencies_from_the_table_of_a_device(net, finished, tmp_path):
    measured, path = finished[0], tmp_path / "known.json"
    assert measured.calibration is not None  # its slope is meaningless for networks as small as these
    known = measured.calibration.model_copy(update={"fixed_ms": 0.25, "slope": 2.0})
    table = measured.model_copy(update={"calibration": known})
    latency_table.write_table(table, path)
    spec = TargetSpec(name="board", hardware=str(path), limits={"latency_ms": 1e9})
    prices = search._prices(net, {"kind": "images"}).on(search._meter(spec))
    assert remote.HARDWARE in prices.meter.source
    smallest, largest = (prices.metered(arch)["latency_ms"] for arch in (net.space.smallest(), net.space.largest()))
    for arch, said in ((net.space.smallest(), smallest), (net.space.largest(), largest)):
        units = sum(table.units[unit.key].ms for unit in net.units(arch))
        assert said == pytest.approx(0.25 + 2 * units)
    asked = spec.model_copy(update={"limits": {"latency_ms": (smallest + largest) / 2}})
    problem = search._problem(prices, asked, Evolution(population=6, iterations=2))
    found = search_in_process(
        problem, Evolution(population=6, iterations=2), lambda codes: np.zeros(len(codes)), seed=0
    )
    assert len(found) > 0
    assert (found.costs["latency_ms"] <= asked.limits["latency_ms"]).all()
    with pytest.raises(UserError, match="does not provide it"):
        search._problem(prices, spec.model_copy(update={"limits": {"energy_mj": 1}}), Evolution(population=6))
