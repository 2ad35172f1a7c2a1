"""Problems that pydantic finds in a section, as sentences for the user."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from inheritune.errors import UserError, suggest_name

Section = TypeVar("Section", bound=BaseModel)


def parse_section(model: type[Section], raw: dict, where: str) -> Section:
    """Return the `model` made from `raw`. Raises one UserError that names `where` and lists all problems."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(list_problems(error, model))) from None


def list_problems(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return one sentence per problem, with the path of the key.

    The sentence on an unknown key names the nearest valid one."""
    sentences = []
    for problem in error.errors():
        path = prefix + ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            owner = find_model_class(model, problem["loc"][:-1])
            valid = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
            message = f"unknown key; {suggest_name(problem['loc'][-1], valid)}"
        elif problem["type"] != "value_error" and problem["type"] != "missing":
            message += f" (got {problem['input']!r})"
        sentences.append(f"{path}: {message}" if path else message)
    return sentences


def find_model_class(model: Any, path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the pydantic class that a key path leads to, through optional fields, unions and mappings.

    Returns None where the path does not decide on a class."""
    for part in path:
        fields = {field.alias or name: field for name, field in getattr(model, "model_fields", {}).items()}
        annotation = fields[part].annotation if part in fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        classes = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if annotation is not None and classes:
            model = classes[0]
        elif annotation is not None:
            model = annotation
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None
