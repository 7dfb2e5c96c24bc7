"""One device and every mesh of eight give the same step; what they tell each other is asserted."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from hirescam_jax.devices import mesh as sharding
from hirescam_jax.devices.layout import Layout, Share
from hirescam_jax.devices.mesh import make_mesh
from hirescam_jax.errors import UserError
from hirescam_jax.models import AxialNet
from hirescam_jax.models.contract import head_of, own_parameters, training_features
from hirescam_jax.models.heads import depth_mean
from hirescam_jax.models.layers import BatchNorm
from hirescam_jax.training.costs import collectives, largest_batch

PROGRAM = Path(__file__).parent / "mesh_program.py"
MESHES = ("8,1", "4,2", "2,4", "1,8")
Results = dict[str, dict[str, np.ndarray]]


def run_program(folder: Path, *arguments: str) -> Results:
    """mesh -> name -> array, from a process with eight CPU devices."""
    out = folder / "results.npz"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    if "float64" in arguments:  # compiles faster; rounding hardly matters
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, PROGRAM, out, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: Results = {}
    with np.load(out, allow_pickle=False) as arrays:
        for key in arrays.files:
            mesh, name = key.split("/", 1)
            results.setdefault(mesh, {})[name] = arrays[key]
    return results


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference of each array, relative to its largest value."""
    assert a.keys() == b.keys()
    worst = {}
    for name in a:
        assert a[name].shape == b[name].shape, name
        x, y = a[name].astype(np.float64), b[name].astype(np.float64)
        assert np.isfinite(x).all(), name
        worst[name] = float(np.abs(x - y).max(initial=0) / max(np.abs(x).max(initial=0), 1e-30))
    return worst


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("axialnet-max", "conv3d")]


@pytest.fixture(scope="module", params=["axialnet", *LONG])
def exact(request, tmp_path_factory) -> tuple[str, Path, Results]:
    """A model, and its step in float64 on one device and on every mesh: programs and results."""
    folder = tmp_path_factory.mktemp(request.param)
    meshes = MESHES if request.param != "axialnet-max" else ("2,4",)
    return request.param, folder, run_program(folder, request.param, "float64", "1", *meshes)


@pytest.mark.slow
def test_every_mesh_gives_the_step_of_one_device(exact):
    """Losses, maps, gradients (SGD's momentum after one step), parameters, BatchNorm statistics.

    In float64 the sums differ by their order alone: 1e-12 is some thousand roundings, and far less
    than any volume, slice or padding that is counted wrong would make.
    """
    _, _, results = exact
    assert float(results["1"]["['metrics']['mask_loss']"]) > 0
    for mesh in results:
        for name, error in distance(results["1"], results[mesh]).items():
            assert error < 1e-12, (mesh, name, error)


@pytest.mark.slow
def test_each_gradient_is_summed_once_and_nothing_else_is_large(exact):
    """The compiled steps exchange sums, and where slices are split those that a flip moves (int16,
    with their small masks): no gather, no halos (cells along the depth do not overlap)."""
    model, folder, results = exact
    shapes = {
        "axialnet": [(3, 3, 3, 4), (3, 3, 4, 4), (3, 3, 4, 4), (3, 3, 4, 8), (3, 3, 8, 8),
                     (1, 1, 4, 8), (3, 3, 8, 6), (96, 5)],
        "axialnet-max": [(3, 3, 3, 4), (3, 3, 4, 4), (3, 3, 4, 4), (3, 3, 4, 6), (384, 5)],
        "conv3d": [(3, 3, 3, 1, 4), (3, 3, 3, 4, 6), (1, 1, 1, 6, 5), (135, 8), (8, 6), (6, 5)],
    }[model]  # fmt: skip
    for mesh in results.keys() - {"1"}:
        data, depth = map(int, mesh.split(","))
        program = collectives((folder / f"{mesh}.hlo").read_text())
        moved = [e for e in program if e.kind == "collective-permute"]
        sums = [e for e in program if e.kind == "all-reduce"]
        assert len(moved) + len(sums) == len(program)
        assert bool(moved) == (depth > 1)
        assert {dtype for e in moved for dtype, _ in e.arrays} <= {"s16", "u8"}
        assert all(e.devices in {data, depth, 8} for e in sums)
        summed = Counter(shape for e in sums for _, shape in e.arrays)
        # What acts behind the sum over the depth is whole on each device.
        behind = {"axialnet": {(96, 5)}, "conv3d": {(8, 6), (6, 5)}}.get(model, set())
        kernels = [s for s in shapes if data > 1 or s not in behind]
        assert {s: summed[s] for s in kernels} == Counter(kernels), mesh
        # Statistics, means over slices and losses are small.
        rest = summed - Counter(kernels)
        assert sum(np.prod(s, dtype=int) * n for s, n in rest.items()) < 2000, mesh


