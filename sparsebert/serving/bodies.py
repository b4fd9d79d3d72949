"""What clients send and are sent: the bodies, and the OpenAPI document's schemas of them."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, WithJsonSchema
from pydantic.json_schema import models_json_schema

from sparsebert.errors import cut
from sparsebert.serving.faults import Fault
from sparsebert.serving.served import Text, Windows
from sparsebert.serving.state import Rules

Activation = Literal["softmax", "sigmoid", "identity"]
COMPONENT = "#/components/schemas/{model}"
_TEXT, _TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}
_ITEM = {"$ref": COMPONENT.format(model="Item")}
_BATCH = {"type": "array", "items": {"anyOf": [{**_TEXTS, "maxItems": 2}, _ITEM]}, "minItems": 1}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Long(Body):
    """What is done with a text that is too long: an error, unless one of these is given."""

    truncate: bool = Field(False, description="cut it; the header x-truncated lists the texts that were cut")
    window: int | None = Field(
        None,
        ge=3,
        description="read it whole, in windows of so many tokens; its logits are the mean over its windows, of which "
        "the header x-windows says how many each text has. Of a pair, windows go over the second text",
    )
    stride: int | None = Field(
        None, ge=1, description="tokens from the beginning of a window to that of the next [default: half a window]"
    )

    def windows(self, rules: Rules) -> Windows | None:
        """None for texts that are read as they are, or cut."""
        if self.window is None:
            if self.stride is not None:
                raise Fault(422, "validation", "stride is the distance of windows, and there is no window", "send one")
            return None
        if self.truncate:
            raise Fault(422, "validation", "truncate and window exclude each other", "send one")
        if rules.tokens is not None and self.window > rules.tokens:
            raise Fault(422, "validation", f"a window may have {rules.tokens} tokens, has {self.window}", "send less")
        return Windows(self.window, self.stride or max(1, self.window // 2), rules.items)


class Item(Body):
    """A text, or a pair of texts."""

    text: str
    text_pair: str | None = None


class Predict(Long):
    """Texts to classify."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": [["a gripping film"], ["so so"]], "top_k": 1}]}
    )

    # What lists hold is read by `texts_of`, whose errors say more than those of a union of types.
    inputs: Annotated[str | Item | list, WithJsonSchema({"anyOf": [_TEXT, _ITEM, _BATCH]})] = Field(
        description='a text, or {"text", "text_pair"}, or a batch: a list of [text], [text, pair] or such objects'
    )
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    top_k: int | None = Field(None, ge=1, description="so many labels of each text [default: all]")
    activation: Activation | None = Field(
        None, description="from logits to scores [default: by the model's problem type, see /info]"
    )


class Rerank(Long):
    """Texts to order by how well they go with a query."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "why rain?", "texts": ["clouds", "a film"]}]})

    query: str
    texts: list[str] = Field(min_length=1, fail_fast=True)  # an error for each of 10^6 items takes seconds
    raw_scores: bool = Field(False, description="logits in place of probabilities")
    return_text: bool = Field(False, description="send the texts back")


class Classify(Long):
    """Texts to classify."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["a gripping film", "so so"]}]})

    input: str | Annotated[list[str], Field(fail_fast=True)] = Field(description="a text or texts")
    model: str | None = Field(None, description="the model's name, see /info")
    truncate: bool = Field(True, description="cut texts that are too long, unless there is a window")

    def windows(self, rules: Rules) -> Windows | None:
        if self.window is not None and "truncate" not in self.model_fields_set:
            return self.model_copy(update={"truncate": False}).windows(rules)
        return super().windows(rules)


class Tensor(BaseModel):
    """Texts as a tensor of KServe's protocol."""

    model_config = ConfigDict(strict=True)

    name: Literal["text", "text_pair"]
    shape: list[int] = Field(description="[n] or [n, 1]", fail_fast=True)
    datatype: Literal["BYTES"]
    data: Annotated[
        list, WithJsonSchema({"anyOf": [_TEXTS, {"type": "array", "items": {**_TEXTS, "maxItems": 1}}]})
    ] = Field(description="texts, flat or in lists of one, as the shape says")


class Output(BaseModel):
    """A tensor that is asked for."""

    model_config = ConfigDict(strict=True)

    name: str


