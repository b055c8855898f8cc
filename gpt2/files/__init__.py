"""Files: written atomically, read up to a size limit, and locked by one process at a time."""

from .parsing import parse_json, read_object
from .reading import (
    MAX_LINES_BYTES,
    MAX_TEXT_BYTES,
    check_regular,
    check_safetensors,
    decode_line,
    hint,
    lines_of,
    open_regular,
    read_bytes,
    read_lines,
    read_stdin,
    read_text,
    size_of,
)
from .writing import (
    check_name,
    check_new,
    check_new_folder,
    identity,
    make_folder,
    sweep,
    work_folder,
    write_atomic,
    writing,
)

__all__ = [
    "MAX_LINES_BYTES", "MAX_TEXT_BYTES", "check_name", "check_new", "check_new_folder",
    "check_regular", "check_safetensors", "decode_line", "hint", "identity", "lines_of",
    "make_folder", "open_regular", "parse_json", "read_bytes", "read_lines", "read_object",
    "read_stdin", "read_text", "size_of", "sweep", "work_folder", "write_atomic", "writing",
]  # fmt: skip
