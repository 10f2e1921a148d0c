"""Meshes from their spelling, and the errors of those that can't be made."""

import jax
import pytest

from sharding.mesh import STAGE, TENSOR, MeshError, MeshShape, make_meshes, parse_mesh


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", MeshShape()),
        ("tensor=2", MeshShape(tensor=2)),
        ("stage=2,tensor=4", MeshShape(stage=2, tensor=4)),
        (" tensor = 4 , data = 3 ,", MeshShape(data=3, tensor=4)),
        ("data=1,stage=1,tensor=1", MeshShape()),
    ],
)
def test_spelling_is_read(text, shape):
    assert parse_mesh(text) == shape


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(2, 3, 4), MeshShape(stage=2)])
def test_shape_is_spelt_as_it_is_read(shape):
    text = str(shape)
    assert text == "one device" or parse_mesh(text) == shape


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("tensr=2", "tensr=2"),
        ("tensor", "tensor"),
        ("tensor=", "tensor="),
        ("tensor=two", "tensor=two"),
        ("tensor=-2", "tensor=-2"),
        ("tensor=²", "tensor=²"),
        ("tensor=2.0", "tensor=2.0"),
        ("tensor=1_0", "tensor=1_0"),
        ("tensor=2,tensor=2", "tensor=2"),
        ("2x4", "2x4"),
        ("tensor=2=4", "tensor=2=4"),
        ("stage=2;tensor=2", "stage=2;tensor=2"),
        ("TENSOR=2", "TENSOR=2"),
    ],
)
def test_what_is_no_mesh_is_refused_with_the_part_that_is_wrong(text, item):
    with pytest.raises(MeshError) as error:
        parse_mesh(text)
    assert repr(text) in str(error.value)
    assert f"{item!r} is not data=N, stage=N or tensor=N" in str(error.value)


@pytest.mark.parametrize("axis", ["data", "stage", "tensor"])
def test_axis_of_no_devices_is_refused(axis):
    with pytest.raises(MeshError, match=f"mesh axis {axis} is 0; it must be 1 or more"):
        parse_mesh(f"{axis}=0")


def test_replicas_take_devices_of_their_own_in_order():
    devices = jax.devices()
    meshes = make_meshes(MeshShape(data=2, stage=2, tensor=2))
    assert [dict(mesh.shape) for mesh in meshes] == [{STAGE: 2, TENSOR: 2}] * 2
    assert [device for mesh in meshes for device in mesh.devices.flat] == devices[:8]
    # Neighbours along tensor, which talk most, are neighbours among the devices.
    assert meshes[0].devices.tolist() == [devices[:2], devices[2:4]]


def test_smaller_mesh_takes_the_first_devices():
    [mesh] = make_meshes(MeshShape(tensor=2), jax.devices()[3:])
    assert mesh.devices.tolist() == [jax.devices()[3:5]]


def test_more_devices_than_there_are_is_refused_with_the_flag_that_makes_them():
    with pytest.raises(
        MeshError,
        match=r"mesh stage=2,tensor=2 takes 4 devices, there are 3 \(cpu\); "
        r"set XLA_FLAGS=--xla_force_host_platform_device_count=4",
    ):
        make_meshes(MeshShape(stage=2, tensor=2), jax.devices()[:3])


def test_flag_for_virtual_devices_is_not_offered_where_devices_are_real():
    class Gpu:
        platform = "gpu"

    with pytest.raises(MeshError, match=r"takes 2 devices, there are 1 \(gpu\)$"):
        make_meshes(MeshShape(data=2), [Gpu()])  # type: ignore