@pytest.mark.slow
@pytest.mark.parametrize("name", ["renamed", "gated"])
def test_gradients_do_not_depend_on_names_or_on_what_is_behind_the_depth(tmp_path, name):
    """What is summed is not told by the network: other names, layers behind the depth among the
    features too."""
    results = run_program(tmp_path, name, "float64", "1", "2,4")
    trace = [n for n in results["1"] if "trace" in n and "kernel" in n]
    assert any(part in n for n in trace for part in ("classifier", "gate"))
    assert all(results["1"][n].any() for n in trace)
    for label, error in distance(results["1"], results["2,4"]).items():
        assert error < 1e-12, (label, error)


@pytest.mark.slow
def test_a_network_without_a_depth_unit_has_its_batch_on_several_devices(tmp_path):
    results = run_program(tmp_path, "bare", "float64", "1", "8,1")
    assert float(results["1"]["['metrics']['mask_loss']"]) > 0
    for label, error in distance(results["1"], results["8,1"]).items():
        assert error < 1e-12, (label, error)


@pytest.mark.long
def test_meshes_in_float32_are_as_near_to_float64_as_one_device(exact, tmp_path):
    """How far float32 is from float64 on one device is what rounding does to this step; on a mesh
    the sums have other orders, with an error of the same size: at most four times the largest."""
    model, _, results = exact
    if model != "axialnet":
        pytest.skip("one model tells")
    single = run_program(tmp_path, model, "float32", "1", "4,2", "1,8")
    rounding = max(distance(results["1"], single["1"]).values())
    assert rounding < 1e-5
    for mesh in single:
        for name, error in distance(results["1"], single[mesh]).items():
            assert error < 4 * rounding, (mesh, name, error, rounding)


@pytest.mark.long
def test_micro_batches(tmp_path):
    """Without BatchNorm the mean over parts is the mean over the batch; with it, the parts are the
    same on every mesh."""
    plain = run_program(tmp_path, "conv3d-plain", "float64", "1x1", "2,4x4")
    normed = run_program(tmp_path, "axialnet", "float64", "4,2x2", "1,8x2")
    for a, b in (plain.values(), normed.values()):
        for name, error in distance(a, b).items():
            assert error < 1e-12, (name, error)


ABSTRACT = AbstractMesh((2, 4), ("data", "depth"), axis_types=(AxisType.Auto,) * 2)


def traced(function, cells: int, shape: tuple[int, ...]) -> str:
    """The program of `function` on two volumes a device, each with 3 of 12 feature cells, of which
    `cells` are real."""

    def part(x):
        with sharding.volume_of(2, 3, cells):
            return function(x)

    return str(jax.make_jaxpr(on_abstract_mesh(part))(jnp.zeros(shape)))


def on_abstract_mesh(function):
    specs = PartitionSpec("data", "depth"), PartitionSpec(("data", "depth"))
    return jax.shard_map(function, mesh=ABSTRACT, in_specs=specs[0], out_specs=specs[1])


