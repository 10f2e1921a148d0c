import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from plan import described
from plan.compiled import Kind, examine
from plan.described import CompilerMissing, compile_described, described_mesh
from sharding.mesh import MeshError, MeshShape


def test_a_mesh_larger_than_a_host_is_refused():
    with pytest.raises(MeshError, match=r"stage=4,tensor=4 takes 16 devices; .* has 8"):
        described_mesh(MeshShape(stage=4, tensor=4))


def test_without_the_compiler_an_error_says_what_to_install(monkeypatch):
    def missing(*args, **options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    described._devices.cache_clear()
    with pytest.raises(CompilerMissing, match=r"not implemented for cuda; .*'weft\[aot\]'"):
        described_mesh(MeshShape())


def test_a_function_is_compiled_for_devices_that_are_not_there():
    try:
        mesh = described_mesh(MeshShape(tensor=2))
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    function = jax.jit(lambda x: (x @ x.T).astype(jnp.bfloat16), in_shardings=sharding)
    argument = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    program = examine(compile_described(function, (argument,), (sharding,)))
    assert program.argument_bytes == 256 * 512
    assert len(program.of(Kind.COLLECTIVE)) == 1
