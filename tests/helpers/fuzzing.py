"""Changes of bytes and values for fuzzing, and a watch over what readers do meanwhile."""

import contextlib
import os
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Short in the default run, where a failure must be the change's; long and random with -m slow.
SHORT = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(max_examples=1000, suppress_health_check=list(HealthCheck))

_LIES = [0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
_BYTES = st.binary(max_size=12)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
        st.tuples(st.just("insert"), st.floats(0, 1), _BYTES),
        st.tuples(st.just("replace"), st.floats(0, 1), _BYTES),
        st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("lie"), st.floats(0, 1), st.sampled_from(_LIES)),
    ),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


def changed(data: bytes, changes: list) -> bytes:
    """The bytes after each of the CHANGES, whose places are shares of their length."""
    out = bytearray(data)
    for what, place, value in changes:
        at = min(int(place * len(out)), max(0, len(out) - 1))
        match what:
            case "flip" if out:
                out[at] ^= 1 << value
            case "insert":
                out[at:at] = value
            case "replace":
                out[at : at + len(value)] = value
            case "delete":
                del out[at : at + value]
            case "cut":
                del out[at:]
            case "repeat":
                out[at:at] = out[at : at + value]
            case "lie":
                width = 8 if value >= 2**32 else 4
                out[at : at + width] = value.to_bytes(width, "little")
    return bytes(out)


def rezipped(data: bytes, member: str, changes: list) -> bytes:
    """The zip file with one member changed and its checksums right, so that readers go on."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(member):
                content = changed(content, changes)
            new.writestr(info.filename, content, info.compress_type)
    return out.getvalue()


_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.fork")
_watched = threading.local()


def _hook(event: str, args: tuple) -> None:
    seen = getattr(_watched, "seen", None)
    if seen is not None and event in _FORBIDDEN:
        seen.append((event, str(args)[:200]))


sys.addaudithook(_hook)  # can't be taken back: it is idle but inside `watched`


@contextlib.contextmanager
def watched(room: int = 1 << 30) -> Iterator[None]:
    """Fails if the block unpickles a class, runs code or starts a process.

    room: address space that it may take beyond the present; more gives MemoryError, on Linux.
    """
    _watched.seen = []
    try:
        with _limited(room):
            yield
        assert not _watched.seen, _watched.seen
    finally:
        _watched.seen = None


def refusal(kinds: type[Exception] | tuple, call: Callable[[], object]) -> str | None:
    """The message of the error by which a watched call is refused; None if it returns.

    Other errors than these kinds pass on.
    """
    with watched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except kinds as error:
            return str(error)
    return None


@contextlib.contextmanager
def _limited(room: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    with open("/proc/self/statm", encoding="utf-8") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + room
    limit = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