def test_a_cache_never_gives_a_program_of_another_number_of_cells():
    """The same functions are traced in a row; JAX and Flax keep what they have traced."""
    pooled = jax.jit(depth_mean)
    model = AxialNet(3, (1,), (4,), "small", (), pool="max", remat=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9, 8, 8)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)

    def loss(x):
        def one(total, x):
            features, _ = training_features(model, zeros, x, jax.random.key(0))
            return total + head_of(model, zeros)(features).sum(), None

        return jax.grad(lambda x: jax.lax.scan(one, pooled(x).sum(), x[None])[0])(x).sum((1, 2, 3))

    def program(cells: int) -> str:
        return traced(loss, cells, (4, 36, 8, 8))

    first, other, again = program(10), program(11), program(10)
    jax.clear_caches()
    fresh = program(11)
    assert first == again
    assert other == fresh
    assert first != other


def norm(x):
    return BatchNorm().init_with_output(jax.random.key(0), x, True)[0].sum(range(1, x.ndim))


@pytest.mark.parametrize(
    ("function", "shape", "line"),
    [
        (norm, (4, 12, 5), r"\(2, 3, 5\) is neither images .* nor volumes .* with B = 2"),
        (norm, (4, 20, 5, 5, 1), "5 places along the depth, on a device that has 3 feature cells"),
        (depth_mean, (4, 20, 5), "5 places along the depth, on a device that has 3 feature cells"),
    ],
)
def test_what_is_padding_is_known_or_refused(function, shape, line):
    with pytest.raises(ValueError, match=line):
        traced(function, 10, shape)


@pytest.mark.parametrize(
    ("function", "shape"), [(depth_mean, (4, 12, 5)), (norm, (4, 12, 5, 5, 1))]
)
def test_a_split_depth_without_its_number_of_cells_is_refused(function, shape):
    with pytest.raises(ValueError, match=r"enter `mesh\.volume_of` first"):
        jax.make_jaxpr(on_abstract_mesh(function))(jnp.zeros(shape))


def test_a_head_that_leaves_the_slices_apart_is_refused():
    class Apart(AxialNet):
        def head(self, features, train=False):
            return features.mean((1, 2, 3))

    model = Apart(3, (1,), (3,), "small", ())
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9, 8, 8)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables)

    def own(volumes):
        own_parameters(model, zeros, volumes, jax.random.key(0))
        return volumes.sum((1, 2, 3))

    with pytest.raises(ValueError, match="the head of Apart has other logits on each device"):
        traced(own, 10, (4, 36, 8, 8))


HLO = """
  %a = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,2},{1,3}}, to_apply=%s
  %b = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%s
  %c = s16[5,2]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %d = s16[5,2]{1,0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}
  %e = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], op_name="jit(f)/g"
  %f = f32[4]{0} add(%x, %y)
  %g = f32[4]{0} all-reduce(%x), replica_groups=mesh['data'=4,'depth'=2] {'depth'}, to_apply=%s
  %h = f32[4]{0} all-reduce(%x), replica_groups=mesh['data'=4,'depth'=1] {'depth'}, to_apply=%s
"""


def test_exchanges_are_read_from_a_program():
    first, second, third, fourth = collectives(HLO)
    assert (fourth.kind, fourth.devices, fourth.payload) == ("all-reduce", 2, 16)
    assert (first.kind, first.devices, first.payload) == ("all-reduce", 2, 4 * 4 + 6 * 2)
    assert first.sent == first.payload  # twice, of half
    assert (second.kind, second.payload, second.sent) == ("collective-permute", 20, 20)
    assert (third.kind, third.devices, third.payload) == ("all-gather", 4, 16)


