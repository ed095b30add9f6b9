"""Values from outside (JSON that anyone may have changed) against a schema, with errors of one line."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from .errors import UserError

MAX_SHOWN = 200  # letters of a reason; names in it come from outside too
REASONS = {  # by pydantic's kind of error, filled in with its context; others are "not what it should be"
    "missing": "it is missing",
    "model_type": "an object is expected",
    "dict_type": "an object is expected",
    "list_type": "a list is expected",
    "string_type": "text is expected",
    "bool_type": "true or false is expected",
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "finite_number": "a finite number is expected",
    "greater_than": "more than {gt} is expected",
    "greater_than_equal": "at least {ge} is expected",
    "less_than": "less than {lt} is expected",
    "less_than_equal": "at most {le} is expected",
    "too_short": "at least {min_length} entries are expected",
    "too_long": "at most {max_length} entries are expected",
    "literal_error": "{expected} is expected",
    "none_required": "null is expected",
}

Count = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Figure = FiniteFloat | Annotated[int, Field(gt=-(2**63), lt=2**63)]


class Record(BaseModel):
    """A JSON object with at least these keys. Types are exact: "1" and true are no numbers, but 1 is a
    float."""

    # a field may be called model_…, which pydantic before 2.10 warns of
    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())


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
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = REASONS.get(first["type"], "not what it should be").format(**first.get("ctx", {}))
    reason = f"{place}: {message}" if place else message
    return " ".join(reason.split())[:MAX_SHOWN]
