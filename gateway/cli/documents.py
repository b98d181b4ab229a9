"""Messages as JSON documents: plain numbers, short names of states, times as text. Their shape is part of the contract.

The standard JSON form of protobuf writes 64-bit integers as strings and states as long constants, and leaves out zeros:
scripts that read `--json` should need none of that knowledge.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp


def to_document(message: Message) -> dict[str, Any]:
    """`message` with every field: None where it is not set, and a field `x_json` as the value `x` that it holds."""
    document: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is not None and field.has_presence and not message.HasField(field.name):
            is_optional = len(field.containing_oneof.fields) == 1
            document |= {field.name: None} if is_optional else {}
        elif field.name.endswith("_json"):
            text = getattr(message, field.name)
            document[field.name.removesuffix("_json")] = json.loads(text) if text else None
        else:
            document[field.name] = _value(message, field)
    return document


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [_single(item, field) for item in value]
    if field.message_type is not None and not message.HasField(field.name):
        return None
    return _single(value, field)


def _single(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return to_document(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type.name, field.enum_type.values_by_number[value].name)
    if isinstance(value, bytes):
        return _text(value)
    return round(value, 6) if field.type == FieldDescriptor.TYPE_FLOAT else value


def enum_word(type_name: str, value_name: str) -> str:
    """The short name of an enum's value: JOB_STATE_RUNNING of JobState is `running`, a verdict `timeout-wall`."""
    prefix = "".join(f"_{char}" if char.isupper() else char.upper() for char in type_name).lstrip("_") + "_"
    word = value_name.removeprefix(prefix).lower()
    return word.replace("_", "-") if type_name == "Verdict" else word


def _text(data: bytes) -> str:
    """Bytes as UTF-8 where they are, else as `base64:...`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()