@pytest.mark.parametrize("memory", [lambda b: 100 + 7 * b, lambda b: 100 + 7 * b + b // 3 * 5])
@pytest.mark.parametrize("limit", [50, 116, 200, 999, 12345])
@pytest.mark.parametrize("step", [1, 4])
def test_largest_batch_is_that_of_a_search(memory, limit, step):
    fitting = [b for b in range(step, 3000, step) if memory(b) <= limit]
    assert largest_batch(memory, step, limit) == max(fitting, default=0)


# -- bad input ------------------------------------------------------------------------------------


class Device:
    """Stands for a device of a process: of a GPU cluster, where JAX makes a slice of each host, or
    of a TPU pod, which has coordinates."""

    platform, device_kind, core_on_chip = "gpu", "NVIDIA H100 80GB HBM3", 0

    def __init__(
        self, process_index: int, id: int = 0, coords: tuple[int, ...] | None = None, **more: str
    ):
        self.process_index, self.id = process_index, id
        self.slice_index = process_index if coords is None else 0
        self.client = self
        if coords is not None:
            self.coords = coords
            self.platform, self.device_kind = "tpu", more["kind"]


def layout_of(processes: list[list[int]], batch: int = 8, micro_batches: int = 1) -> Layout:
    """On a mesh of devices that belong to these processes."""
    mesh = Mesh(np.array([[Device(p) for p in row] for row in processes]), ("data", "depth"))
    return Layout(mesh, batch, (30, 16, 16), (10, 4, 4), 3, micro_batches)


def test_a_mesh_that_does_not_fit_the_devices():
    with pytest.raises(UserError, match=r"depth_devices = 4 does not divide the 6 .* 1, 2, 3, 6"):
        make_mesh(4, [None] * 6)
    with pytest.raises(UserError, match="depth_devices = 0"):
        make_mesh(0)


def gpus(hosts: int) -> list[Device]:
    return [Device(i // 8, i) for i in range(8 * hosts)]


def tpus(kind: str, x: int, y: int, host_x: int, host_y: int) -> list[Device]:
    """A pod slice of x by y chips, of which a host has host_x by host_y."""
    places = [(i, j) for j in range(y) for i in range(x)]
    processes = [j // host_y * (x // host_x) + i // host_x for i, j in places]
    both = zip(places, processes, strict=True)
    return [Device(p, n, (*at, 0), kind=kind) for n, (at, p) in enumerate(both)]


PODS = {
    "2 hosts of 8 GPUs": gpus(2),
    "4 hosts of 8 GPUs": gpus(4),
    "v5e 4x4": tpus("TPU v5 lite", 4, 4, 2, 2),
    "v5e 8x8": tpus("TPU v5 lite", 8, 8, 2, 2),
    "v6e 8x8": tpus("TPU v6 lite", 8, 8, 2, 2),
}


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("pod", PODS)
def test_each_host_has_a_block_of_the_mesh(monkeypatch, pod, depth):
    """And all hosts together load each slice of each volume of a batch once."""
    devices = list(np.random.default_rng(0).permutation(PODS[pod]))
    hosts = 1 + max(device.process_index for device in devices)
    mesh = make_mesh(depth, devices)
    assert dict(mesh.shape) == {"data": len(devices) // depth, "depth": depth}
    assert set(mesh.devices.flat) == set(devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: len(devices) // hosts)
    layout = Layout(mesh, 2 * len(devices), (24, 16, 16), (8, 4, 4), 3)
    loaded = np.zeros((layout.batch_size, layout.padded_shape[0]), int)
    for host in range(hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        share = dataclasses.replace(layout).share  # it is kept
        loaded[list(share.rows), slice(*(share.slices or (None,)))] += 1
    assert (loaded == 1).all()


@pytest.mark.parametrize(
    ("data", "micro", "line"),
    [(3, 1, "over 3 devices: use a multiple of 3"), (4, 4, "in 4 micro-batches: use a multiple")],
)
def test_a_batch_that_does_not_divide(data, micro, line):
    with pytest.raises(UserError, match=line):
        layout_of([[0]] * data, 8, micro)


def test_devices_of_a_process_must_make_a_block():
    layout = layout_of([[0, 1], [0, 0]])
    with pytest.raises(UserError, match="cuts the devices of process 0 apart"):
        _ = layout.share


def test_shares_follow_the_devices():
    """Volume i of part a is the same on every mesh; slices are padded to whole cells."""
    layout = layout_of([[0] * 4] * 2, micro_batches=2)
    assert layout.share == Share(8, (0, 1, 4, 5, 2, 3, 6, 7), (0, 36), (0, 12))
    assert layout.padded_shape == (36, 16, 16)
    assert layout_of([[1, 1, 0, 0]] * 2).share == Share(8, tuple(range(8)), (18, 36), (6, 12))
    assert layout_of([[1], [0]]).share == Share(8, (4, 5, 6, 7))
