"""What a checkpoint knows beside the weights and the optimiser's state: the content of trainer_state.json.

{"identity": fingerprint of the run's identity,
 "state": the fields of TrainState,
 "files": {name: hash} of every other file of the checkpoint,
 "checksum": fingerprint of the three}
"""

from typing import Annotated

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..runtime.files import fingerprint
from ..runtime.schema import Count, Figure, Record, reason_of


def _renamed(name: str, old_name: str) -> AliasChoices:
    """A field that checkpoints written before call by another name."""
    return AliasChoices(name, old_name)


class TrainState(BaseModel):
    """How far a run has come."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Count = 0
    """Steps done, skipped ones among them."""
    optimizer_steps: Count = Field(default=0, validation_alias=_renamed("optimizer_steps", "updates"))
    """Steps that were not skipped."""
    tokens: Count = 0
    """Predictions gone through."""
    trained_tokens: Count = 0
    """Those of them that count in the loss, where tokens are chosen."""
    skipped_in_a_row: Count = 0
    """The latest steps, if they were skipped."""
    grad_norm: Figure | None = None
    """Of the last step; None where it was not finite."""
    losses: list[Figure] = []
    """Of the steps since the last line of metrics.jsonl."""
    loss_components: list[Annotated[list[Figure], Field(min_length=2, max_length=2)]] = Field(
        default=[], validation_alias=_renamed("loss_components", "parts")
    )
    """[cross-entropy, KL divergence] of those steps, with a teacher."""
    last_logged_step: Count = Field(default=0, validation_alias=_renamed("last_logged_step", "line_step"))
    """The step of that line."""
    micro_batch_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Chosen by memory: a continued run adds up in the same order."""

    @model_validator(mode="after")
    def _no_count_is_past_the_step(self) -> "TrainState":
        if max(self.optimizer_steps, self.skipped_in_a_row, self.last_logged_step) > self.step:
            raise ValueError("a count of steps is past the step")
        return self


class _Content(Record):
    model_config = ConfigDict(extra="forbid")

    identity: str
    state: TrainState
    files: dict[str, str]
    checksum: str | None = None


def state_to_json(identity: str, state: TrainState, files: dict[str, str]) -> dict:
    """The content of trainer_state.json.

    Args:
        identity: fingerprint of the run's identity.
        files: hash of every other file of the checkpoint, by its name.
    """
    content = {"identity": identity, "state": state.model_dump(), "files": files}
    return {**content, "checksum": fingerprint(content)}


def state_from_json(content: object) -> tuple[str, TrainState, dict[str, str]]:
    """(identity, state, files), as state_to_json takes them.

    Checkpoints from before there was a checksum have none; of theirs only what cannot be is noticed.

    Raises:
        ValueError: the content is not as it was written; the text says why, in one line.
    """
    try:
        found = _Content.model_validate(content)
    except ValidationError as error:
        raise ValueError(reason_of(error)) from None
    if found.checksum is not None and isinstance(content, dict):
        written = {key: value for key, value in content.items() if key != "checksum"}
        if found.checksum != fingerprint(written):
            raise ValueError("its checksum is that of another content")
    return found.identity, found.state, found.files
