"""llama.cpp's own log, out of the terminal."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def quiet_llama() -> Iterator[None]:
    """Keep llama.cpp's per-tensor chatter out of the terminal; errors go to our log (fallbacks are in the report)."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # an error; 5 continues the line before
            log.warning("llama.cpp: %s", text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        yield
    finally:
        _KEEP.append(listen)  # llama.cpp keeps the pointer: it must outlive this call


_KEEP: list[Any] = []
