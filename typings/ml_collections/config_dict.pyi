from typing import Any

from . import ConfigDict as ConfigDict
from . import FieldReference as FieldReference

def placeholder(field_type: type, required: bool = False) -> Any: ...
def create(**keywords: Any) -> ConfigDict: ...
