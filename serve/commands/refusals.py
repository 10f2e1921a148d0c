"""The exceptions that are a user's to mend, which end a command with their message alone."""

from model.chat import ChatTemplateError
from model.checkpoint import CheckpointError
from model.families import UnsupportedModel
from serve.config import ConfigError
from serve.errors import RequestError
from sharding.mesh import MeshError

USAGE = (ConfigError,)
REFUSED = (
    *USAGE,
    ChatTemplateError,
    CheckpointError,
    MeshError,
    OSError,
    RequestError,
    UnsupportedModel,
)
