"""Requests go to the replica with the fewest that has not failed."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from serve.engine import ModelInfo
from serve.replicas import Replicas
from serve.request import GenerateRequest

INFO = ModelInfo("m", "A", 8, 64, "float32", {"stage": 1, "tensor": 1}, 4, 16, 2, ())


@dataclass
class FakeReplica:
    busy: int = 0
    failure: BaseException | None = None
    info: ModelInfo = INFO
    taken: list[str] = field(default_factory=list[str])

    def submit(self, request: GenerateRequest, sink: Any, sending: Any = None) -> None:
        self.taken.append(request.request_id)

    def load(self) -> Any:
        return SimpleNamespace(num_running=self.busy, num_waiting=0)


def test_request_goes_to_the_replica_with_the_fewest() -> None:
    replicas = [FakeReplica(busy=2), FakeReplica(busy=1)]
    Replicas(replicas).submit(GenerateRequest("r", (1,)), lambda output: None)  # type: ignore[arg-type]
    assert [replica.taken for replica in replicas] == [[], ["r"]]


def test_failed_replica_is_not_chosen_for_looking_idle() -> None:
    replicas = [FakeReplica(failure=RuntimeError("gone")), FakeReplica(busy=9)]
    Replicas(replicas).submit(GenerateRequest("r", (1,)), lambda output: None)  # type: ignore[arg-type]
    assert [replica.taken for replica in replicas] == [[], ["r"]]
