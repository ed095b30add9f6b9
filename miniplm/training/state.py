"""What a checkpoint knows beside the weights and the optimiser's state: the content of trainer_state.json.

{"identity": fingerprint of the run's identity,
 "state": the fields of TrainState,
 "files": {name: hash} of every other file of the checkpoint,
 "checksum": fingerprint of the three}
"""

import dataclasses
import math

from ..runtime.files import fingerprint

# Names of TrainState's fields in checkpoints that were written before they had today's.
RENAMED = {"updates": "optimizer_steps", "parts": "loss_components", "line_step": "last_logged_step"}


@dataclasses.dataclass
class TrainState:
    """How far a run has come."""

    step: int = 0  # steps done, skipped ones among them
    optimizer_steps: int = 0  # steps that were not skipped
    tokens: int = 0  # predictions gone through
    skipped_in_a_row: int = 0
    grad_norm: float | None = None  # of the last step; None where it was not finite
    # Of the steps since the last line of metrics.jsonl; with a teacher also [cross-entropy, KL divergence].
    losses: list[float] = dataclasses.field(default_factory=list)
    loss_components: list[list[float]] = dataclasses.field(default_factory=list)
    last_logged_step: int = 0  # the step of that line
    micro_batch_tokens: int | None = None  # chosen by memory: a continued run adds up in the same order


def state_to_json(identity: str, state: TrainState, files: dict[str, str]) -> dict:
    """The content of trainer_state.json.

    Args:
        identity: fingerprint of the run's identity.
        files: hash of every other file of the checkpoint, by its name.
    """
    content = {"identity": identity, "state": dataclasses.asdict(state), "files": files}
    return {**content, "checksum": fingerprint(content)}


def state_from_json(content: object) -> tuple[str, TrainState, dict[str, str]]:
    """(identity, state, files), as state_to_json takes them.

    Checkpoints from before there was a checksum have none; of theirs only what cannot be is noticed.

    Raises:
        ValueError: the content is not as it was written; the text says why.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    content = dict(content)
    checksum = content.pop("checksum", None)
    if content.keys() != {"identity", "state", "files"}:
        raise ValueError(f"its keys are {', '.join(sorted(content))[:80]}")
    if checksum is not None and checksum != fingerprint(content):
        raise ValueError("its checksum is that of another content")
    identity, values, files = content["identity"], content["state"], content["files"]
    if not isinstance(identity, str) or not isinstance(files, dict):
        raise ValueError("its identity is no text, or its files are no object")
    if not all(isinstance(content_hash, str) for content_hash in files.values()):
        raise ValueError("a file in it has no hash")
    return identity, _train_state(values), files


def _train_state(values: object) -> TrainState:
    if not isinstance(values, dict):
        raise ValueError("its state is no object")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    if unknown := values.keys() - {field.name for field in dataclasses.fields(TrainState)}:
        raise ValueError(f"its state has a field {min(unknown)[:80]!r}")
    state = TrainState(**values)
    earlier = (state.optimizer_steps, state.skipped_in_a_row, state.last_logged_step)
    if not all(map(_is_count, (state.step, state.tokens, *earlier))) or max(earlier) > state.step:
        raise ValueError("a number of steps or tokens in it cannot be")
    chosen = state.micro_batch_tokens
    if chosen is not None and not (_is_count(chosen) and chosen > 0):
        raise ValueError("its micro_batch_tokens cannot be")
    components = state.loss_components
    if not (
        (state.grad_norm is None or _are_finite([state.grad_norm]))
        and _are_finite(state.losses)
        and isinstance(components, list)
        and all(_are_finite(pair) and len(pair) == 2 for pair in components)
    ):
        raise ValueError("a loss or a gradient norm in it cannot be")
    return state


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_finite(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) in (int, float) and math.isfinite(value) for value in values
    )
