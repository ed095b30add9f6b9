"""Values from outside (JSON that anyone may have changed) against a schema, with errors of one line."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from .errors import UserError

MAX_SHOWN = 200  # letters of a reason; names in it come from outside too

Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = FiniteFloat | Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Record(BaseModel):
    """A JSON object with at least these keys. Types are exact: "1" and true are no numbers, but 1 is a
    float."""

    model_config = ConfigDict(strict=True, frozen=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(schema: type[AnyRecord], value: object, what: str, remedy: str) -> AnyRecord:
    """`value` as a record of the schema.

    Raises:
        UserError: "`what` (place: reason): `remedy`" for the first place that does not fit.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{what} ({reason_of(error)}): {remedy}") from None


def reason_of(error: ValidationError) -> str:
    """The first place that does not fit and why, in one line."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = "an object is expected" if first["type"] == "model_type" else first["msg"]
    reason = f"{place}: {message}" if place else message
    return " ".join(reason.split())[:MAX_SHOWN]