class Infer(BaseModel):
    """Texts to classify, by KServe's open inference protocol."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a gripping film"]}]}]
        },
    )

    id: str | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=2, description="text and, for pairs, text_pair")
    outputs: Annotated[list[Output], Field(fail_fast=True)] | None = Field(
        None, description="which outputs are sent [default: all]"
    )
    parameters: dict = Field(default_factory=dict, description="truncate, window and stride, as for /predict")


class Score(BaseModel):
    label: str
    score: float


class Scores(RootModel):
    """Of each text the labels with their scores, the highest first; of a single text without the outer list."""

    root: list[Score] | list[list[Score]]


class Error(BaseModel):
    """Every answer that is an error."""

    error: str
    type: str
    request_id: str
    hint: str


OF_TRITON = ("binary_data_output",)  # a parameter that its clients send, and answers in JSON follow anyway
REQUESTS = (Item, Predict, Rerank, Classify, Infer)
ANSWERS = (Scores, Error)


def schemas() -> dict[str, dict]:
    """The OpenAPI document's components, by name."""
    models = [*((model, "validation") for model in REQUESTS), *((model, "serialization") for model in ANSWERS)]
    return models_json_schema(models, ref_template=COMPONENT)[1]["$defs"]


def require_few(count: int, rules: Rules) -> None:
    """Raises Fault for more texts than a request may have."""
    if count > rules.items:
        raise Fault(
            413, "too_many_items", f"a request may have {rules.items} texts, has {count}", "send several requests"
        )


def texts_of(given: str | Item | list, rules: Rules) -> tuple[list[Text], bool]:
    """The texts of `Predict.inputs`, and whether it was one and no batch."""
    if not isinstance(given, list):
        return [_text(given, "inputs")], True
    if not given:
        raise Fault(422, "validation", "inputs must hold at least one text, holds none", "send a text")
    require_few(len(given), rules)
    return [_text(item, f"inputs[{i}]") for i, item in enumerate(given)], False


def _text(item, where: str) -> Text:
    if where != "inputs" and isinstance(item, str):
        raise Fault(
            422, "validation", f"{where} is a text in a plain list, which may mean a pair or a batch",
            'write [["a"], ["b"]] for two texts, [["a", "b"]] for a pair',
        )  # fmt: skip
    if isinstance(item, dict):
        try:
            item = Item.model_validate(item)
        except ValidationError as error:
            raise Fault(422, "validation", f"{where}: {told(error)}", 'write {"text": …, "text_pair": …}') from error
    if isinstance(item, Item):
        return item.text if item.text_pair is None else (item.text, item.text_pair)
    if isinstance(item, str):
        return item
    if isinstance(item, list) and 1 <= len(item) <= 2 and all(isinstance(part, str) for part in item):
        return item[0] if len(item) == 1 else (item[0], item[1])
    raise Fault(422, "validation", f"{where} must be [text], [text, pair] or an object with text", "correct it")


def tensors_of(asked: Infer) -> list[Text]:
    """The texts of `Infer.inputs`."""
    columns = {tensor.name: _column(tensor) for tensor in asked.inputs}
    first, second = columns.get("text"), columns.get("text_pair")
    twice = len(columns) < len(asked.inputs)
    if twice or not first or (len(columns) == 2 and (second is None or len(second) != len(first))):
        raise Fault(
            422, "validation",
            f"inputs must be text, and text_pair of as many, are {[tensor.name for tensor in asked.inputs]}", "see /v2",
        )  # fmt: skip
    return first if second is None else list(zip(first, second, strict=True))


def long_of(asked: Infer) -> Long:
    """What `Infer.parameters` say of long texts."""
    try:
        return Long.model_validate({k: v for k, v in asked.parameters.items() if k not in OF_TRITON})
    except ValidationError as error:
        raise Fault(422, "validation", f"parameters.{told(error)}", "see Infer in /docs") from error


def _column(tensor: Tensor) -> list[str]:
    """The texts of a tensor of n texts, shape [n] or [n, 1]."""
    texts = [part[0] if isinstance(part, list) and len(part) == 1 else part for part in tensor.data]
    count = len(texts)
    if not all(isinstance(text, str) for text in texts) or tensor.shape not in ([count], [count, 1]):
        raise Fault(
            422, "validation", f"{tensor.name} has {count} entries and the shape {cut(str(tensor.shape), 60)}",
            "send texts, of shape [n] or [n, 1]",
        )  # fmt: skip
    return texts


async def read(request: Request, model: type[Body] | type[Infer]):
    """The body of a request. Raises Fault for one that is no JSON, or other than the model says."""
    body = await request.body()
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = _first(error)
        if found["type"] == "json_invalid":
            raise Fault(400, "json", _said(found), "send JSON in UTF-8") from error
        raise Fault(422, "validation", _said(found), f"see {model.__name__} in /docs") from error


def told(error: ValidationError) -> str:
    """The first thing that is wrong, with where it is."""
    return _said(_first(error))


def _first(error: ValidationError) -> dict:
    return error.errors(include_url=False, include_input=False)[0]  # which makes all of them


def _said(found: dict) -> str:
    at = ".".join(map(str, found["loc"]))
    return cut(f"{at}: {found['msg']}" if at else found["msg"], 200)
